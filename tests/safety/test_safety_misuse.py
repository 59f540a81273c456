"""Every public entry with every argument wrong: a ValueError that names the argument. A new argument needs a row here.

Fields of policies: tests/policies/test_fields.py. What messages say: tests/test_bad_input.py.
"""

import dataclasses
import inspect
import math
import re

import pytest
import torch
from tests.toys import toy

import stem_attention as sa
from stem_attention import policies
from stem_attention.testing import make_qkv

Q, K, V = make_qkv(2, 40, 50, 4, 2, 16)
PACKED = make_qkv(1, 40, 50, 4, 2, 16)
CACHE = torch.zeros(4, 16, 2, 16)
STARTS_Q = torch.tensor([0, 15, 40], dtype=torch.int32)
STARTS_K = torch.tensor([0, 20, 50], dtype=torch.int32)
TABLE = torch.arange(4, dtype=torch.int32).view(2, 2)
MASK = torch.ones(2, 4, 4, 4, dtype=torch.bool).tril()
SELECTION = sa.BlockSelection.from_mask(MASK, block_size=16, q_len=40, kv_len=50)

NOT_A_TENSOR = (None, [1.0], "q", 3)
WRONG_QKV = (
    *NOT_A_TENSOR,
    torch.tensor(1.0),
    torch.zeros(2, 50, 2, 16, dtype=torch.int64),
    torch.zeros(2, 50, 2, 16, device="meta"),
)
NOT_A_COUNT = (-1, 1.5, "4", True, math.nan, [1], torch.tensor(4))
NOT_A_FLAG = (None, 0, 1, "yes", torch.tensor(True), [True])
NOT_A_NUMBER = (math.nan, math.inf, "0.1", True, torch.tensor(0.1), [0.1])
NOT_A_CAP = (*NOT_A_NUMBER, 0, -1.0)
NOT_SINKS = ([1.0] * 4, "q", 3, *(torch.zeros(4, dtype=dtype) for dtype in (torch.float16, torch.int32)), torch.zeros(3))
NOT_A_POLICY = ({}, 3, sa.Mass, "magic", "mass:colour=3", "uniform@0.2", lambda q, k, v: None)
NOT_A_BACKEND = (None, "flash", 3, ["torch"])
NOT_A_DEVICE = (None, 3, "toaster", ["cpu"], True)
NOT_A_DTYPE = (None, "float32", torch.int8, 32, [torch.float32])
NOT_INT32 = (*NOT_A_TENSOR, torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 2, 2, 2, 2, dtype=torch.int32))

QKV = dict.fromkeys(("q", "k", "v"), WRONG_QKV)
METHOD = {"policy": NOT_A_POLICY, "scale": NOT_A_NUMBER, "softcap": NOT_A_CAP, "backend": NOT_A_BACKEND}
SINKS = {"sinks": NOT_SINKS}
DENSE = {"dense_below": NOT_A_COUNT}
REQUEST = {"device": NOT_A_DEVICE, "dtype": NOT_A_DTYPE, "head_dim": (*NOT_A_COUNT, 0, None), "value_dim": (*NOT_A_COUNT, 0)}
LENGTHS = dict.fromkeys(("block_size", "q_len", "kv_len"), (*NOT_A_COUNT, None))


@dataclasses.dataclass(frozen=True)
class Entry:
    """A public callable, arguments with which it works, and for every argument values with which it must not."""

    call: object
    good: dict
    wrong: dict


ENTRIES = {
    "stem_attention": Entry(
        sa.stem_attention, {"q": Q, "k": K, "v": V},
        {**QKV, **METHOD, **SINKS, **DENSE, "prompt_len": (*NOT_A_COUNT, 49), "return_lse": NOT_A_FLAG},
    ),
    "select_blocks": Entry(sa.select_blocks, {"q": Q, "k": K, "v": V}, {**QKV, **METHOD, "prompt_len": (*NOT_A_COUNT, 49)}),
    "block_sparse_attention": Entry(
        sa.block_sparse_attention, {"q": Q, "k": K, "v": V, "selection": SELECTION},
        {
            **QKV, "selection": (None, MASK, "dense", dataclasses.replace(SELECTION, kv_len=51)), "scale": NOT_A_NUMBER,
            "softcap": NOT_A_CAP, **SINKS, "window": (*NOT_A_COUNT, 0), "return_lse": NOT_A_FLAG, "backend": NOT_A_BACKEND,
        },
    ),
    "stem_attention_varlen": Entry(
        sa.stem_attention_varlen,
        {"q": PACKED[0][0], "k": PACKED[1][0], "v": PACKED[2][0], "cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K,
         "max_seqlen_q": 25, "max_seqlen_k": 30},
        {
            **QKV, **METHOD, **SINKS, **DENSE, "cu_seqlens_q": NOT_INT32, "cu_seqlens_k": NOT_INT32,
            "max_seqlen_q": (*NOT_A_COUNT, None, 24), "max_seqlen_k": (*NOT_A_COUNT, None, 29),
            "page_table": (*NOT_INT32[1:], TABLE[0]), "prompt_lens": (3, "ab", [20], [20, 29], [20, 30.0], STARTS_Q[1:]),
            "return_lse": NOT_A_FLAG,
        },
    ),
    "stem_attention_varlen, paged": Entry(
        sa.stem_attention_varlen,
        {"q": PACKED[0][0], "k": CACHE, "v": CACHE, "cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K,
         "max_seqlen_q": 25, "max_seqlen_k": 30, "page_table": TABLE},
        {
            **QKV, "page_table": (*NOT_INT32[1:], TABLE[:1], TABLE[:, :1], TABLE + 1, TABLE - 1, TABLE.to("meta")),
            "cu_seqlens_k": NOT_INT32, "max_seqlen_k": (*NOT_A_COUNT, None, 29), "prompt_lens": (3, "ab", [20], [20, 29]),
        },
    ),
    "explain": Entry(sa.explain, {}, {**REQUEST, **DENSE, "policy": NOT_A_POLICY, "backend": NOT_A_BACKEND}),
    "BlockSelection": Entry(
        sa.BlockSelection, {field.name: getattr(SELECTION, field.name) for field in dataclasses.fields(SELECTION)},
        {**LENGTHS, "indices": NOT_INT32, "counts": NOT_INT32},
    ),
    "BlockSelection.from_mask": Entry(
        sa.BlockSelection.from_mask, {"mask": MASK, "block_size": 16, "q_len": 40, "kv_len": 50},
        {**LENGTHS, "mask": (*NOT_A_TENSOR, MASK.int(), MASK[0], MASK[..., :3])},
    ),
    "BlockSelection.from_lists": Entry(
        sa.BlockSelection.from_lists, {"lists": [[[[0], [0, 1]]]], "block_size": 4, "q_len": 8, "kv_len": 8},
        {
            **LENGTHS,
            "lists": (None, 3, "0", [], [1], [[1]], [[[1]]], [[["01"]]],
                      [[[[0.0], [1]]]], [[[[0], [True]]]], [[[[0], [2**40]]]], {0: [[[0]]]}),
            "device": NOT_A_DEVICE[1:],
        },
    ),
    "BlockSelection.of_window": Entry(
        sa.BlockSelection.of_window, {"window": 20, "block_size": 16, "q_len": 40, "kv_len": 50},
        {**LENGTHS, **dict.fromkeys(("window", "batch", "q_heads"), (*NOT_A_COUNT, 0, None)), "device": NOT_A_DEVICE[1:]},
    ),
    "parse_spec": Entry(
        policies.parse_spec, {"text": "mass"}, {"text": (None, 3, "", "magic", "mass:share", "mass@2", "a.json")}
    ),
    "read_policy": Entry(policies.read_policy, {}, {"value": NOT_A_POLICY}),
    "policy_from_dict": Entry(
        policies.policy_from_dict, {"fields": {"policy": "mass"}},
        {"fields": (None, "mass", 3, {}, {"share": 3}, {"policy": 3}, {"policy": "mass", "colour": 3}, {"policy": "os:path"}),
         "trusted": NOT_A_FLAG},
    ),
    "policy_from_json": Entry(
        policies.policy_from_json, {"text": '{"policy": "mass"}'},
        {"text": (None, 3, b"{}", "", "{", "{}", "[1]", "null", "[" * 10**5, '{"a":' * 10**5, "1" * 5000)},
    ),
}  # fmt: skip

CASES = [
    (name, argument, value) for name, entry in ENTRIES.items() for argument in entry.wrong for value in entry.wrong[argument]
]


def shown(value):
    return f"{value.dtype}{tuple(value.shape)}{value.device}" if isinstance(value, torch.Tensor) else repr(value)[:20]


@pytest.mark.parametrize(("name", "argument", "value"), CASES, ids=[f"{n}-{a}-{shown(v)}" for n, a, v in CASES])
def test_a_wrong_argument_is_refused_by_its_name(name, argument, value):
    entry = ENTRIES[name]
    with pytest.raises(ValueError, match=r"^\w+: expected .+, got .*; .+") as refused:
        entry.call(**{**entry.good, argument: value})
    said = re.match(r"\w+", str(refused.value)).group()
    allowed = {argument, *({"policy"} if name.startswith(("parse_", "read_", "policy_")) else ())}
    if isinstance(value, torch.Tensor):  # two arguments that do not fit each other: either may be named
        allowed |= {"q", "k", "v", "indices", "counts", "page_table"} if argument in entry.good else set()
    if argument in LENGTHS:  # rows and columns follow from the three lengths
        allowed |= {"q_len", "indices", "mask"} if isinstance(value, int) and not isinstance(value, bool) else set()
    assert said in allowed, refused.value


@pytest.mark.parametrize("name", ENTRIES)
def test_the_good_arguments_of_the_table_pass(name):
    assert ENTRIES[name].call(**ENTRIES[name].good) is not None


@pytest.mark.parametrize("name", ENTRIES)
def test_every_argument_has_a_row(name):
    arguments = inspect.signature(ENTRIES[name].call).parameters
    wrong = {argument for entry in ENTRIES.values() if entry.call == ENTRIES[name].call for argument in entry.wrong}
    assert {argument for argument in arguments if argument not in ("self", "cls")} == wrong


def test_every_public_name_is_in_the_table():
    """Classes of policies and their fields have theirs in tests/policies/test_fields.py."""
    public = {name: getattr(module, name) for module in (sa, policies) for name in module.__all__}
    called = {name for name, item in public.items() if callable(item) and not isinstance(item, type)}
    assert called | {"BlockSelection"} <= set(ENTRIES) | {"policy_names"}


def test_the_integrations_arguments():
    hosts = pytest.importorskip("stem_attention.integrations.transformers")
    held = {"policy": NOT_A_POLICY, "dense_below": NOT_A_COUNT, "dense_layers": NOT_A_COUNT}
    table = {
        hosts.register: held,
        hosts.use_policy: {**held, "observer": (3, "print", []), "prompt_len": (0, *NOT_A_COUNT)},
        hosts.set_policy: {**held, "model": (None, "gpt2", 3, torch.nn.Linear(1, 1))},
    }
    model = toy("llama")
    model.set_attn_implementation("stem")
    for entry, wrong in table.items():
        assert set(inspect.signature(entry).parameters) == set(wrong)
        for argument, values in wrong.items():
            for value in values:
                given = {"model": model, argument: value} if entry is hosts.set_policy else {argument: value}
                with pytest.raises(ValueError, match=f"^{argument}: expected .+, got .+; .+"):
                    entry(**given)
