"""What is compiled on meta tensors is what a launch on real memory looks for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton.runtime import driver

from stem_attention import Mass, Stem
from stem_attention.backends.precompile import Calls, precompile
from stem_attention.backends.triton import mass, stem
from stem_attention.backends.triton.layout import Layout
from stem_attention.backends.triton.offline import Compilation, offline
from stem_attention.backends.triton.program import Launches
from stem_attention.call import Call

CALLS = Calls([5000], heads=4, kv_heads=2, head_dim=32, dtype=torch.bfloat16)
POLICY = Stem(block_size=64)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compilations(policy):
    """What is compiled for a policy, in order."""
    made: list[Compilation] = []
    assert precompile("sm80", CALLS, policy, made.append) == "triton"
    return made


def real_call(policy):
    """As transformers lays tensors out: keys by head. Their number of tokens is no multiple of 16."""
    q = torch.zeros(1, 5003, 4, 32, dtype=torch.bfloat16)
    k = torch.zeros(1, 2, 5003, 32, dtype=torch.bfloat16).transpose(1, 2)
    return Call(q, k, k, policy, 0.25, 5003)


def select(call, selector):
    launches = Launches()
    return selector(call, Layout.of(call, 64, launches), 0, True, launches)


@pytest.mark.newest_triton
def test_launches_on_real_memory_find_what_was_compiled_on_meta_tensors(monkeypatch):
    made = compilations(POLICY)
    names = ["pool_keys", "pool_queries", "score_kernel", "choose_kernel", "attention_kernel"]
    assert [(kernel.kernel, kernel.cached) for kernel in made] == [(name, False) for name in names]
    monkeypatch.setattr(stem, "_splits", lambda _: True)
    monkeypatch.setattr(stem, "architecture", lambda _: "sm80")
    found: list[Compilation] = []
    with offline("sm80", found.append):
        select(real_call(POLICY), stem.select_by_score)
    assert [(kernel.kernel, kernel.cached) for kernel in found] == [(name, True) for name in names[:4]]
    assert {kernel.key for kernel in found} <= {kernel.key for kernel in made}


def test_other_forms_are_compiled_for_the_backend_that_runs_them():
    forms = [CALLS, replace(CALLS, sinks=True), replace(CALLS, softcap=True), replace(CALLS, value_dim=16)]
    mla = replace(CALLS, head_dim=192, value_dim=128)
    made: list[Compilation] = []
    assert [precompile("sm90", calls, POLICY, made.append) for calls in (*forms, mla)] == ["triton"] * 4 + ["hopper"]
    attention = [kernel for kernel in made if kernel.kernel == "attention_kernel"]
    assert [kernel.cached for kernel in attention] == [False] * 5
    with pytest.raises(ValueError, match="value_dim"):
        precompile("sm90", replace(CALLS, value_dim=20), POLICY, made.append)


def test_keep_by_mass_is_compiled_too():
    names = ["pool_kernel", "keep_kernel", "attention_kernel"]
    assert list(dict.fromkeys(kernel.kernel for kernel in compilations(Mass()))) == names


def keep_kernels(policy):
    """Keys of the kernels that choose, in the order in which they are compiled."""
    return [kernel.key for kernel in compilations(policy) if kernel.kernel == "keep_kernel"]


def test_head_factors_are_compiled_whatever_layers_heads_and_numbers_they_have():
    single = keep_kernels(Mass())
    own = keep_kernels(Mass(head_factors=[[0.5, 1, 2, 4]]))
    # A rank of tensor parallelism has fewer heads than the file has factors.
    model = keep_kernels(Mass(head_factors=[[3.0] * 8] * 3))
    assert own == model
    assert set(own).isdisjoint(single)


def test_a_launch_with_head_factors_finds_what_was_compiled(monkeypatch):
    policy = Mass(spread=0, head_factors=[[0.5, 1, 2, 4]])  # variances on a CPU are fp32
    monkeypatch.setattr(mass, "architecture", lambda _: "sm80")
    made = compilations(policy)
    found: list[Compilation] = []
    with offline("sm80", found.append):
        select(real_call(policy), mass.select_by_mass)
    assert [(kernel.kernel, kernel.cached) for kernel in found] == [("pool_kernel", True), ("keep_kernel", True)]
    assert {kernel.key for kernel in found} <= {kernel.key for kernel in made}


@pytest.mark.newest_triton
def test_nothing_is_started_and_the_driver_comes_back():
    before = driver._active
    q = torch.full((1, 64, 2, 32), 7.0)
    with offline("sm80", lambda _: None):
        _, counts = select(Call(q, q, q, Mass(), 0.1, 64), mass.select_by_mass)
    assert counts.shape == (1, 2, 1)
    assert q.unique().tolist() == [7]
    assert driver._active is before


@pytest.mark.parametrize("name", ["sm75", "gfx942", "hopper", "sm"])
def test_other_architectures_are_refused(name):
    with pytest.raises(ValueError, match="arch: expected sm80"), offline(name, lambda _: None):
        pass
