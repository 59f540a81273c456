"""stem-evals bench: what it prints, and that it refuses to print."""

import json

import pytest
import torch

from stem_attention import Mass, block_sparse_attention
from stem_evals.bench import checks
from stem_evals.cli.app import main

SMALL = ["--device", "cpu", "--heads", "2", "--kv-heads", "1", "--repeats", "2"]
TINY = ["--device", "cpu", "--suite", "ttft", "--repeats", "1", "--dense-below", "0"]


def report(arguments, capsys):
    assert main(["bench", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def shown(arguments, capsys):
    assert main(["bench", *arguments]) == 0
    return capsys.readouterr().out


def test_attention_suite_prints_medians_ratio_and_density(capsys):
    out = shown(["--lengths", "600,900", *SMALL], capsys)
    for part in ("600", "900", "density", "dense SDPA", "whole", "ratio", "selection share", "threads", "policy mass"):
        assert part in out
    assert out.count("tokens: checked") == 2


@pytest.mark.parametrize("suite", [SMALL, TINY, [*SMALL, "--suite", "selection"]], ids=["attention", "ttft", "selection"])
def test_what_is_piped_keeps_to_80_columns(suite, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = shown(["--lengths", "600,1100,1500", *suite], capsys).splitlines()
    assert max(map(len, lines)) <= 80
    table = "\n".join(lines)
    assert "…" not in table, "no heading and no number is cut short"
    assert all(length in table for length in ("600", "1100", "1500"))


def test_json_holds_every_repeat(capsys):
    threads = torch.get_num_threads()
    try:
        answer = report(["--lengths", "1500", *SMALL, "--repeats", "3", "--threads", "2"], capsys)
    finally:
        torch.set_num_threads(threads)
    (result,) = answer["results"]
    assert (answer["threads"], answer["backend"], answer["policy"]) == (2, "torch", json.loads(Mass().to_json()))
    names = ("dense SDPA", "selection", "attention", "whole", "default")
    assert {name: len(times) for name, times in result["seconds"].items()} == dict.fromkeys(names, 3)
    assert 0 < result["density"] < 1
    assert 0 < result["measures"]["selection share"] < 1
    medians = result["medians"]
    assert result["measures"]["ratio"] == pytest.approx(medians["dense SDPA"] / medians["whole"])


def test_kernel_suite_times_compiled_flex_attention_on_the_same_lists(capsys):
    # The last block is not full, and without the dense tail the lists are narrower than a row.
    policy = ["--policy", "stem:tail_blocks=0,ratio_short=0.1,sink_blocks=1,local_blocks=2"]
    (result,) = report(["--suite", "kernel", "--lengths", "1500", *SMALL, *policy], capsys)["results"]
    medians, tflops = result["medians"], result["tflops"]
    assert result["left_out"] == {}
    assert medians.keys() == tflops.keys() == {"dense SDPA", "FlexAttention", "Stem"}
    assert result["measures"]["ratio"] == pytest.approx(medians["FlexAttention"] / medians["Stem"])
    assert result["measures"]["dense ratio"] == pytest.approx(medians["dense SDPA"] / medians["Stem"])
    blocks = 12
    everything = 2 * blocks * (blocks + 1) / 2
    kept = result["density"] * everything - 2 * blocks / 2
    assert tflops["Stem"] * medians["Stem"] == pytest.approx(kept * 4 * 64 * 128**2 / 1e12)
    assert tflops["dense SDPA"] * medians["dense SDPA"] == pytest.approx((everything - blocks) * 4 * 64 * 128**2 / 1e12)


def test_selection_suite_reports_the_rate_of_differing_blocks(capsys):
    (result,) = report(["--suite", "selection", "--lengths", "3000", *SMALL], capsys)["results"]
    assert result["medians"].keys() == {"eager Stem", "Stem"}
    assert result["measures"]["differing blocks"] == 0


def test_serving_suite_reports_both_scenarios(capsys):
    arguments = ["--suite", "serving", "--lengths", "256", *SMALL, "--head-dim", "32", "--dense-below", "100"]
    answer = report([*arguments, "--policy", "stem:block_size=16"], capsys)
    chunked, mixed = answer["results"]
    assert (answer["suite"], answer["page_size"]) == ("serving", 16)
    assert chunked["scenario"] == "8 prompts of 256 in chunks of 64"
    assert mixed["scenario"] == "64 prompts of 8 to 1024, one step"
    for result in (chunked, mixed):
        medians = result["medians"]
        assert medians.keys() == {"dense SDPA", "Stem"}
        assert result["ratios"] == {"ratio": pytest.approx(medians["dense SDPA"] / medians["Stem"])}
        assert 0.1 < result["density"] < 1
        assert result["check"]["error"] < 1e-5
        assert result["left_out"] == {}
    out = shown([*arguments, "--no-dense"], capsys)
    assert "8 prompts of 256" in out
    assert "dense SDPA" not in out


def test_ttft_suite_reports_who_took_how_long_and_what_was_checked(capsys):
    answer = report([*TINY, "--lengths", "900,300"], capsys)
    assert (answer["model"], answer["layers"], answer["head_dim"]) == ("tiny", 2, 16)
    assert [result["length"] for result in answer["results"]] == [300, 900]
    for result in answer["results"]:
        assert result["timings"].keys() == {"SDPA", "Stem"}
        assert result["ratios"].keys() == {"total", "attention"}
    assert answer["check"]["Stem"]["attention"] < 1e-5
    out = shown([*TINY, "--lengths", "300", "--policy", "stem"], capsys)
    for part in ("tiny, 2 layers", "300", "SDPA", "Stem", "attention", "ratio", "every block kept"):
        assert part in out


def test_first_calls_are_made_in_new_processes(capsys):
    calls = report([*TINY, "--lengths", "300", "--first-call", "--no-dense"], capsys)["first_call"]
    assert calls.keys() == {"Stem, empty cache", "Stem, filled cache"}
    assert all(call["first"] > 0 and call["second"] > 0 for call in calls.values())


def test_a_density_is_tuned_at_every_length_and_no_dense_leaves_the_peers_out(capsys):
    policy = ["--policy", "sink-window:block_size=16@0.3", "--no-dense"]
    for result in report(["--lengths", "1000,2000", *SMALL, *policy], capsys)["results"]:
        assert result["density"] == pytest.approx(0.3, rel=0.05)
        assert result["left_out"] == {"dense SDPA": "not asked for"}
        assert "ratio" not in result["measures"]


def test_model_gives_the_heads_and_options_override_it(capsys):
    answer = report(["--device", "cpu", "--model", "gemma", "--head-dim", "16", "--lengths", "300", "--repeats", "1"], capsys)
    assert (answer["heads"], answer["kv_heads"], answer["head_dim"]) == (8, 4, 16)


def test_a_wrong_result_prints_no_time(monkeypatch, complaint):
    def wrong(*arguments):
        out = block_sparse_attention(*arguments)
        out[:, -1] *= 1.01
        return out

    monkeypatch.setattr(checks, "block_sparse_attention", wrong)
    assert "wrong result at 600 tokens" in complaint(main, ["bench", "--lengths", "600", *SMALL], 1)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--suite", "magic"], 2, "--suite"),
        (["--model", "magic"], 1, "--model: expected one of llama-3.1-8b"),
        (["--model", "gemma", "--kv-heads", "3"], 1, "--kv-heads: expected a divisor of --heads 8"),
        (["--suite", "ttft", "--model", "gemma"], 1, "--model: expected one of llama-3.1-8b, qwen3-8b"),
        (["--suite", "ttft", "--heads", "4"], 1, "--heads, --kv-heads, --head-dim: suite ttft runs whole models"),
        (["--policy", "uniform@0.01", "--lengths", "300"], 1, "--policy: uniform@0.01: no density"),
        (["--repeats", "0"], 2, "--repeats"),
        (["--lengths", "8k"], 2, "--lengths: expected numbers of tokens"),
    ],
)
def test_bad_option_is_one_line(arguments, code, says, complaint):
    assert says in complaint(main, ["bench", "--device", "cpu", *arguments], code)


@pytest.mark.parametrize("suite", ["attention", "ttft"])
def test_a_policy_for_another_model_is_refused(suite, tmp_path, complaint):
    file = tmp_path / "heads.json"
    file.write_text(Mass(head_factors=[[1.0] * 8] * 3).to_json())
    line = complaint(main, ["bench", "--suite", suite, "--policy", str(file), "--device", "cpu"], 1)
    assert line.startswith("stem-evals: --policy: ")
    assert "head_factors" in line
