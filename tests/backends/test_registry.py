"""Which backend runs, and what explain() says about it."""

import pytest
import torch

from stem_attention import StemConfig, UnsupportedError, explain
from stem_attention.backends import Request, backend_names, explain_request, get_backend, registry

CPU = Request(torch.device("cpu"), torch.float32, 64, 128)


class NeverBackend:
    """A backend that supports nothing."""

    name = "never"

    def supports(self, request):
        return f"head_dim {request.head_dim} is too large for it"


def test_auto_picks_torch_on_the_cpu():
    assert get_backend(CPU).name == "torch"


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_a_name_gets_the_backend_of_that_name(name):
    assert get_backend(CPU, name).name == name
    explanation = explain(backend=name)
    assert explanation.chosen == name
    assert "asked for by name" in explanation.reasons[name]


def test_names_are_auto_and_every_backend_explained():
    explanation = explain()
    assert backend_names() == ("auto", *explanation.reasons)
    assert {"torch", "reference"} <= set(explanation.reasons)


def test_explain_prints_the_request_the_choice_and_a_reason_for_each_backend():
    explanation = explain(dtype=torch.bfloat16, head_dim=96, config=StemConfig(block_size=64))
    first, *rest = str(explanation).splitlines()
    assert first == "cpu torch.bfloat16 head_dim=96 block_size=64: torch"
    assert [line.split(":")[0].strip() for line in rest] == list(explanation.reasons)
    assert explanation.reasons["torch"] == "runs: the fastest that supports this"
    assert "only by name" in explanation.reasons["reference"]


def test_the_reference_is_never_picked_by_auto(monkeypatch):
    only_reference = {"never": NeverBackend(), "reference": registry._backends()["reference"]}
    monkeypatch.setattr(registry, "_backends", lambda: only_reference)
    explanation = explain_request(CPU)
    assert explanation.chosen is None
    assert explanation.reasons["never"] == "cannot run: head_dim 64 is too large for it"


def test_a_backend_that_cannot_run_is_an_error_that_says_why(monkeypatch):
    backends = {"never": NeverBackend(), **registry._backends()}
    monkeypatch.setattr(registry, "_backends", lambda: backends)
    request = Request(torch.device("cpu"), torch.float32, 65, 128)  # used nowhere else: get_backend remembers its answers
    with pytest.raises(UnsupportedError, match="head_dim 65 is too large for it"):
        get_backend(request, "never")
    assert get_backend(request).name == "torch"


def test_unknown_backend_names_the_known_ones():
    with pytest.raises(ValueError, match=r"^backend: expected one of auto, .*torch, reference, got 'flash'"):
        explain(backend="flash")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"device": "banana"}, "device"),
        ({"device": None}, "device"),
        ({"dtype": torch.int32}, "dtype"),
        ({"dtype": "float32"}, "dtype"),
        ({"head_dim": 0}, "head_dim"),
        ({"head_dim": 64.0}, "head_dim"),
        ({"config": 3}, "config"),
        ({"backend": None}, "backend"),
    ],
)
def test_explain_refuses_what_no_call_could_be(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        explain(**arguments)
