"""What is compiled on meta tensors is what a launch on real memory looks for."""

from __future__ import annotations

import pytest
import torch
from triton.runtime import driver

from stem_attention import StemConfig
from stem_attention.backends.precompile import Calls, precompile
from stem_attention.backends.triton import masses, routes
from stem_attention.backends.triton.choose import launch
from stem_attention.backends.triton.launch import mass_launch_for
from stem_attention.backends.triton.offline import Compilation, offline
from stem_attention.backends.triton.select import select
from stem_attention.backends.triton.span import Span

CALLS = Calls([5000], heads=4, kv_heads=2, head_dim=32, dtype=torch.bfloat16)
CONFIG = StemConfig(block_size=64)


def choose_blocks(scores, budgets, indices, counts):
    """The launch of a selection of 79 rows, on tensors of any kind."""
    sizes = {"SINK": CONFIG.sink_blocks, "LOCAL": CONFIG.local_blocks, "B": 64}
    positions = (0, 5003, 5003, 0, 79, 79, 80, 17, 79)
    launch(
        scores, budgets, indices, counts, 1, 4, None, None, *positions, **sizes, EXTRA=False,
        IMPLICIT=True, RAGGED=False,
    )  # fmt: skip


def test_launches_on_real_memory_find_what_was_compiled_on_meta_tensors(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made: list[Compilation] = []
    assert precompile("sm80", CALLS, CONFIG, made.append) == "triton"
    names = ["pool_keys", "pool_queries", "score_kernel", "choose_kernel", "attention_kernel"]
    assert [(kernel.kernel, kernel.cached) for kernel in made] == [(name, False) for name in names]
    found: list[Compilation] = []
    with offline("sm80", found.append):
        # As transformers lays them out: keys by head. Their number of tokens is no multiple of 16.
        q = torch.zeros(1, 5003, 4, 32, dtype=torch.bfloat16)
        k = torch.zeros(1, 2, 5003, 32, dtype=torch.bfloat16).transpose(1, 2)
        routes._pool_keys(k, k, CONFIG, Span.of(q, k, 64, None, None), True, None)
        scores, table = torch.zeros(1, 4, 79, 80), torch.zeros(1, 79, dtype=torch.int32)
        indices, counts = torch.zeros(1, 4, 79, 17, dtype=torch.int32), torch.zeros(1, 4, 79, dtype=torch.int32)
        choose_blocks(scores, table, indices, counts)
    assert [(kernel.kernel, kernel.cached) for kernel in found] == [("pool_keys", True), ("choose_kernel", True)]
    assert {kernel.key for kernel in found} <= {kernel.key for kernel in made}


def test_keep_by_mass_is_compiled_too(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made: list[Compilation] = []
    assert precompile("sm80", CALLS, StemConfig.mass(), made.append) == "triton"
    names = ["pool_key_means", "pool_query_means", "keep_kernel", "attention_kernel"]
    assert list(dict.fromkeys(kernel.kernel for kernel in made)) == names


def keep_kernels(config):
    """Keys of the kernels that choose, in the order in which they are compiled."""
    made: list[Compilation] = []
    precompile("sm80", CALLS, config, made.append)
    return [kernel.key for kernel in made if kernel.kernel == "keep_kernel"]


def test_head_factors_are_compiled_whatever_layers_heads_and_numbers_they_have(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    single = keep_kernels(StemConfig.mass())
    own = keep_kernels(StemConfig.mass(head_factors=[[0.5, 1, 2, 4]]))
    # A rank of tensor parallelism has fewer heads than the file has factors.
    model = keep_kernels(StemConfig.mass(head_factors=[[3.0] * 8] * 3))
    assert own == model
    assert set(own).isdisjoint(single)


def test_a_launch_with_head_factors_finds_what_was_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = StemConfig.mass(spread=0, head_factors=[[0.5, 1, 2, 4]])  # variances on a CPU are fp32
    monkeypatch.setattr(masses, "mass_launch", lambda _: mass_launch_for("sm80"))
    made: list[Compilation] = []
    precompile("sm80", CALLS, config, made.append)
    found: list[Compilation] = []
    q = torch.zeros(1, 5003, 4, 32, dtype=torch.bfloat16)
    k = torch.zeros(1, 2, 5003, 32, dtype=torch.bfloat16).transpose(1, 2)
    with offline("sm80", found.append):
        select(q, k, k, config, 0.25, (5003,), implicit=True)
    assert [(kernel.kernel, kernel.cached) for kernel in found] == [
        ("pool_key_means", True), ("pool_query_means", True), ("keep_kernel", True)
    ]  # fmt: skip
    assert {kernel.key for kernel in found} <= {kernel.key for kernel in made}


def test_nothing_is_started_and_the_driver_comes_back(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    before = driver._active
    counts = torch.full((1, 4, 79), 7, dtype=torch.int32)
    with offline("sm80", lambda _: None):
        choose_blocks(torch.zeros(1, 4, 79, 80), *(torch.zeros(1, 79, dtype=torch.int32) for _ in range(2)), counts)
    assert counts.unique().tolist() == [7]
    assert driver._active is before


@pytest.mark.parametrize("name", ["sm75", "gfx942", "hopper", "sm"])
def test_other_architectures_are_refused(name):
    with pytest.raises(ValueError, match="arch: expected sm80"), offline(name, lambda _: None):
        pass
