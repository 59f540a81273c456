"""Every row of every head and sequence is some ticket's task, once, and the backend says what it cannot do."""

from functools import reduce
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stem_attention.backends import Request, explain_request
from stem_attention.backends.hopper import HopperBackend, schedule
from stem_attention.backends.hopper.attention import can_copy
from stem_attention.backends.hopper.schedule import blocks_before, keys_of, mask_of, place_of, slot_of, task_of
from stem_attention.backends.triton.layout import describable
from stem_attention.call import Call, PackedBatch
from stem_attention.policies import Dense


class Numbers(list):
    """Borders that the schedule's pointer arithmetic and loads work on."""

    def __add__(self, offset):
        return Numbers(self[offset:])


class Language:
    """What the schedule asks of Triton's language, on plain numbers."""

    constexpr = schedule.gl.constexpr
    int32 = uint32 = torch.int64
    minimum, maximum = min, max

    @staticmethod
    def where(condition, a, b):
        return a if condition else b

    @staticmethod
    def load(pointer, mask=True, other=None):
        return pointer[0] if mask else other


@pytest.fixture
def plain(monkeypatch):
    """Inside, the schedule's functions compute with plain numbers."""
    monkeypatch.setattr(schedule, "gl", Language)
    monkeypatch.setattr(schedule, "_block_of", schedule._block_of.fn)


def tasks(lengths, heads, block, heavy, abreast, ragged, each=1):
    """``(sequence, head, row)`` of every ticket's rows, ``each`` of them or fewer, in order, by the kernel's own functions."""
    cu_q, cu_k = (Numbers([sum(x[:i]) for i in range(len(x) + 1)]) for x in zip(*lengths, strict=True))
    rows = max(-(-k // block) - (k - q) // block if q else 0 for q, k in lengths)
    count, heavy = -(-rows // each), -(-min(heavy, rows) // each)
    batch = (cu_q, cu_k, *lengths[0], len(lengths), heads, rows, heavy, max(1, count - heavy), abreast)
    found = []
    for ticket in range(len(lengths) * heads * count):
        z, head, from_end = task_of.fn(ticket, batch)
        _, row, *_ = place_of.fn(z, from_end, batch, block, ragged, each)
        found += [(z, head, row - i) for i in range(each) if row - i >= 0]
    return found


@pytest.mark.parametrize("abreast", [1, 2, 4])
@pytest.mark.parametrize("heavy", [0, 2, 99])
@pytest.mark.parametrize(("block", "each"), [(64, 1), (64, 2), (128, 1)])
@pytest.mark.parametrize("lengths", [
    [(2000, 2000)], [(700, 1000)] * 3, [(1, 1)], [(300, 300), (1, 4097), (0, 900), (2500, 2500), (1300, 3011), (7, 7)],
], ids=["one", "even", "smallest", "ragged"])  # fmt: skip
def test_every_row_is_done_once(lengths, block, each, heavy, abreast, plain):
    found = tasks(lengths, 4, block, heavy, abreast, len(set(lengths)) > 1, each)
    expected = {
        (z, head, row)
        for z, (q, k) in enumerate(lengths) if q
        for head in range(4)
        for row in range((k - 1) // block - (k - q) // block + 1)
    }  # fmt: skip
    assert len(found) == len(set(found))
    assert set(found) == expected


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("entries", range(1, 8))
@pytest.mark.parametrize(("block_size", "tile"), [(64, 64), (128, 64), (128, 128)])
def test_a_row_reads_the_keys_of_its_list_once_and_the_diagonal_first(block_size, tile, entries, whole, plain):
    listed = list(range(entries)) if whole else [3 * x + 1 for x in range(entries)]
    block = listed[-1]
    lists = Numbers([77777] * 5 + listed[:-1] + [99999] * 3)  # nothing behind the list, nor its last entry, may be followed
    parts = block_size // tile
    firsts = [keys_of.fn(i, lists, 5, entries, whole, block, block_size, tile) for i in range(entries * parts)]
    assert firsts == [x * block_size + part * tile for x in reversed(listed) for part in range(parts)]


class Lanes(np.ndarray):
    """Numbers of a warp's threads."""

    type = SimpleNamespace(layout=None)


class LaneLanguage(Language):
    """The same on a number for every thread."""

    int32 = np.int32
    minimum, maximum = np.minimum, np.maximum

    @staticmethod
    def where(condition, a, b):
        return np.where(condition, a, b).view(Lanes)

    @staticmethod
    def arange(start, end, layout):
        return np.arange(start, end).view(Lanes)

    @staticmethod
    def full(shape, value, dtype, layout):
        return np.full(shape, value, np.int64).view(Lanes)

    @staticmethod
    def load(pointer, mask=True, other=None):
        mask, other = (np.broadcast_to(x, pointer.shape) for x in (mask, other))
        return np.array([LISTS[at] if kept else x for at, kept, x in zip(pointer, mask, other, strict=True)]).view(Lanes)

    @staticmethod
    def reduce(lanes, axis, combine):
        return int(reduce(lambda a, b: a | b, lanes.tolist()))


LISTS: dict[int, int] = {}


def merged(rows):
    """What the producer fetches for two rows ``(entries, whole)``: ``(block, kept by the first, by the second)`` in order."""
    left = [0 if row is None else len(row[0]) for row in rows]
    found = []
    while any(left):
        blocks = []
        for i, row in enumerate(rows):
            listed, whole = row or ([], False)
            last = listed[-1] if listed else -1
            blocks.append(blocks_before.fn(left[i], np.int64(1000 * i), 0, len(listed), whole, last, None))
        top = max(int(x.max()) for x in blocks)
        masks = [mask_of.fn(x, top) for x in blocks]
        left = [x - mask.bit_count() for x, mask in zip(left, masks, strict=True)]
        found += [(top - i, masks[0] >> i & 1, masks[1] >> i & 1) for i in range(32) if (masks[0] | masks[1]) >> i & 1]
    return found


@pytest.mark.parametrize("rows", [
    (([0, 5, 6, 70], False), ([0, 6, 7, 71], False)),
    (([40], False), (list(range(42)), True)),
    ((list(range(100)), True), (list(range(101)), True)),
    ((list(range(0, 200, 2)), False), (list(range(1, 202, 2)), False)),
    (None, ([0], True)),
    (None, ([0, 3], False)),
], ids=["few", "one-beside-all", "all", "none-shared", "first", "alone"])  # fmt: skip
def test_two_lists_are_merged_whole_in_order_and_told_apart(rows, plain, monkeypatch):
    monkeypatch.setattr(schedule, "gl", LaneLanguage)
    LISTS.clear()
    for i, row in enumerate(rows):
        # Nothing behind a list, nor its last entry, may be followed, and of a row that keeps everything nothing at all.
        entries = [] if row is None or row[1] else row[0][:-1]
        LISTS.update({1000 * i + at: block for at, block in enumerate(entries)})
    found = merged(rows)
    kept = [set() if row is None else set(row[0]) for row in rows]
    assert found == [(block, block in kept[0], block in kept[1]) for block in sorted(kept[0] | kept[1], reverse=True)]


def test_a_tile_lies_in_the_ring_of_those_who_keep_it(plain):
    numbers = torch.arange(6)
    places = {kind: [tuple(map(int, slot_of.fn(kind == 2, n, n, kind, 2))) for n in numbers] for kind in range(3)}
    assert places[2] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 0), (1, 0)]
    assert places[0] == [(slot + 2, parity) for slot, parity in places[2]]
    assert places[1] == [(slot + 4, parity) for slot, parity in places[2]]


def test_heavy_rows_of_all_heads_start_first(plain):
    found = tasks([(2000, 2000)], 4, 128, 2, 2, False)
    assert {row for _, _, row in found[:8]} == {15, 14}
    assert found[-1][2] == 0


def test_heads_whose_keys_fit_the_cache_go_side_by_side(plain):
    found = tasks([(2000, 2000)], 4, 128, 1, 2, False)[4:]
    assert found == [(0, first + head, row) for first in (0, 2) for row in range(14, -1, -1) for head in range(2)]


@pytest.mark.parametrize(("changed", "reason"), [
    ({"device": torch.device("cpu")}, "needs a GPU"),
    ({"dtype": torch.float32}, "bfloat16 and float16"),
    ({"head_dim": 96}, "head_dim must be"),
    ({"value_dim": 64}, "value_dim must be 128"),
    ({"head_dim": 192}, "value_dim must be 128"),
    ({"block_size": 32}, "block_size must be"),
])  # fmt: skip
def test_the_backend_says_what_it_cannot_do(changed, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    asked = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": 128, "block_size": 128}
    assert HopperBackend().why_not(Request(**asked)) is None
    assert HopperBackend().why_not(Request(**{**asked, "head_dim": 192, "value_dim": 128})) is None
    assert reason in HopperBackend().why_not(Request(**{**asked, **changed}))


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_cards_are_told_so(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert "9.0" in HopperBackend().why_not(Request(torch.device("cuda"), torch.bfloat16, 128, 128))


def test_which_kernel_runs_keys_beside_other_values(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    pairs = {(192, 128): "hopper", (192, 192): "triton", (176, 128): "triton", (256, 40): "triton", (16, 16): "triton"}
    pairs |= {(192, 32): "torch", (128, 16): "torch", (200, 12): "torch"}
    for (head_dim, value_dim), kernel in pairs.items():
        assert explain_request(Request(torch.device("cuda"), torch.bfloat16, head_dim, 64, value_dim)).chosen == kernel


def takes(q, k, v, page_table=None):
    batch = None if page_table is None else PackedBatch.plan([64], [64], page_table=page_table, device=q.device)
    return can_copy(Call(q, k, v, Dense(64), 0.1, 64, batch))


def test_what_the_copy_engine_takes():
    q, table = torch.zeros(1, 64, 4, 64, dtype=torch.bfloat16), torch.zeros(1, 2, dtype=torch.int32)
    assert takes(q, q, q)
    assert takes(q.transpose(1, 2), q, q, table)
    assert takes(q, torch.zeros(9, 96, 2, 64, dtype=torch.bfloat16), q, table)
    assert not takes(q, torch.zeros(9, 48, 2, 64, dtype=torch.bfloat16), q, table)
    assert not takes(q, torch.zeros(1, 64, 4, 67, dtype=torch.bfloat16)[..., :64], q)
    assert not takes(q, q, torch.zeros(1, 64, 4, 72, dtype=torch.bfloat16)[..., 1:65])


def test_neither_kernel_describes_expanded_tensors_to_the_copy_engine():
    """The driver asks for strides that are multiples of 16; that it takes 0 for one is nowhere promised."""
    q = torch.zeros(2, 64, 4, 64, dtype=torch.bfloat16)
    shared = q[:1].expand(2, -1, -1, -1)
    assert describable(q)
    assert not describable(shared)
    assert not takes(q, shared, q)


def test_explain_says_which_calls_run_portably_after_all(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    explanation = explain_request(Request(torch.device("cuda"), torch.bfloat16, 128, 128))
    assert explanation.chosen == "hopper"
    assert "strides of 0, run portably" in explanation.reasons["hopper"]
    assert "portably" not in explanation.reasons["triton"]
