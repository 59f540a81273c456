"""Each GPU backend, and each rule by which blocks are chosen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from stem_attention import explain

from .common import RULES, Rule


@pytest.fixture(params=["hopper", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each GPU backend that can run the test on this card."""
    head_dim = request.node.callspec.params.get("dim", 128)
    found = explain(device="cuda", dtype=torch.bfloat16, head_dim=head_dim, backend=request.param)
    if found.chosen is None:
        pytest.skip(found.reasons[request.param])
    return request.param


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> Rule:
    """Makes the policy for a number of query heads."""
    return RULES[request.param]


@pytest.fixture
def _return_memory() -> Iterator[None]:
    """Give back what a large test took, so that its neighbours find room."""
    yield
    torch.cuda.empty_cache()
