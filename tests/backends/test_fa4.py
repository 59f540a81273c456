"""What of the fa4 backend runs without a GPU: what it takes, what it says of the rest, and what it hands over."""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from time import sleep
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from stem_attention import BlockSelection, explain
from stem_attention.backends import Request, explain_request, fa4
from stem_attention.backends.fa4 import FA4Backend, trial
from stem_attention.backends.fa4.lists import shared_lists
from stem_attention.backends.torch import TorchBackend
from stem_attention.backends.triton import TritonBackend
from stem_attention.call import Call, PackedBatch
from stem_attention.policies import Dense
from stem_attention.testing import exact_attention, random_selection, structured_qkv, token_mask

CUDA = torch.device("cuda")


def card(monkeypatch, major, minor=0):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(fa4, "version", lambda name: "4.0.0")
    pytest.importorskip("triton")


def reason(dtype=torch.bfloat16, dim=128, block=64):
    return FA4Backend().why_not(Request(CUDA, dtype, dim, block))


def test_without_the_package_it_says_how_to_get_it(monkeypatch):
    def missing(name):
        raise fa4.PackageNotFoundError(name)

    monkeypatch.setattr(fa4, "version", missing)
    assert "pip install flash-attn-4" in reason()
    assert "flash-attn-4" in explain().reasons["fa4"]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("major", "takes"), [(8, False), (9, True), (10, True), (11, True), (12, False)])
def test_it_takes_the_cards_whose_kernels_read_lists(monkeypatch, major, takes):
    card(monkeypatch, major)
    assert (reason() is None) == takes
    assert takes or "compute capability 9, 10 and 11" in reason()


@pytest.mark.usefixtures("installed")
def test_it_names_what_else_it_does_not_take(monkeypatch):
    card(monkeypatch, 9)
    assert "head_dim" in reason(dim=136)
    assert "head_dim" in reason(dim=36)
    assert "block_size" in reason(block=32)
    assert "float32" in reason(dtype=torch.float32)
    assert [reason(dim=dim, block=block) for dim in (16, 96, 128) for block in (64, 128)] == [None] * 6


@pytest.mark.usefixtures("installed")
def test_only_its_name_gets_it_on_hopper(monkeypatch):
    card(monkeypatch, 9)
    request = Request(CUDA, torch.bfloat16, 96, 64)  # which the hopper backend does not take
    auto = explain_request(request)
    assert auto.chosen == "triton"
    assert "only by name" in auto.reasons["fa4"]
    named = explain_request(request, "fa4")
    assert named.chosen == "fa4"
    assert "run portably" in named.reasons["fa4"]
    assert named.path[-1].endswith("select_by_mass and stem_attention.backends.fa4.attention.attend")


@pytest.fixture
def kernel(monkeypatch):
    """Stand in for FlashAttention-4's kernel and for the portable one, on a CPU; what it returns is changed by a test."""
    stand_in, torchs = ModuleType("stem_attention.backends.fa4.attention"), TorchBackend()
    stand_in.attend = torchs.attend
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    monkeypatch.setattr(trial, "TritonBackend", TorchBackend)
    trial._answer.cache_clear()
    yield stand_in
    trial._answer.cache_clear()


def off(attend, by):
    def wrong(call, selection):
        out, lse = attend(call, selection)
        out[:, 500:600] += by
        return out, lse

    return wrong


def fails(call, selection):
    raise RuntimeError("no kernel for this card")


CPU = Request(torch.device("cpu"), torch.bfloat16, 64, 64)


def test_a_kernel_that_is_right_passes_its_trial(kernel):
    assert trial.obstacle(CPU) is None


@pytest.mark.parametrize("by", [0.1, float("nan")])
def test_a_kernel_that_is_wrong_fails_its_trial(kernel, by):
    kernel.attend = off(kernel.attend, by)
    assert "off by" in trial.obstacle(CPU)


def test_a_kernel_that_raises_fails_its_trial(kernel):
    kernel.attend = fails
    assert "no kernel for this card" in trial.obstacle(CPU)


def test_the_trial_drops_blocks(kernel, monkeypatch):
    seen = []
    kernel.attend = lambda call, selection: (seen.append(selection.density()), TorchBackend().attend(call, selection))[1]
    for block_size in (64, 128):
        trial.obstacle(replace(CPU, block_size=block_size))
    assert len(seen) == 2
    assert max(seen) < 0.9


def in_vmap(ask):
    said = []
    torch.vmap(lambda x: (said.append(ask()), x)[1])(torch.ones(2))
    return said[0]


def in_make_fx(ask):
    said = []
    graph = make_fx(lambda x: (said.append(ask()), x)[1])(torch.ones(2)).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "output"]
    return said[0]


def within(*contexts):
    def asked(ask):
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            return ask()

    return asked


@pytest.mark.parametrize(
    "asked",
    [
        in_vmap,
        in_make_fx,
        within(FakeTensorMode()),
        within(torch.autocast("cpu", torch.bfloat16)),
        within(torch.inference_mode()),
        within(torch.device("meta")),
    ],
    ids=["vmap", "make_fx", "fake", "autocast", "inference", "meta"],
)
def test_what_the_caller_is_in_does_not_reach_the_trial(kernel, asked):
    state = torch.get_rng_state()
    assert asked(lambda: trial.obstacle(CPU)) is None
    trial._answer.cache_clear()
    kernel.attend = off(kernel.attend, 0.1)
    assert "off by" in asked(lambda: trial.obstacle(CPU))
    assert torch.equal(torch.get_rng_state(), state)


def test_threads_try_one_after_the_other(kernel):
    """A package that compiles at its first call need not take two at once; and one trial answers all."""
    inside, most, attend = [], [], kernel.attend

    def counted(call, selection):
        inside.append(call)
        most.append(len(inside))
        sleep(0.05)
        inside.pop()
        return attend(call, selection)

    kernel.attend = counted
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(trial.obstacle, [CPU, CPU, replace(CPU, block_size=128)])) == [None] * 3
    assert max(most) == 1
    assert len(most) == 2


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("verdict", [None, "off; only by name"])
def test_auto_takes_it_on_blackwell_once_it_has_passed(monkeypatch, verdict):
    asked = []
    card(monkeypatch, 10)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(trial, "obstacle", lambda request: (asked.append(request), verdict)[1])
    for device, value_dim in ((CUDA, None), (torch.device("cuda:0"), 64)):  # one card, and one kernel to try
        found = explain_request(Request(device, torch.bfloat16, 96, 64, value_dim))
        assert found.chosen == ("fa4" if verdict is None else "triton")
        assert verdict is None or found.reasons["fa4"] == verdict
    assert len(set(asked)) == 1


@pytest.mark.usefixtures("installed")
def test_nothing_is_tried_while_a_graph_is_captured_and_explain_keeps_to_what_calls_run(monkeypatch):
    card(monkeypatch, 10)
    monkeypatch.setattr(trial, "_try", lambda request: None)
    request = Request(torch.device("cuda:0"), torch.bfloat16, 96, 64)
    trial._answer.cache_clear()
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda here=capturing: here)
        found = explain_request(request)
        assert found.chosen == "triton"
        assert "only by name" in found.reasons["fa4"]
    trial._answer.cache_clear()
    assert explain_request(request).chosen == "fa4"  # or this example shows nothing
    trial._answer.cache_clear()


def test_lists_too_long_to_share_go_to_the_portable_kernel(monkeypatch):
    monkeypatch.setattr(fa4, "_MOST_PAIRS", 4 * 2 * 3)
    assert fa4._takes(call(), 64)
    monkeypatch.setattr(fa4, "_MOST_PAIRS", 4 * 2 * 3 - 1)
    assert not fa4._takes(call(), 64)


@pytest.mark.parametrize(("q_len", "kv_len"), [(64, 64), (150, 150), (70, 134), (33, 97), (1, 65), (40, 200), (257, 513)])
@pytest.mark.parametrize("size", [16, 32])
def test_shared_lists_and_their_mask_are_the_selection(q_len, kv_len, size):
    """In tiles of 64 queries by 32 keys: full ones see all keys, partial ones what the lookup and causality leave."""
    selection = random_selection(2, 2, q_len, kv_len, size, density=0.6)
    fields, kept = shared_lists(selection, 64, 32)
    assert fields["block_size"] == (64, 32)
    query, key = torch.arange(q_len)[:, None], torch.arange(kv_len)
    looked_up = kept.bool()[:, :, query // size, key // size] & (key <= query + kv_len - q_len)
    shown = torch.zeros(2, 2, q_len, kv_len, dtype=torch.bool)
    for b, h, row in torch.cartesian_prod(*map(torch.arange, fields["mask_block_cnt"].shape)).tolist():
        listed = []
        for kind in ("full", "mask"):
            ids = fields[f"{kind}_block_idx"][b, h, row, : fields[f"{kind}_block_cnt"][b, h, row]].tolist()
            assert ids == sorted(ids)
            listed += ids
            for tile in ids:
                here = (query // 64 == row) & (key // 32 == tile)
                shown[b, h] |= here if kind == "full" else here & looked_up[b, h]
        assert len(set(listed)) == len(listed)
    assert torch.equal(shown, token_mask(selection))


def call(q_len=128, kv_len=192, block_size=64, dim=16, **options):
    q, k, v = structured_qkv(1, q_len, kv_len, 4, 2, dim)
    return Call(q, k, v, Dense(block_size), dim**-0.5, kv_len, **options)


def packed():
    q, k, v = (x[0] for x in structured_qkv(1, 128, 128, 4, 2, 16))
    batch = PackedBatch.plan([128], [128], device=torch.device("cpu"))
    return Call(q, k, v, Dense(64), 0.25, batch=batch)


@pytest.mark.parametrize(
    ("one", "theirs"),
    [(call(), True), (call(100, 164), True), (call(100, 165), False), (call(128, 192, 128), False), (packed(), False)],
)
def test_calls_that_it_does_not_take_go_to_the_portable_kernel(monkeypatch, one, theirs):
    """Rows that begin elsewhere and packed batches; both by attend() and by what runs a call."""
    monkeypatch.setattr(TritonBackend, "attend", lambda self, *_: "portable")
    monkeypatch.setattr(TritonBackend, "runner", lambda self, *_: "portable")
    monkeypatch.setitem(sys.modules, "stem_attention.backends.fa4.attention", SimpleNamespace(attend=lambda *_: "theirs"))
    backend = FA4Backend()
    selection = SimpleNamespace(block_size=one.policy.block_size)
    assert backend.attend(one, selection) == ("theirs" if theirs else "portable")
    assert (backend.runner(one) == backend.forward) == theirs


@pytest.fixture
def fake_fa4(monkeypatch):
    """FlashAttention-4 as its documentation has it, computed in fp64 from what it is handed."""

    def flash_attn_func(q, k, v, softmax_scale, mask_mod, return_lse, block_sparse_tensors):
        tensors, size = block_sparse_tensors, block_sparse_tensors.block_size[0]
        lengths = SimpleNamespace(seqlen_q=q.shape[1], seqlen_k=k.shape[1])
        query, key = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
        mask = torch.zeros(q.shape[0], q.shape[2], q.shape[1], k.shape[1], dtype=torch.bool)
        for b, h, row in torch.cartesian_prod(*map(torch.arange, tensors.mask_block_cnt.shape)).tolist():
            here = (query // size == row).expand(-1, k.shape[1])
            for counts, indices, shown in (
                (tensors.full_block_cnt, tensors.full_block_idx, torch.ones_like(here)),
                (tensors.mask_block_cnt, tensors.mask_block_idx, mask_mod(b, h, query, key, lengths, None)),
            ):
                for block in indices[b, h, row, : counts[b, h, row]].tolist():
                    mask[b, h] |= here & shown & (key // size == block)
        return exact_attention(q, k, v, mask, softmax_scale)

    names = {
        "cutlass": {"cute": SimpleNamespace(jit=lambda function: function), "Int32": int, "Uint32": int},
        "flash_attn": {},
        "flash_attn.cute": {"flash_attn_func": flash_attn_func},
        "flash_attn.cute.mask": {"r2p_bitmask_below": None},
        "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": SimpleNamespace},
    }
    for name, members in names.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    pytest.importorskip("triton")
    card(monkeypatch, 9)
    monkeypatch.delitem(sys.modules, "stem_attention.backends.fa4.attention", raising=False)
    yield
    sys.modules.pop("stem_attention.backends.fa4.attention", None)


@pytest.mark.usefixtures("fake_fa4")
@pytest.mark.parametrize(("q_len", "kv_len"), [(64, 64), (70, 70), (37, 101), (1, 65)])
@pytest.mark.parametrize("scale", [0.25, -0.3])
def test_what_it_is_handed_means_the_selection(q_len, kv_len, scale):
    q, k, v = structured_qkv(2, q_len, kv_len, 4, 2, 16, dtype=torch.float64)
    selection: BlockSelection = random_selection(2, 4, q_len, kv_len, 64)
    one = Call(q, k, v, Dense(64), scale, kv_len, return_lse=True)
    out, lse = FA4Backend().attend(one, selection)
    exact, exact_lse = exact_attention(q, k, v, token_mask(selection), scale)
    assert torch.allclose(out, exact)
    assert torch.allclose(lse, exact_lse)
