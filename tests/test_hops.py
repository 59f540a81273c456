"""At most five hops from a public call to what chooses blocks or attends over them, and ``explain()`` names them."""

import re
import sys

import pytest

import stem_attention as sa
from stem_attention.policies import SinkWindow
from stem_attention.testing import make_qkv, pack, random_selection

MOST_HOPS = 5
# Where a hop ends: the work itself begins.
CHOOSES = r"\.policies\.\w+\.__call__$|\.reference\.\w+\.select_by_\w+$"
ATTENDS = r"\.backends\.\w+\.attention\.attend$|\.backends\.dense\.dense_attention$"

POLICIES = {
    "mass": sa.Mass(block_size=16, query_pool=4, key_pool=8),
    "stem": sa.Stem(block_size=16),
    "one that no backend knows": SinkWindow(1, 2, 16),
}
Q, K, V = make_qkv(1, 40, 50, 4, 2, 16)
SPARSE, PACKED = {"dense_below": 0}, [(Q, K, V)] * 2
LISTS = random_selection(1, 4, 40, 50, 16)


CALLS = {
    "stem_attention": lambda **options: sa.stem_attention(Q, K, V, **SPARSE, **options),
    "stem_attention, dense": lambda **options: sa.stem_attention(Q, K, V, **options),
    "stem_attention_varlen": lambda **options: sa.stem_attention_varlen(**pack(PACKED), **SPARSE, **options),
    "stem_attention_varlen, dense": lambda **options: sa.stem_attention_varlen(**pack(PACKED), **options),
    "stem_attention_varlen, paged": lambda **options: sa.stem_attention_varlen(**pack(PACKED, 16), **SPARSE, **options),
    "select_blocks": lambda **options: sa.select_blocks(Q, K, V, **options),
    "block_sparse_attention": lambda policy, **options: sa.block_sparse_attention(Q, K, V, LISTS, **options),
}


def stacks(call):
    """The library's functions from the public one to each that chooses blocks or attends, as ``module.function``."""
    found = set()

    def look(frame, event, _):
        if event != "call" or not frame.f_globals.get("__name__", "").startswith("stem_attention."):
            return
        stack = []
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            if module.startswith("stem_attention."):
                stack.append(f"{module}.{frame.f_code.co_name}")
            frame = frame.f_back
        arrived = [bool(re.search(f"{CHOOSES}|{ATTENDS}", name)) for name in stack]
        if arrived[0] and not any(arrived[1:]):
            found.add(tuple(reversed(stack)))

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CALLS)
def test_five_hops_at_most_from_a_public_call_to_the_work(name, policy, backend):
    found = stacks(lambda: CALLS[name](policy=POLICIES[policy], backend=backend))
    assert all(stack[0] == f"stem_attention.api.{name.partition(',')[0]}" for stack in found)
    ends = [bool(re.search(CHOOSES, stack[-1])) for stack in found]
    assert any(ends) == (name != "block_sparse_attention" and "dense" not in name)
    assert all(ends) == (name == "select_blocks")
    assert max(len(stack) - 1 for stack in found) <= MOST_HOPS, found


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("policy", POLICIES)
def test_explain_names_the_hops(policy, backend):
    path = sa.explain(policy=POLICIES[policy], backend=backend).path
    assert len(path) - 1 <= MOST_HOPS
    # "module.function" of each hop: classes have capitals.
    hops = [{re.sub(r"\.[A-Z]\w*(?=\.)", "", name) for name in hop.split(" and ")} for hop in path]
    found = stacks(lambda: CALLS["stem_attention"](policy=POLICIES[policy], backend=backend))
    assert [set(hop) for hop in zip(*found, strict=True)] == hops
    assert all(hop in str(sa.explain(policy=POLICIES[policy], backend=backend)) for hop in path)
