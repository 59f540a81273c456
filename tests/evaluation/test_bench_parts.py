"""The parts of bench: the check, the peers, the clock."""

import math
from dataclasses import replace
from itertools import pairwise, permutations

import pytest
import torch
from torch.nn.attention import SDPBackend

from stem_attention import BlockSelection, StemConfig, block_sparse_attention, select_blocks
from stem_attention.evaluation import bench_peers
from stem_attention.evaluation.bench_checks import (
    Check,
    check,
    dense_problem,
    differing_blocks,
    rows_of,
    selection_problem,
    sparse_problem,
)
from stem_attention.evaluation.bench_peers import LeftOutError, admit, dense_peers
from stem_attention.evaluation.bench_shapes import MODELS, Shape, random_inputs
from stem_attention.evaluation.bench_timing import Times, round_count, time_in_turn

CPU = torch.device("cpu")
SHAPE = Shape(1000, 4, 2, 64, torch.float32, CPU)


FACTORS = StemConfig.mass(spread=0.0, share=1.0, head_factors=[[0.5, 3, 1.5, 2.5]])


@pytest.mark.parametrize("preset", [StemConfig(), StemConfig.paper(), StemConfig.angelslim(), FACTORS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_passes_on_what_the_library_computes(preset: StemConfig, dtype: torch.dtype) -> None:
    q, k, v = random_inputs(replace(SHAPE, dtype=dtype), seed=0)
    assert check(q, k, v, preset).problem(dtype) is None


def test_check_knows_each_heads_share() -> None:
    q, k, v = random_inputs(SHAPE, seed=0)
    kept = select_blocks(q, k, v, config=FACTORS).counts[0].sum(1)
    assert len(set(kept.tolist())) == 4  # or these factors show nothing
    assert all(check(q, k, v, FACTORS, seed).different_blocks == 0 for seed in range(8))  # whichever heads are drawn


@pytest.mark.parametrize(("error", "different"), [(1e-3, 0.0), (math.nan, 0.0), (0.0, 0.5), (0.0, math.nan)])
def test_check_refuses_wrong_results(error: float, different: float) -> None:
    assert Check(3, error, 1e-6, different).problem(torch.float32) is not None


def test_check_refuses_nan_in_the_inputs() -> None:
    q, k, v = random_inputs(SHAPE, seed=0)
    v[0, 0, 0, 0] = math.nan
    assert check(q, k, v, StemConfig()).problem(torch.float32) is not None


def test_dense_peer_is_right_or_reported() -> None:
    q, k, v = random_inputs(SHAPE, seed=0)
    ((name, peer),) = dense_peers(q, k, v).items()
    calls, left_out = admit({name: peer}, lambda out: dense_problem(out, q, k, v, 128))
    assert calls.keys() == {"dense SDPA"}
    assert left_out == {}
    shifted, reasons = admit({name: lambda: lambda: peer()().roll(1, 1)}, lambda out: dense_problem(out, q, k, v, 128))
    assert shifted == {}
    assert reasons[name].startswith("wrong: error")


def test_dense_attention_is_no_right_answer_to_a_sparse_question() -> None:
    q, k, v = random_inputs(SHAPE, seed=0)
    config = StemConfig(tail_blocks=0, ratio_short=0.1, sink_blocks=1, local_blocks=1)
    selection = select_blocks(q, k, v, config=config)
    ours = block_sparse_attention(q, k, v, selection)
    checked = check(q, k, v, config)
    assert sparse_problem(ours.clone(), ours, checked) is None
    assert sparse_problem(dense_peers(q, k, v)["dense SDPA"]()(), ours, checked) is not None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LeftOutError("not installed"), "not installed"),
        (torch.OutOfMemoryError("tried to allocate 1 TiB"), "out of memory"),
        (RuntimeError("no kernel\nfor this"), "cannot run: RuntimeError: no kernel"),
        (AssertionError(), "cannot run: AssertionError: no message"),
    ],
)
def test_a_peer_that_fails_is_left_out_with_its_reason(error: Exception, reason: str) -> None:
    def peer() -> torch.Tensor:
        raise error

    assert admit({"peer": lambda: peer}, lambda out: None) == ({}, {"peer": reason})


def test_named_kernels_are_asked_for_by_name() -> None:
    q, k, v = random_inputs(SHAPE, seed=0)
    flash = bench_peers._sdpa_by(SDPBackend.FLASH_ATTENTION, q, k, v)
    assert dense_problem(flash, q, k, v, 128) is None
    with pytest.raises(RuntimeError, match="kernel|backend"):  # the CPU has no cuDNN
        bench_peers._sdpa_by(SDPBackend.CUDNN_ATTENTION, q, k, v)


@pytest.mark.skipif(bench_peers.importlib.util.find_spec("flash_attn") is not None, reason="FlashAttention is installed")
def test_flash_attention_4_says_when_it_is_not_installed() -> None:
    q, k, v = random_inputs(SHAPE, seed=0)
    peer = {"FlashAttention-4": lambda: bench_peers._flash_attention_4(q, k, v)}
    assert admit(peer, lambda out: None)[1] == {"FlashAttention-4": "not installed"}


def test_differing_blocks_counts_what_the_other_does_not_keep() -> None:
    ours = BlockSelection.from_lists([[[[0], [0, 1], [0, 2], [0, 2, 3]]]], block_size=16, q_len=60, kv_len=60)
    theirs = BlockSelection.from_lists([[[[0], [0, 1], [1, 2], [0, 1, 3]]]], block_size=16, q_len=60, kv_len=60)
    assert differing_blocks(ours, ours) == 0
    assert differing_blocks(ours, theirs) == 2 / 8
    assert selection_problem(theirs, ours) is not None


def test_rows_of_a_selection_are_those_rows() -> None:
    selection = select_blocks(*random_inputs(SHAPE, seed=0))
    part = rows_of(selection, 5, 8)
    part.validate()
    assert torch.equal(part.to_mask(), selection.to_mask()[:, :, 5:8])


def orders(names: str, repeats: int) -> tuple[list[str], list[int], dict[str, Times]]:
    """Who ran in each round, how many calls there had been after each, and the times."""
    order: list[str] = []
    after: list[int] = []
    calls = {name: (lambda name=name: order.append(name)) for name in names}
    times = time_in_turn(calls, CPU, repeats, lambda: after.append(len(order)))
    width = len(names)
    return ["".join(order[at : at + width]) for at in range(0, len(order), width)], after, times


def test_the_clock_runs_everyone_once_a_round() -> None:
    rounds, after, times = orders("abc", 3)
    assert [sorted(one) for one in rounds] == [["a", "b", "c"]] * round_count(CPU, 3)
    assert after == [3, 6, 9, 12]
    assert {name: len(taken.work) for name, taken in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert not any(taken.launch for taken in times.values())


def test_everyone_follows_everyone_else_in_an_order_that_is_the_same_in_every_run() -> None:
    """Who always followed the selection found a rested card, and who always followed dense attention a hot one."""
    rounds, *_ = orders("abcd", 30)
    assert {pair for one in rounds for pair in pairwise(one)} == set(permutations("abcd", 2))
    assert {one[0] for one in rounds} == set("abcd")
    assert orders("abcd", 30)[0] == rounds


def test_same_seed_same_inputs() -> None:
    first, again, other = (random_inputs(SHAPE, seed) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert [x.shape for x in first] == [(1, 1000, 4, 64), (1, 1000, 2, 64), (1, 1000, 2, 64)]


def test_models_have_whole_groups_of_heads() -> None:
    assert all(model.heads % model.kv_heads == 0 for model in MODELS.values())
