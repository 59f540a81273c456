"""What judges the results of problems sees wrong ones: each planted fault is found. Of attention: tests/test_testing.py."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase
from tests.rigs import INTERPRETED, Rig

import stem_attention as sa
from stem_attention.backends.torch import TorchBackend
from stem_attention.policies import SinkWindow, policy_from_json
from stem_attention.testing import structured_qkv

from .conftest import Memory, Trials, space_of
from .judge import assert_selected
from .poison import new_memory_is_nan, surrounded, undisturbed
from .strategies import Space
from .test_fuzz import a_prompt_in_chunks, any_call, any_packed_batch, attention_over_any_lists, gradients_over_any_lists

pytestmark = pytest.mark.skipif(INTERPRETED, reason="plants its faults in the torch backend")

RIG = Rig("torch")
STEM, MASS = RIG.stem(), RIG.mass()
Q, K, V = structured_qkv(1, 300, 300, 2, 1, 16)


def refused(mask, policy):
    selection = sa.BlockSelection.from_mask(mask, block_size=16, q_len=300, kv_len=300)
    with pytest.raises(AssertionError, match="row"):
        assert_selected(selection, Q, K, V, policy, 300)


@pytest.mark.parametrize("policy", [STEM, MASS, replace(MASS, head_factors=((0.5, 4.0),)), SinkWindow(1, 2, 16)])
def test_a_block_too_many_one_too_few_and_another_one_are_seen(policy):
    selection = sa.select_blocks(Q, K, V, policy=policy)
    assert_selected(selection, Q, K, V, policy, 300)
    mask, free = selection.to_mask(), torch.ones(19, 19, dtype=torch.bool).tril(-1)
    kept, dropped = (mask & free).nonzero().tolist(), (~mask & free).nonzero().tolist()
    middle = [0, 0, 12]  # of this row, behind the sink, the first block of either kind
    other = [next(at for at in blocks if at[:3] == middle and at[3]) for blocks in (kept, dropped)]
    for blocks in ([kept[0]], [kept[-1]], [dropped[0]], [dropped[-1]], other):  # a sink, one of the tail's or the last row's
        wrong = mask.clone()
        for at in blocks:
            wrong[tuple(at)] ^= True
        refused(wrong, policy)


def test_poison_is_where_it_should_be():
    view = surrounded(Q)
    assert torch.equal(view, Q)
    assert torch.as_strided(view, (1,), (1,), view.storage_offset() - 1).isnan()
    assert torch.as_strided(view, (1,), (1,), view.storage_offset() + 16).isnan()
    with new_memory_is_nan():
        assert torch.empty(5).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(AssertionError, match="input"), undisturbed(view):
        view[0, 0] = 1


def tried(holds, packed=False, rig=RIG):
    phases = Phase.generate, Phase.shrink  # to explain a failure takes long
    Trials(rig, space_of(rig, 0, soaking=False), 12, "planted", phases=phases)(holds, packed)


@pytest.fixture
def plant(monkeypatch):
    """Plants a fault in what the torch backend returns."""

    def plant(fault):
        honest = TorchBackend.attend

        def faulty(*arguments):
            result = honest(*arguments)
            fault(*result)
            return result

        monkeypatch.setattr(TorchBackend, "attend", faulty)

    return plant


@pytest.mark.parametrize("promise", [attention_over_any_lists, any_call, a_prompt_in_chunks, any_packed_batch])
def test_a_backend_that_raises_is_found_and_the_problem_shrinks(promise, plant):
    def fault(out, lse):
        raise IndexError("planted")

    plant(fault)
    with pytest.raises(IndexError, match="planted") as found:
        tried(promise, packed=promise is any_packed_batch)
    told = "".join("".join(found.value.__notes__).split())
    assert re.search(r"problem=Problem\(lengths=\(\(1?\d,1?\d\),\),kv_heads=1,group=1,head_dim=16,", told), told


def test_numbers_that_are_off_by_a_hundredth_are_found(plant):
    plant(lambda out, lse: out[:, -1].mul_(1.01))
    with pytest.raises(AssertionError, match="the worst row is off"):
        tried(any_call)


@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_a_gradient_that_is_off_by_a_hundredth_is_found(which, monkeypatch):
    honest = TorchBackend.backward

    def faulty(*arguments):
        results = honest(*arguments)
        results[which][:, -1].mul_(1.01)
        return results

    monkeypatch.setattr(TorchBackend, "backward", faulty)
    with pytest.raises(AssertionError, match="the gradient of . is off"):
        tried(gradients_over_any_lists)


def test_growing_memory_is_found_the_second_time():
    kept, memory = [], Memory(every=1, allowed=8 << 20)
    trials = Trials(RIG, space_of(RIG, 0, soaking=False), 12, "kept", memory)
    trials(lambda problem, rig: None)
    assert memory.problems == len(memory.samples) > 0
    with pytest.raises(AssertionError, match="the process grew"):
        trials(lambda problem, rig: kept.append(torch.ones(1 << 20)))


def test_growing_memory_is_found():
    memory = Memory(every=1)
    memory.look()
    (process, gpu), mib = memory.samples[0], 1 << 20
    assert process > 64 * mib
    memory.samples = [(process + i % 10 * mib, gpu) for i in range(90)]
    memory.check()
    for grown in ((5 * mib, 0), (0, 5 * mib)):
        memory.samples = [(process + i * grown[0], gpu + i * grown[1]) for i in range(90)]
        with pytest.raises(AssertionError, match="grew by 300 MiB"):
            memory.check()


@pytest.mark.parametrize("space", [Space(), space_of(Rig("hopper", "cuda"), 0, soaking=True)], ids=["any", "gpu"])
def test_problems_are_of_every_kind(space):
    """Each of these is drawn, sooner or later, and a policy survives JSON."""
    found = []
    Trials(RIG, space, 400, "kinds")(lambda problem, rig: found.append(problem), packed=True)
    for problem in found:
        assert policy_from_json(problem.policy.to_json()) == problem.policy
        problem.policy.check_heads(problem.heads)
    assert len({problem.policy.name for problem in found}) > 6
    for kind, wanted in {
        "one share": lambda problem: problem.policy.name == "mass" and problem.policy.head_factors is None,
        "head factors": lambda problem: problem.policy.name == "mass" and problem.policy.head_factors is not None,
        "pages": lambda problem: problem.page_size and problem.prompt_extra,
        "nothing to do": lambda problem: (0, 40) in problem.lengths,
        "few queries": lambda problem: any(0 < q_len < 200 and kv_len > 1000 for q_len, kv_len in problem.lengths),
        "many blocks": lambda problem: any(
            q_len == kv_len > 3 * problem.policy.block_size for q_len, kv_len in problem.lengths
        ),
    }.items():
        assert any(map(wanted, found)), kind
