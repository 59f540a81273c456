"""run and inspect end to end, on a tiny random model and on the embedded one, and what their options mean."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tests.toys import listening, save, toy

from stem_attention import Mass
from stem_attention.cli import main, options, system
from stem_attention.models.load import EMBEDDED_INSTALL, embedded_gguf

pytest.importorskip("transformers")

PROMPT = ["--context", "2300"]
SPARSE = [*PROMPT, "--dense-below", "0"]


def report_of(capsys, *arguments):
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_run_prints_answers_times_density_and_agreement(tiny_llama, capsys):
    code = main(["run", "--model", str(tiny_llama), *SPARSE, "--max-new-tokens", "4", "--verbose"])
    out = capsys.readouterr().out
    assert code == 3, "a random model cannot find the planted number"
    for part in ("time to first token", "in attention", "kept density", "answer", "planted", "Agreement over the last 64"):
        assert part in out
    assert "policy mass" in out


def test_brackets_in_the_names_of_folders_and_policies_are_shown(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my[").mkdir()
    (tmp_path / "my[" / "b]").symlink_to(tiny_llama)
    (tmp_path / "q[red].json").write_text(Mass().to_json())
    assert main(["run", "--model", "my[/b]", "--policy", "q[red].json", "--context", "600", "--max-new-tokens", "1"]) == 3
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "my[/b]"
    assert sum("q[red].json" in line for line in rest) == 3  # beside the prompt, over the table, under it


def test_run_json_is_alone_on_stdout_and_complete_beside_a_picture(tiny_llama, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    shown = ["--plot", str(tmp_path / "picture.png"), "--layer", "1", "--head", "3", "--max-new-tokens", "4"]
    _, report = report_of(capsys, "run", "--model", str(tiny_llama), *SPARSE, *shown)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert 2100 <= report["prompt_tokens"] <= 2300
    assert report["policy"] == Mass().to_dict(), "the default"
    assert [layer["layer"] for layer in report["sparse"]["layers"]] == [0, 1]
    assert all(layer["sparse"] and 0 < layer["density"] < 1 for layer in report["sparse"]["layers"])
    assert report["dense"]["attention_seconds"] < report["dense"]["time_to_first_token_seconds"]
    assert (report["agreement"]["positions"], report["dense"]["found"]) == (64, False)


@pytest.mark.parametrize(
    ("spec", "name", "density"),
    [
        ("sink-window", "sink-window", None),
        ("uniform:block_size=64@0.3", "stem", 0.3),
        ("sink-window:block_size=32@0.25", "sink-window", 0.25),
    ],
)
def test_any_policy_is_run_and_tuned_to_the_prompt(spec, name, density, tiny_llama, capsys):
    _, report = report_of(capsys, "run", "--model", str(tiny_llama), *SPARSE, "--policy", spec, "--max-new-tokens", "1")
    assert (report["policy"]["policy"], report["spec"]) == (name, spec)
    assert report["agreement"]["kl"] > 1e-9
    assert density is None or report["sparse"]["density"] == pytest.approx(density, rel=0.06)


def test_run_reads_a_prompt_file_without_a_planted_fact(tiny_llama, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("Tell me about the harbour. " * 10)
    code = main(["run", "--model", str(tiny_llama), "--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "2"])
    out = capsys.readouterr().out
    assert code == 0
    assert "planted" not in out
    assert "No layer ran sparse (short prompt)" in out


def test_inspect_lists_the_kept_blocks_of_the_layers_and_heads_asked_for(tiny_llama, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "picture.png"
    places = ["--layer", "1", "--head", "0", "--head", "2"]
    code, report = report_of(capsys, "inspect", "--model", str(tiny_llama), *PROMPT, *places, "--plot", str(file))
    assert code == 0
    assert [(view["layer"], view["head"]) for view in report["views"]] == [(1, 0), (1, 2)]
    for view in report["views"]:
        assert view["kept_blocks"] == sum(len(row) for row in view["blocks"])
        assert all(row[-1] == index for index, row in enumerate(view["blocks"])), "every row keeps its diagonal block"
        assert view["density"] < view["kept_attention"] <= 1
    assert file.read_bytes().startswith(b"\x89PNG")


def test_inspect_writes_every_panel_by_itself(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    panels = tmp_path / "new" / "panels"
    windows = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    model = save(toy("qwen2", use_sliding_window=True, **windows), tmp_path / "model")
    code, report = report_of(capsys, "inspect", "--model", str(model), *PROMPT, "--panels", str(panels))
    assert code == 0
    names = {"rows.png", "reach.png", "layer1-head0-kept.png", "layer1-head0-attention.png"}
    assert {file.name for file in panels.iterdir()} == names, "of the layers shown by default, layer 0 is dense"
    dense, sparse = report["median_distances"]
    assert (dense, len(sparse)) == (None, 4), "one for each head"
    assert sparse[0] == report["views"][0]["median_distance"]
    assert main(["inspect", "--model", str(model), *PROMPT, "--layer", "0"]) == 1
    assert "nothing to show: the chosen layers ran dense (sliding window" in capsys.readouterr().err


def test_inspect_names_a_directory_that_cannot_be_made(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    assert main(["inspect", "--panels", str(tmp_path / "file")]) == 2
    assert "--panels: cannot make" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 64}),
        ("gemma2", {"sliding_window": 64, "query_pre_attn_scalar": 8}),
        ("phi3", {"sliding_window": 262144}),
        ("gemma4_text", {
            "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 64, "vocab_size_per_layer_input": 257, "hidden_size_per_layer_input": 8,
        }),
    ],
)  # fmt: skip
def test_dense_is_what_the_host_itself_would_run(kind, changes, tmp_path, capsys):
    """The first two have no "sdpa"; each layer is timed all the same."""
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    model = save(toy(kind, **changes), tmp_path)
    arguments = ["run", "--model", str(model), *SPARSE, "--max-new-tokens", "2"]
    code, report = report_of(capsys, *arguments)
    assert code == 3
    layers = report["sparse"]["layers"]
    assert [layer["layer"] for layer in layers] == list(range(changes.get("num_hidden_layers", 2)))
    assert all(layer["dense_seconds"] > 0 for layer in layers)
    assert [layer["sparse"] for layer in layers] == {
        "gpt_oss": [False, True], "gemma2": [False, True], "phi3": [True, True], "gemma4_text": [False, True] * 2,
    }[kind]  # fmt: skip
    assert report["agreement"]["kl"] < (1e-9 if kind == "gemma4_text" else 1), "what cannot run sparse runs as the host runs it"


@pytest.mark.model
@pytest.mark.skipif(embedded_gguf() is None, reason=f"the embedded model is not installed: {EMBEDDED_INSTALL}")
def test_embedded_model_answers_the_planted_question_dense_and_sparse(capsys):
    code, report = report_of(capsys, "run", "--context", "1024", "--dense-below", "0", "--max-new-tokens", "12")
    assert code == 0
    assert report["dense"]["found"]
    assert report["sparse"]["found"]
    assert report["sparse"]["density"] < 0.95
    assert len(report["sparse"]["layers"]) == 30


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
    assert options.torch_dtype(options.DtypeName.auto, torch.device("cpu")) == torch.float32
    assert options.torch_dtype(options.DtypeName.auto, torch.device("cuda")) == torch.bfloat16
    assert options.torch_dtype(options.DtypeName.float16, torch.device("cpu")) == torch.float16


def test_json_has_null_for_what_it_cannot_hold(capsys):
    system.print_json({"a": [1.5, float("nan")], "b": (float("inf"), None, "nan")})
    out = capsys.readouterr().out
    assert "NaN" not in out
    assert json.loads(out) == {"a": [1.5, None], "b": [None, None, "nan"]}


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupted_run_prints_no_half_report_and_leaves_no_picture(tiny_llama, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    arguments = [
        "run", "--model", str(tiny_llama), "--context", "1700", "--max-new-tokens", "200", "--dense-below", "0",
        "--policy", "mass:block_size=32", "--json", "--plot", str(picture),
    ]  # fmt: skip
    command = [sys.executable, "-c", listening("stem_attention.cli"), *arguments]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any("dense: prefill" in line for line in process.stderr)  # its bar is drawn when that reading is over
    process.send_signal(signal.SIGINT)
    printed, err = process.communicate(timeout=240)
    assert (process.returncode, printed) == (130, ""), err
    assert err.splitlines()[-1] == "stem-attention: interrupted"
    assert "Traceback" not in err
    assert not picture.exists()
