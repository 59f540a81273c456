"""A policy that a user writes runs through every public call, travels by name, and is told what is wrong with it."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from tests.rigs import equal

import stem_attention as sa
from stem_attention import BlockSelection, Mass, Policy, Stem
from stem_attention.policies import SinkWindow, parse_spec, policy_from_json, read_policy
from stem_attention.testing import make_qkv, pack

Q, K, V = make_qkv(2, 70, 100, 4, 2, 16)


@dataclass(frozen=True)
class Nearest(Policy):
    """The latest ``blocks`` of every row: a policy with a parameter, in as many lines as it takes."""

    name: ClassVar[str] = "nearest"

    blocks: int = 2
    block_size: int = 16

    def __call__(self, q, k, v, *, scale=None, prompt_len=None):
        start, end = (k.shape[1] - q.shape[1]) // self.block_size, -(-k.shape[1] // self.block_size)
        rows, columns = torch.arange(start, end)[:, None], torch.arange(end)
        mask = (columns <= rows) & (columns > rows - self.blocks)
        mask = mask.expand(q.shape[0], q.shape[2], -1, -1)
        return BlockSelection.from_mask(mask, block_size=self.block_size, q_len=q.shape[1], kv_len=k.shape[1])


@dataclass(frozen=True)
class Told(Nearest):
    """Another that asks for the soft cap, and keeps so many blocks."""

    name: ClassVar[str] = "told"

    def __call__(self, q, k, v, *, scale=None, prompt_len=None, softcap=None):
        return Nearest(1 if softcap is None else int(softcap), self.block_size)(q, k, v)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_soft_cap_is_told_to_those_that_ask(backend):
    for cap, blocks in ((None, 1), (3.0, 3)):
        options = {"softcap": cap, "backend": backend}
        told, asked_not = (sa.select_blocks(Q, K, V, policy=policy, **options).to_mask() for policy in (Told(), Nearest(2)))
        assert equal((told, asked_not), (Nearest(blocks)(Q, K, V).to_mask(), Nearest(2)(Q, K, V).to_mask()))


SAME = {1: SinkWindow(0, 1, 16), 3: SinkWindow(0, 3, 16)}
BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference"])


def every_call(policy, backend="auto"):
    """What each public call gives, one after the other."""
    options = {"policy": policy, "backend": backend}
    batch = [(Q[i : i + 1], K[i : i + 1], V[i : i + 1]) for i in range(2)]
    selection = sa.select_blocks(Q, K, V, **options)
    return [
        *sa.stem_attention(Q, K, V, dense_below=0, return_lse=True, **options),
        selection.to_mask(),
        sa.block_sparse_attention(Q, K, V, selection, backend=backend),
        *sa.stem_attention_varlen(**pack(batch), dense_below=0, return_lse=True, **options),
        *sa.stem_attention_varlen(**pack(batch, page_size=16), dense_below=0, return_lse=True, **options),
    ]


@BACKENDS
@pytest.mark.parametrize("blocks", SAME)
def test_it_runs_through_every_public_call(blocks, backend):
    assert equal(every_call(Nearest(blocks), backend), every_call(SAME[blocks], backend))


@pytest.mark.parametrize("blocks", SAME)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.newer_host
def test_it_compiles_into_one_graph(blocks, dynamic):
    torch.compiler.reset()
    policy = Nearest(blocks)

    def step(q, k, v):
        selection = sa.select_blocks(q, k, v, policy=policy)
        out = sa.stem_attention(q, k, v, policy=policy, dense_below=0)
        return out + 1, sa.block_sparse_attention(q, k, v, selection) + 1, selection.counts + 1

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (100, 77):
        inputs = make_qkv(1, length, length, 4, 2, 16)
        assert equal(compiled(*inputs), step(*inputs))


def test_it_travels_by_the_name_of_its_class():
    policy = Nearest(blocks=3)
    name = f"{__name__}:Nearest"
    assert policy.to_dict() == {"policy": name, "blocks": 3, "block_size": 16}
    assert policy_from_json(policy.to_json()) == policy
    assert parse_spec(f"{name}:blocks=3").policy == policy
    by_name, by_object = (sa.select_blocks(Q, K, V, policy=given) for given in (f"{name}:blocks=3", policy))
    assert torch.equal(by_name.indices, by_object.indices)
    assert (policy.row_counts(5), policy.density(80)) == (None, None)
    assert (policy.row_limits(3), policy.for_layer(7)) == ((1, 2, 3), policy)
    with pytest.raises(ValueError, match=r"^policy: expected one whose density can be tuned, got nearest; "):
        parse_spec(f"{name}@0.2")


def test_a_class_that_nobody_can_import_runs_too():
    @dataclass(frozen=True)
    class Local(Nearest):
        def __call__(self, q, k, v, **options):
            return SinkWindow(0, self.blocks, 16)(q, k, v)

    torch.compiler.reset()
    fresh = Local(7)
    compiled = torch.compile(lambda q, k, v: sa.stem_attention(q, k, v, policy=fresh), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"^policy: expected module:Class, got .+; .*not one inside a function"):
        compiled(Q, K, V)  # compiled code finds it by name, once it has run
    assert equal(every_call(Local(3)), every_call(SAME[3]))
    assert equal(every_call(Local(1)), every_call(SAME[1]))


@BACKENDS
@pytest.mark.parametrize("base", [Mass, Stem])
def test_a_subclass_of_a_policy_with_fast_selection_is_asked_itself(base, backend):
    @dataclass(frozen=True)
    class Other(base):
        def __call__(self, q, k, v, **options):
            return SinkWindow(0, 1, 64)(q, k, v)

    assert equal(every_call(Other(block_size=64), backend), every_call(SinkWindow(0, 1, 64), backend))


def choosing(wrong):
    """A policy that makes something else of a good selection."""

    @dataclass(frozen=True)
    class Wrong(Nearest):
        def __call__(self, q, k, v, **options):
            return wrong(super().__call__(q, k, v))

    return Wrong()


BAD_SELECTIONS = {
    "nothing": (lambda good: None, "a BlockSelection"),
    "a mask": (lambda good: good.to_mask(), "a BlockSelection"),
    "of other lengths": (lambda good: SinkWindow(0, 1, 16)(Q, K[:, :90], V), "q_len, kv_len"),
    "of fewer heads": (lambda good: SinkWindow(0, 1, 16)(Q[:, :, :2], K, V), "q_heads"),
    "of other blocks": (lambda good: SinkWindow(0, 1, 32)(Q[: len(good.counts)], K, V), "block_size"),
    "on another device": (lambda good: replace(good, indices=good.indices.to("meta")), "the device of q"),
    "of the future": (lambda good: replace(good, indices=good.indices + 1), "the row's diagonal"),
    "without its diagonal": (lambda good: replace(good, counts=good.counts - 1), "diagonal|counts"),
    "not ascending": (lambda good: replace(good, indices=good.indices.flip(-1)), "ascending"),
    "too wide": (lambda good: replace(good, indices=torch.nn.functional.pad(good.indices, (0, 9), value=-1)), "at most 7 ids"),
}


@BACKENDS
@pytest.mark.parametrize("case", BAD_SELECTIONS)
def test_a_bad_choice_is_refused_by_every_call(case, backend):
    wrong, told = BAD_SELECTIONS[case]
    options = {"policy": choosing(wrong), "backend": backend}
    for call in (
        lambda: sa.stem_attention(Q, K, V, dense_below=0, **options),
        lambda: sa.select_blocks(Q, K, V, **options),
        lambda: sa.stem_attention_varlen(**pack([(Q[:1], K[:1], V[:1])]), dense_below=0, **options),
    ):
        with pytest.raises(ValueError, match=rf"(?s)^policy: expected Wrong to choose .*({told}).*; .*from_mask or from_lists"):
            call()


FROZEN = dataclass(frozen=True)


def odd(decorate=FROZEN, **members):
    """A policy whose class lacks something."""
    members = {"name": "odd", "block_size": 16, "__call__": Nearest.__call__, **members}
    return decorate(type("Odd", (Policy,), members))


@pytest.mark.parametrize(
    ("policy", "way_out"),
    [
        (odd(lambda cls: cls)(), "@dataclass(frozen=True)"),
        (odd(dataclass)(), "@dataclass(frozen=True)"),
        (odd(__post_init__=lambda self: None)(), "check() instead of __post_init__"),
        (odd(name=None)(), 'name: ClassVar[str] = "nearest"'),
        (Nearest, "build one: Nearest()"),
        (Nearest().__call__, "an instance of a subclass of Policy"),
    ],
)
def test_a_class_that_is_no_policy_is_refused_with_the_way_out(policy, way_out):
    for call in (read_policy, lambda policy: sa.stem_attention(Q, K, V, policy=policy)):
        with pytest.raises(ValueError, match=r"^policy: expected .+, got .+; ") as refused:
            call(policy)
        assert way_out in str(refused.value)


def test_fields_are_checked_when_it_is_built():
    for size in (0, 1.5, "16", None):
        with pytest.raises(ValueError, match=r"^block_size: expected an integer >= 1, got .+; pass block_size"):
            Nearest(block_size=size)
    cls = odd(__annotations__={"what": object}, what=None)
    for what in (torch.zeros(2), {1, 2}, print):
        with pytest.raises(ValueError, match=r"^what: expected a value that JSON can hold, got \w+; numbers, strings"):
            cls(what)
