"""The public calls: what they promise about results, inputs, chunks, precision and memory."""

import math
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import stem_attention as sa
from stem_attention.backends import Request, get_backend
from stem_attention.testing import (
    LAYOUTS,
    error_against_sdpa,
    exact_attention,
    make_qkv,
    structured_qkv,
    token_mask,
    worst_row_error,
)

# Small enough that lengths of a few hundred tokens are sparse.
SPARSE = sa.StemConfig(
    block_size=16, stride=8, ratio_short=0.3, ratio_long=0.2, knee_tokens=256, sink_blocks=1, local_blocks=2, dense_below=0
)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def causal_mask(q_len, kv_len):
    return torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stem_attention_is_selection_then_attention(dtype, backend):
    q, k, v = structured_qkv(2, 200, 300, 4, 2, 32, dtype=dtype)
    out, lse = sa.stem_attention(q, k, v, config=SPARSE, return_lse=True, backend=backend)
    selection = sa.select_blocks(q, k, v, config=SPARSE, backend=backend)
    assert 0.1 < selection.density() < 0.6
    then, then_lse = sa.block_sparse_attention(q, k, v, selection, return_lse=True, backend=backend)
    assert torch.equal(out, then)
    assert torch.equal(lse, then_lse)
    assert out.shape == q.shape
    assert out.dtype == dtype
    assert lse.shape == (2, 4, 200)
    assert lse.dtype == torch.float32


def test_select_blocks_does_not_depend_on_the_backend_in_fp64():
    q, k, v = structured_qkv(2, 230, 300, 4, 2, 32, dtype=torch.float64)
    ours, theirs = (sa.select_blocks(q, k, v, config=SPARSE, backend=name) for name in ("torch", "reference"))
    assert torch.equal(ours.indices, theirs.indices)
    assert torch.equal(ours.counts, theirs.counts)


def test_the_config_decides_what_is_kept():
    q, k, v = structured_qkv(1, 400, 400, 2, 1, 32)
    narrow, wide = (sa.StemConfig(block_size=16, dense_below=0, tail_blocks=t, min_blocks=3, sink_blocks=1) for t in (0, 9))
    assert sa.select_blocks(q, k, v, config=narrow).density() < sa.select_blocks(q, k, v, config=wide).density()
    assert sa.select_blocks(q, k, v).block_size == sa.StemConfig().block_size
    assert not torch.equal(sa.stem_attention(q, k, v, config=narrow), sa.stem_attention(q, k, v, config=wide))


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (63, 64), (97, 97), (60, 199), (199, 199)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_below_dense_below_it_is_dense_and_from_there_on_sparse(dtype, q_len, kv_len, return_lse):
    q, k, v = structured_qkv(2, q_len, kv_len, 4, 2, 32, dtype=dtype)
    exact, exact_lse = exact_attention(q, k, v, causal_mask(q_len, kv_len))
    dense = sa.StemConfig(**{**SPARSE.to_dict(), "dense_below": kv_len + 1})
    result = sa.stem_attention(q, k, v, config=dense, return_lse=return_lse)
    out = result[0] if return_lse else result
    assert worst_row_error(out, exact) < (1e-12 if dtype == torch.float64 else 1e-5)
    if return_lse:
        assert torch.allclose(result[1].double(), exact_lse, rtol=1e-5, atol=1e-5)
    reached = sa.StemConfig(**{**SPARSE.to_dict(), "dense_below": kv_len})
    again = sa.stem_attention(q, k, v, config=reached, return_lse=return_lse)
    sparse = sa.stem_attention(q, k, v, config=SPARSE, return_lse=return_lse)
    assert all(torch.equal(x, y) for x, y in zip(again, sparse, strict=True))
    if kv_len == 199:
        assert worst_row_error(sparse[0] if return_lse else sparse, exact) > 1e-3


def test_dense_below_counts_the_whole_prompt_not_the_chunk():
    q, k, v = structured_qkv(1, 200, 200, 2, 1, 32)
    config = sa.StemConfig(**{**SPARSE.to_dict(), "dense_below": 300})
    whole = sa.stem_attention(q, k, v, config=config, prompt_len=300)
    assert torch.equal(whole, sa.stem_attention(q, k, v, config=SPARSE, prompt_len=300))
    assert not torch.allclose(whole, sa.stem_attention(q, k, v, config=config, prompt_len=299))


@settings(max_examples=25)
@given(
    length=st.sampled_from([64, 127, 128, 129, 300, 331]),
    cuts=st.sets(st.integers(1, 20), max_size=4),
    group=st.sampled_from([1, 2, 7]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 99),
)
def test_chunks_on_block_borders_equal_one_shot(length, cuts, group, layout, seed):
    q, k, v = structured_qkv(1, length, length, 2 * group, 2, 32, seed=seed, layout=layout)
    one_shot, one_lse = sa.stem_attention(q, k, v, config=SPARSE, return_lse=True)
    whole = sa.select_blocks(q, k, v, config=SPARSE)
    borders = [0, *sorted(16 * cut for cut in cuts if 16 * cut < length), length]
    for low, high in pairwise(borders):
        chunk = q[:, low:high], k[:, :high], v[:, :high]
        part = sa.select_blocks(*chunk, config=SPARSE, prompt_len=length)
        rows = slice(part.first_row, part.first_row + part.rows)
        assert torch.equal(part.to_mask(), whole.to_mask()[:, :, rows, : part.key_blocks])
        out, lse = sa.stem_attention(*chunk, config=SPARSE, prompt_len=length, return_lse=True)
        assert worst_row_error(out, one_shot[:, low:high]) < 1e-5
        assert torch.allclose(lse, one_lse[:, :, low:high], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["bhsd", "fused"])
@pytest.mark.parametrize("config", [SPARSE, sa.StemConfig()])
def test_outer_strides_change_nothing(config, layout):
    plain = structured_qkv(2, 150, 200, 4, 2, 32)
    strided = structured_qkv(2, 150, 200, 4, 2, 32, layout=layout)
    assert not all(x.is_contiguous() for x in strided)
    out = sa.stem_attention(*strided, config=config)
    assert out.is_contiguous()
    assert worst_row_error(out, sa.stem_attention(*plain, config=config)) < 1e-5


def test_expanded_tensors_are_accepted():
    q, k, v = structured_qkv(1, 100, 100, 2, 1, 32)
    spread = [x.expand(3, -1, -1, -1) for x in (q, k, v)]
    shared_head = (q, k.expand(-1, -1, 2, -1), v.expand(-1, -1, 2, -1))
    alone = sa.stem_attention(q, k, v, config=SPARSE)
    assert torch.allclose(sa.stem_attention(*spread, config=SPARSE), alone.expand(3, -1, -1, -1), rtol=1e-5, atol=1e-5)
    assert torch.allclose(sa.stem_attention(*shared_head, config=SPARSE), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_never_written(dtype, backend):
    inputs = structured_qkv(1, 100, 140, 4, 2, 32, dtype=dtype)
    selection = sa.select_blocks(*inputs, config=SPARSE)
    held = [*inputs, selection.indices, selection.counts]
    before = [x.clone() for x in held]
    for config in (SPARSE, sa.StemConfig()):
        sa.stem_attention(*inputs, config=config, backend=backend)
        sa.stem_attention(*inputs, config=config, return_lse=True, backend=backend)
    sa.select_blocks(*inputs, config=sa.StemConfig.angelslim(block_size=16), backend=backend)
    sa.block_sparse_attention(*inputs, selection, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(held, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_error_of_the_whole_method_is_at_most_twice_that_of_sdpa(dtype):
    q, k, v = structured_qkv(1, 500, 600, 8, 2, 64, dtype=dtype)
    out = sa.stem_attention(q, k, v, config=SPARSE)
    mask = token_mask(sa.select_blocks(q, k, v, config=SPARSE))
    ours, theirs = error_against_sdpa(out, q, k, v, mask)
    assert 0 < ours <= 2 * theirs


def test_a_nan_key_is_not_hidden_by_the_selection():
    q, k, v = structured_qkv(1, 320, 320, 2, 1, 32)
    k[:, 100] = math.nan
    out = sa.stem_attention(q, k, v, config=SPARSE)
    assert out[:, :96].isfinite().all()
    assert out[:, 112:].isnan().all()


@pytest.mark.parametrize("q_len", [0, 1])
@pytest.mark.parametrize("kv_len", [0, 1, 300])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("config", [SPARSE, sa.StemConfig(), sa.StemConfig.angelslim()])
def test_few_queries_give_few_results(config, backend, q_len, kv_len):
    q, k, v = make_qkv(2, min(q_len, kv_len), kv_len, 4, 2, 16)
    out, lse = sa.stem_attention(q, k, v, config=config, return_lse=True, backend=backend)
    assert out.shape == sa.stem_attention(q, k, v, config=config, backend=backend).shape == q.shape
    assert lse.shape == (2, 4, q.shape[1])
    selection = sa.select_blocks(q, k, v, config=config, backend=backend)
    selection.validate()
    assert selection.rows == q.shape[1]
    out, lse = sa.block_sparse_attention(q, k, v, selection, return_lse=True, backend=backend)
    assert out.shape == q.shape
    assert lse.shape == (2, 4, q.shape[1])


@pytest.mark.parametrize("config", [SPARSE, sa.StemConfig()])
def test_autocast_rounds_nothing(config):
    q, k, v = structured_qkv(1, 300, 300, 2, 1, 32)
    plain = sa.stem_attention(q, k, v, config=config, return_lse=True)
    selection = sa.select_blocks(q, k, v, config=config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = sa.stem_attention(q, k, v, config=config, return_lse=True)
        dense = sa.stem_attention(q, k, v, config=config)
        again = sa.select_blocks(q, k, v, config=config)
    assert all(torch.equal(x, y) for x, y in zip(plain, cast, strict=True))
    assert dense.dtype == torch.float32
    assert torch.equal(selection.indices, again.indices)


def test_gradients_are_refused_where_they_would_be_needed_and_only_there():
    q, k, v = make_qkv(1, 64, 64, 2, 1, 16)
    selection = sa.select_blocks(q, k, v, config=SPARSE)
    for needy in (0, 1, 2):
        inputs = [x.clone().requires_grad_(i == needy) for i, x in enumerate((q, k, v))]
        for call in (
            lambda *x: sa.stem_attention(*x, config=SPARSE),
            lambda *x: sa.select_blocks(*x, config=SPARSE),
            lambda *x: sa.block_sparse_attention(*x, selection),
        ):
            with pytest.raises(sa.UnsupportedError, match="no_grad"):
                call(*inputs)
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    call(*inputs)


class LargestOutput(TorchDispatchMode):
    """Remembers the largest tensor that any operator made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.numel = max([self.numel, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
        return result


def test_no_operator_makes_a_tensor_beyond_the_stated_bound():
    length, heads, dim, config = 8192, 4, 32, sa.StemConfig()
    q, k, v = make_qkv(1, length, length, heads, 2, dim)
    backend = get_backend(Request(q.device, q.dtype, dim, config.block_size), "torch")
    with LargestOutput() as selecting:
        selection = backend.select(q, k, v, config, dim**-0.5, length)
    # The sums of q over its blocks, half of what the strided scores of a single head would take.
    assert 0 < selecting.numel <= q.numel() // (config.block_size // config.stride) < (length // config.stride) ** 2
    with LargestOutput() as attending:
        backend.attend(q, k, v, selection, dim**-0.5)
    # 2^22 scores at a time at most, a sixteenth of all scores of a single head.
    assert 0 < attending.numel <= 1 << 22 < length**2


MEMORY_SCRIPT = """
import torch, stem_attention as sa
def mebibytes(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) / 1024
torch.set_num_threads(1)
q, k, v = (torch.randn(1, 32768, heads, 64) for heads in (8, 2, 2))
sa.stem_attention(q[:, -8192:], k[:, -8192:], v[:, -8192:])  # load what torch loads lazily
with open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")  # forget the highest memory use so far
before = mebibytes("VmRSS")
out = sa.stem_attention(q, k, v)
print(mebibytes("VmHWM") - before, bool(out.isfinite().all()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells memory on Linux only")
def test_peak_extra_memory_at_32k_tokens_is_under_one_gib():
    done = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True)
    mebibytes, finite = done.stdout.split()
    assert finite == "True"
    assert 50 < float(mebibytes) < 1024  # the output alone is 64 MiB, some of it in memory that was held already
