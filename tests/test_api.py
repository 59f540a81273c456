"""The public calls: what they promise about results, inputs, precision and memory. Chunks: tests/fuzz."""

import subprocess
import sys

import pytest
import torch
from tests.rigs import equal

import stem_attention as sa
from stem_attention.testing import exact_attention, make_qkv, structured_qkv, worst_row_error

# Small enough that lengths of a few hundred tokens are sparse.
STEM = sa.Stem(
    block_size=16, stride=8, ratio_short=0.3, ratio_long=0.2, knee_tokens=256, sink_blocks=1, local_blocks=2, tail_blocks=2
)
MASS = sa.Mass(block_size=16, query_pool=4, key_pool=8, share=2.0, spread=0.1)
SPARSE = {"policy": STEM, "dense_below": 0}
DENSE = {"dense_below": 10**9}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
POLICIES = pytest.mark.parametrize("policy", [STEM, MASS], ids=["stem", "mass"])
BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference"])


@BACKENDS
@POLICIES
@pytest.mark.parametrize("dtype", DTYPES)
def test_stem_attention_is_selection_then_attention(dtype, policy, backend):
    q, k, v = structured_qkv(2, 200, 300, 4, 2, 32, dtype=dtype)
    out, lse = sa.stem_attention(q, k, v, policy=policy, dense_below=0, return_lse=True, backend=backend)
    selection = sa.select_blocks(q, k, v, policy=policy, backend=backend)
    assert 0.1 < selection.density() < 0.7
    assert equal((out, lse), sa.block_sparse_attention(q, k, v, selection, return_lse=True, backend=backend))
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, dtype, (2, 4, 200), torch.float32)


def test_a_policy_a_spec_and_nothing_mean_the_same_everywhere():
    q, k, v = structured_qkv(1, 400, 400, 2, 1, 32)
    for policy, text in ((None, "mass"), (sa.Mass(share=8), "mass:share=8"), (sa.Stem.paper(), "paper")):
        selection = sa.select_blocks(q, k, v, policy=policy)
        assert equal((selection.indices,), (sa.select_blocks(q, k, v, policy=text).indices,))
        assert selection.block_size == (policy or sa.Mass()).block_size
        outs = [sa.stem_attention(q, k, v, policy=given, dense_below=0) for given in (policy, text)]
        assert equal(outs[:1], outs[1:])
    assert not torch.equal(outs[0], sa.stem_attention(q, k, v, dense_below=0))


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (63, 64), (97, 97), (60, 199), (199, 199)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_below_dense_below_it_is_dense_and_from_there_on_sparse(dtype, q_len, kv_len, return_lse):
    q, k, v = structured_qkv(2, q_len, kv_len, 4, 2, 32, dtype=dtype)

    def run(limit):
        result = sa.stem_attention(q, k, v, policy=STEM, dense_below=limit, return_lse=return_lse)
        return result if return_lse else (result,)

    exact = exact_attention(q, k, v, torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len))
    for dense in (run(kv_len + 1), run(None)):  # 4096 for the torch backend
        assert worst_row_error(dense[0], exact[0]) < (1e-12 if dtype == torch.float64 else 1e-5)
        assert not return_lse or torch.allclose(dense[1].double(), exact[1], rtol=1e-5, atol=1e-5)
    sparse = run(0)
    assert equal(run(kv_len), sparse)
    assert worst_row_error(sparse[0], exact[0]) > 1e-3 or kv_len < 199


def test_dense_below_counts_the_whole_prompt_not_the_chunk():
    q, k, v = structured_qkv(1, 200, 200, 2, 1, 32)
    long, short = (sa.stem_attention(q, k, v, policy=STEM, dense_below=300, prompt_len=length) for length in (300, 299))
    assert torch.equal(long, sa.stem_attention(q, k, v, **SPARSE, prompt_len=300))
    assert torch.equal(short, sa.stem_attention(q, k, v, **DENSE))


@pytest.mark.parametrize("q_len", [0, 1])
@pytest.mark.parametrize("kv_len", [0, 1, 300])
@BACKENDS
@pytest.mark.parametrize("policy", [STEM, MASS, sa.Stem.angelslim()], ids=["stem", "mass", "angelslim"])
def test_few_queries_give_few_results(policy, backend, q_len, kv_len):
    q, k, v = make_qkv(2, min(q_len, kv_len), kv_len, 4, 2, 16)
    selection = sa.select_blocks(q, k, v, policy=policy, backend=backend)
    selection.validate()
    assert selection.rows == q.shape[1]
    results = [sa.block_sparse_attention(q, k, v, selection, return_lse=True, backend=backend)]
    for limit in (0, None):
        options = {"policy": policy, "dense_below": limit, "backend": backend}
        results.append(sa.stem_attention(q, k, v, return_lse=True, **options))
        assert sa.stem_attention(q, k, v, **options).shape == q.shape
    assert all((out.shape, lse.shape) == (q.shape, (2, 4, q.shape[1])) for out, lse in results)


def test_tensors_that_require_gradients_are_taken_where_none_is_needed():
    """Where one is needed: tests/trust/test_trust_derivatives.py."""
    inputs = [x.requires_grad_() for x in make_qkv(1, 64, 64, 2, 1, 16)]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            selection = sa.select_blocks(*inputs, policy=STEM)
            out = sa.stem_attention(*inputs, **SPARSE)
            assert torch.allclose(out, sa.block_sparse_attention(*inputs, selection), rtol=1e-5, atol=1e-5)


def test_no_operator_makes_a_tensor_beyond_the_stated_bound(largest):
    length, policy = 8192, sa.Stem()
    q, k, v = make_qkv(1, length, length, 4, 2, 32)
    with largest:
        selection = sa.select_blocks(q, k, v, policy=policy)
    # The sums of q over its blocks, half of what the strided scores of a single head would take.
    assert 0 < largest.seen <= q.numel() // (policy.block_size // policy.stride) < (length // policy.stride) ** 2
    largest.seen = 0
    with largest:
        sa.block_sparse_attention(q, k, v, selection)
    # 2^22 scores at a time at most, a sixteenth of all scores of a single head.
    assert 0 < largest.seen <= 1 << 22 < length**2


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
