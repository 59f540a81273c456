"""What options mean, and what the command reads of the machine it runs on."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from stem_attention.cli import options, system
from stem_attention.cli.options import DtypeName


def test_standard_input_that_is_closed_is_no_prompt(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(fileno=lambda: (_ for _ in ()).throw(OSError())))
    assert options.piped_text() is None


@pytest.mark.parametrize(("content", "text"), [(b"", None), (b" \n", None), ("\ufeffÄ b".encode(), "Ä b")])
def test_a_pipe_is_a_prompt_if_something_comes_out(content, text, monkeypatch):
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    with os.fdopen(reader, encoding="ascii") as stream:  # the encoding of a terminal says nothing about a file
        monkeypatch.setattr(sys, "stdin", stream)
        assert options.piped_text() == text


def test_dtypes_by_name():
    assert options.torch_dtype(DtypeName.auto, torch.device("cpu")) == torch.float32
    assert options.torch_dtype(DtypeName.auto, torch.device("cuda")) == torch.bfloat16
    assert options.torch_dtype(DtypeName.float16, torch.device("cpu")) == torch.float16


def test_json_has_null_for_what_it_cannot_hold(capsys):
    system.print_json({"a": [1.5, float("nan")], "b": (float("inf"), None, "nan")})
    out = capsys.readouterr().out
    assert "NaN" not in out
    assert json.loads(out) == {"a": [1.5, None], "b": [None, None, "nan"]}
