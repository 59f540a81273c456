"""Which launch choice a card gets, and what the backend refuses where there is no GPU."""

import json
from importlib.resources import files

import pytest
import torch

from stem_attention.backends import Request
from stem_attention.backends.triton import BLOCK_SIZES, HEAD_DIMS, TritonBackend
from stem_attention.backends.triton.launch import architecture, attention_launch, backward_launch, has_tma, tile_launch

from .offline import record_attention

TABLE = json.loads(files("stem_attention.backends.triton").joinpath("launch.json").read_text())["attention"]
CARDS = [*TABLE, "sm86", "sm89", "sm103", "sm121", "sm200", "gfx90a", "gfx1100", "unknown"]


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("card", CARDS)
def test_every_card_has_a_choice_for_whatever_the_backend_supports(card, block_size, descriptors):
    for dim in HEAD_DIMS:
        choice = attention_launch(card, dim, block_size, descriptors)
        assert block_size % choice.tile == 0
        assert choice.warps in (1, 2, 4, 8, 16)
        assert choice.stages >= 1


@pytest.mark.parametrize("kernel", ["dq", "dkv"])
@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("card", CARDS)
def test_every_card_has_a_choice_for_gradients(card, block_size, descriptors, kernel):
    for dim in HEAD_DIMS:
        choice = backward_launch(kernel, card, dim, block_size, descriptors)
        assert block_size % choice.own == block_size % choice.tile == 0
        assert choice.warps in (4, 8)
        assert choice.stages >= 1
        assert not choice.tma or descriptors


def test_a_measured_card_gets_its_own_choice():
    for card, entries in TABLE.items():
        for entry in entries:
            choice = attention_launch(card, entry["max_head_dim"], entry["block_size"], entry["tma"])
            assert (choice.tile, choice.warps, choice.stages, choice.tma) == tuple(
                entry[name] for name in ("tile", "warps", "stages", "tma")
            )


def test_a_newer_card_gets_the_newest_choice_that_is_not_newer_than_it():
    measured = sorted(int(name[2:]) for name in TABLE if name.startswith("sm"))
    for number in (80, 86, 89, 90, 100, 103, 120, 121, 999):
        older = [n for n in measured if n <= number]
        nearest = f"sm{older[-1]}" if older else "default"
        assert attention_launch(f"sm{number}", 128, 128) == attention_launch(nearest, 128, 128)


@pytest.mark.parametrize("card", ["sm80", "sm89", "gfx942", "gfx1100", "unknown"])
def test_cards_without_a_copy_engine_are_not_told_to_use_it(card):
    assert not any(attention_launch(card, dim, size).tma for dim in HEAD_DIMS for size in BLOCK_SIZES)


def test_the_cpu_is_no_card():
    assert architecture(torch.device("cpu")) == "cpu"
    assert not has_tma("cpu")


def test_the_backend_says_that_it_needs_a_gpu():
    assert "needs a GPU" in TritonBackend().why_not(Request(torch.device("cpu"), torch.bfloat16, 128, 128))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_backend_says_that_torch_sees_none():
    assert "sees no GPU" in TritonBackend().why_not(Request(torch.device("cuda"), torch.bfloat16, 128, 128))


@pytest.mark.parametrize("kernel", ["score", "mass"])
@pytest.mark.parametrize("card", [*CARDS, "cpu"])
def test_every_card_has_a_choice_for_selection(card, kernel):
    choice = tile_launch(kernel, card)
    assert all(n & (n - 1) == 0 for n in (choice.rows, choice.columns, choice.inner, choice.warps))
    assert (choice.inner > 0) == (kernel == "score")


@pytest.mark.parametrize(("dim", "value_dim", "warps"), [(192, 16, 8), (256, 32, 8), (136, 16, 8), (128, 16, 4), (192, 64, 4)])
def test_hopper_cards_compute_narrow_values_beside_wide_keys_with_eight_warps(dim, value_dim, warps):
    """With four, Triton 3.6 gave wrong rows of packed batches (H100)."""
    assert record_attention("sm90", dim=dim, value_dim=value_dim, block_size=64, ragged=True).options["num_warps"] == warps
