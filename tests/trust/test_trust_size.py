"""Offsets beyond 2**31 elements, a million tokens, many heads and sequences. Memory that is far away is a sparse file."""

import math

import pytest
import torch
from tests.rigs import INTERPRETED, Rig, equal

import stem_attention as sa
from stem_attention.backends.triton import TritonBackend
from stem_attention.call import Call
from stem_attention.testing import exact_attention, pack, relative_error, token_mask

FAR = 1 << 31


def sparse_file(path, elements, dtype=torch.float16):
    """Zeros of which just the written ones take room."""
    path.touch()
    return torch.from_file(str(path), shared=True, size=elements, dtype=dtype)


@pytest.fixture
def cpu_rig(rig):
    if rig.device != "cpu":
        pytest.skip("tests/gpu has the test for GPUs")
    return rig


@pytest.mark.parametrize("far", ["positions", "heads", "sequences"])
def test_strides_that_reach_beyond_2_to_the_31_elements(far, cpu_rig, tmp_path):
    shape_of = {"positions": (1, 2.3, (1, 1)), "heads": (1, 2.2, (2, 2)), "sequences": (2, 2.2, (1, 1))}
    batch, blocks, heads = shape_of[far]
    small = cpu_rig.qkv(blocks, blocks, batch=batch, heads=heads, dtype=torch.float16)
    axis = {"sequences": 0, "positions": 1, "heads": 2}[far]
    step = math.ceil(FAR / (small[0].shape[axis] - 1)) + 64
    large = []
    for i, x in enumerate(small):
        strides = list(x.stride())
        strides[axis] = step
        store = sparse_file(tmp_path / f"{i}", step * x.shape[axis] + x.numel())
        view = store.as_strided(x.shape, strides)
        assert (x.shape[axis] - 1) * step > FAR
        large.append(view.copy_(x))
    got, expected = (cpu_rig.whole(*x) for x in (large, small))
    assert all(torch.allclose(x, y, rtol=1e-3, atol=1e-4) for x, y in zip(got, expected, strict=True))
    assert torch.equal(cpu_rig.select(*large).to_mask(), cpu_rig.select(*small).to_mask())


def test_pages_beyond_2_to_the_31_elements(cpu_rig, tmp_path):
    near = pack([cpu_rig.qkv(3.2, 3.2, heads=(2, 1), dtype=torch.float16)], page_size=16)
    pages = near["page_table"][0, :-1]
    first = FAR // near["k"][0].numel() + 5
    far = {**near, "page_table": near["page_table"] + first}
    for name in "kv":
        cache = near[name]
        far[name] = sparse_file(tmp_path / name, (first + len(cache)) * cache[0].numel()).view(-1, *cache.shape[1:])
        far[name][first + pages] = cache[pages]
    assert equal(cpu_rig.packed(**far), cpu_rig.packed(**near))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter would take hours")
def test_the_end_of_a_million_tokens():
    """One chunk of a long prompt's end, so that a CPU can do it; tests/gpu/test_gpu_runtime.py does it all."""
    length = 1 << 20
    q, k, v = (x.half() for x in Rig("torch", dim=16).qkv(1, length / 16, heads=(1, 1), dtype=torch.float32))
    policy = sa.Stem(tail_blocks=0)
    out = sa.stem_attention(q, k, v, policy=policy, dense_below=0)
    selection = sa.select_blocks(q, k, v, policy=policy)
    selection.validate()
    assert selection.density() < 0.1
    exact, _ = exact_attention(q, k, v, token_mask(selection))
    assert relative_error(out, exact) < 2e-3


@pytest.mark.skipif(INTERPRETED, reason="the interpreter would take half a minute")
def test_256_heads(rig):
    q, k, v = rig.qkv(1.2, 4.3, heads=(256, 2))
    few = [x[:, :, i : i + 1] for x, i in ((q, 200), (k, 1), (v, 1))]
    got, expected = rig.whole(q, k, v), rig.whole(*few)
    assert torch.equal(got[0][:, :, 200:201], expected[0])
    assert torch.equal(got[1][:, 200:201], expected[1])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter would take minutes")
def test_more_heads_and_sequences_than_65535(rig):
    if rig.backend == "reference":
        pytest.skip("a loop in Python over each head of each sequence")
    batch, heads = (700, 100) if rig.device == "cuda" else (1100, 60)
    q, k, v = rig.qkv(1 / rig.block, 5 / rig.block, batch=batch, heads=(heads, 1))
    out = rig.whole(q, k, v, return_lse=False)
    for i in (0, batch // 2, batch - 1):
        assert torch.equal(out[i : i + 1], rig.whole(*(x[i : i + 1] for x in (q, k, v)), return_lse=False))


def test_a_grid_that_no_gpu_takes_is_refused():
    q, k, v = (x.expand(65536, -1, -1, -1) for x in Rig("torch").qkv(1, 1, heads=(1, 1)))
    call = Call(q, k, v, sa.Mass(), 0.1, 16, dense_below=0)
    for run in (TritonBackend().forward, TritonBackend().select):
        with pytest.raises(sa.UnsupportedError, match="65535 sequences, not 65536; split the batch"):
            run(call)
