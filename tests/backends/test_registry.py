"""Which backend runs, and what explain() says about it."""

import pytest
import torch

from stem_attention import Mass, UnsupportedError, explain
from stem_attention.backends import Request, backend_names, explain_request, get_backend, registry
from stem_attention.backends.torch import TorchBackend
from stem_attention.backends.triton import TritonBackend, backend

CPU = Request(torch.device("cpu"), torch.float32, 64, 128)


class NeverBackend(TorchBackend):
    """A backend that cannot run anything."""

    name = "never"

    def why_not(self, request):
        return f"head_dim {request.head_dim} is too large for it"


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_a_name_gets_the_backend_of_that_name(name):
    assert get_backend(CPU, name).name == name
    explanation = explain(backend=name)
    assert explanation.chosen == name
    assert "asked for by name" in explanation.reasons[name]
    assert backend_names() == ("auto", *explanation.reasons)
    assert get_backend(CPU).name == "torch"


def test_explain_prints_the_request_the_choice_and_a_reason_for_each_backend():
    explanation = explain(dtype=torch.bfloat16, head_dim=96, policy=Mass(block_size=128), dense_below=7)
    assert [explain(dense_below=limit).dense_below for limit in (None, 0, 7)] == [TorchBackend.crossover, 0, 7]
    first, *rest = str(explanation).splitlines()
    assert first == "cpu torch.bfloat16 head_dim=96 block_size=128: torch"
    assert [line.split(":")[0].strip() for line in rest[: len(explanation.reasons)]] == list(explanation.reasons)
    assert "fewer than 7 tokens" in rest[len(explanation.reasons)]
    assert rest[-1].strip() == explanation.path[-1]
    assert explanation.reasons["torch"] == "runs: the fastest that supports this"
    assert "only by name" in explanation.reasons["reference"]


@pytest.mark.parametrize(("installed", "old"), [("3.4.0", True), ("3.5.1+git1", True), ("3.6.0", False), ("4.0.0", False)])
def test_a_triton_that_is_too_old_is_refused_by_its_version(installed, old, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(backend, "version", lambda package: installed)
    backend._too_old.cache_clear()
    told = TritonBackend().why_not(Request(torch.device("cuda"), torch.bfloat16, 64, 128))
    backend._too_old.cache_clear()
    assert (told is not None and installed in told and "3.6" in told) == old


def test_a_dimension_of_values_is_named_where_it_is_another():
    assert str(explain(head_dim=192, value_dim=128)).startswith("cpu torch.float32 head_dim=192 value_dim=128 block_size=64: ")
    assert explain(head_dim=192, value_dim=192) == explain(head_dim=192)


def test_the_reference_is_never_picked_by_auto(monkeypatch):
    only_reference = {"never": NeverBackend(), "reference": registry._backends()["reference"]}
    monkeypatch.setattr(registry, "_backends", lambda: only_reference)
    explanation = explain_request(CPU)
    assert (explanation.chosen, explanation.dense_below, explanation.path) == (None, None, ())
    assert explanation.reasons["never"] == "cannot run: head_dim 64 is too large for it"


def test_a_backend_that_cannot_run_is_an_error_that_says_why(monkeypatch):
    backends = {"never": NeverBackend(), **registry._backends()}
    monkeypatch.setattr(registry, "_backends", lambda: backends)
    request = Request(torch.device("cpu"), torch.float32, 65, 128)  # used nowhere else: get_backend remembers its answers
    with pytest.raises(UnsupportedError, match="head_dim 65 is too large for it"):
        get_backend(request, "never")
    assert get_backend(request).name == "torch"
