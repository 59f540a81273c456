"""The parts of bench: the check, the peers, the clock."""

import math
from functools import partial
from itertools import pairwise, permutations

import pytest
import torch

from stem_attention import BlockSelection, Mass, Stem, select_blocks
from stem_attention.testing import make_qkv
from stem_evals.bench.checks import Check, WrongResultError, check, dense_problem, differing_blocks
from stem_evals.bench.peers import LeftOutError, admit, dense_peers
from stem_evals.bench.timing import Times, medians, round_count, time_in_turn

CPU = torch.device("cpu")
inputs = partial(make_qkv, 1, 1000, 1000, 4, 2, 64)
FACTORS = Mass(spread=0.0, share=1.0, head_factors=[[0.5, 3, 1.5, 2.5]])


@pytest.mark.parametrize("policy", [Mass(), Stem(), Stem.paper(), Stem.angelslim(), FACTORS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_passes_on_what_the_library_computes(policy, dtype):
    q, k, v = inputs(dtype)
    check(q, k, v, policy).confirm(dtype, "1000 tokens")


def test_check_knows_each_heads_share():
    q, k, v = inputs()
    kept = select_blocks(q, k, v, policy=FACTORS).counts[0].sum(1)
    assert len(set(kept.tolist())) == 4  # or these factors show nothing
    assert all(check(q, k, v, FACTORS, seed).different_blocks == 0 for seed in range(8))  # whichever rows are drawn


@pytest.mark.parametrize(("error", "different"), [(1e-3, 0.0), (math.nan, 0.0), (0.0, 0.5), (0.0, math.nan)])
def test_check_refuses_wrong_results(error, different):
    with pytest.raises(WrongResultError, match="wrong result at 8 tokens"):
        Check(3, error, 1e-6, different).confirm(torch.float32, "8 tokens")
    q, k, v = inputs()
    v[0, 0, 0, 0] = math.nan
    assert check(q, k, v, Mass()).problem(torch.float32) is not None


def test_dense_peer_is_right_or_reported():
    q, k, v = inputs()
    ((name, peer),) = dense_peers(q, k, v).items()
    calls, left_out = admit({name: peer}, lambda out: dense_problem(out, q, k, v, 128))
    assert (list(calls), left_out) == (["dense SDPA"], {})
    shifted, reasons = admit({name: lambda: lambda: peer()().roll(1, 1)}, lambda out: dense_problem(out, q, k, v, 128))
    assert shifted == {}
    assert reasons[name].startswith("wrong: error")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LeftOutError("not installed"), "not installed"),
        (torch.OutOfMemoryError("tried to allocate 1 TiB"), "out of memory"),
        (RuntimeError("no kernel\nfor this"), "cannot run: RuntimeError: no kernel"),
        (AssertionError(), "cannot run: AssertionError: no message"),
    ],
)
def test_a_peer_that_fails_is_left_out_with_its_reason(error, reason):
    def peer():
        raise error

    assert admit({"peer": lambda: peer}, lambda out: None) == ({}, {"peer": reason})


def test_differing_blocks_counts_what_the_other_does_not_keep():
    ours = BlockSelection.from_lists([[[[0], [0, 1], [0, 2], [0, 2, 3]]]], block_size=16, q_len=60, kv_len=60)
    theirs = BlockSelection.from_lists([[[[0], [0, 1], [1, 2], [0, 1, 3]]]], block_size=16, q_len=60, kv_len=60)
    assert differing_blocks(ours, ours) == 0
    assert differing_blocks(ours, theirs) == 2 / 8


def orders(names, repeats):
    """Who ran in each round, how many calls there had been after each, and the times."""
    order, after = [], []
    calls = {name: (lambda name=name: order.append(name)) for name in names}
    times = time_in_turn(calls, CPU, repeats, lambda: after.append(len(order)))
    width = len(names)
    return ["".join(order[at : at + width]) for at in range(0, len(order), width)], after, times


def test_the_clock_runs_everyone_once_a_round():
    rounds, after, times = orders("abc", 3)
    assert [sorted(one) for one in rounds] == [["a", "b", "c"]] * round_count(CPU, 3)
    assert after == [3, 6, 9, 12]
    assert {name: len(taken.work) for name, taken in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert not any(taken.launch for taken in times.values())
    assert medians({"a": Times([3.0, 1.0, 2.0])}) == {"a": 2.0}


def test_everyone_follows_everyone_else_in_an_order_that_is_the_same_in_every_run():
    """Who always followed the selection found a rested card, and who always followed dense attention a hot one."""
    rounds, *_ = orders("abcd", 30)
    assert {pair for one in rounds for pair in pairwise(one)} == set(permutations("abcd", 2))
    assert {one[0] for one in rounds} == set("abcd")
    assert orders("abcd", 30)[0] == rounds
