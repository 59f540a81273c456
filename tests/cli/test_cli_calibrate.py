"""``stem-attention calibrate`` on a tiny random model: a file for its layers and heads, and mistakes in one line."""

import json
import re
from shutil import rmtree

import pytest
import torch
from tests.toys import save, toy

from stem_attention.calibrate.curves import SHARES
from stem_attention.calibrate.learn import Curves
from stem_attention.cli import calibrate, main
from stem_attention.policies import policy_from_json

SMALL = ["--policy", "mass:block_size=16,query_pool=4,key_pool=4,tail_blocks=1"]
OUT_OF_RANGE = ["--windows 0", "--needles 0", "--needle-weight -1", "--needle-weight nan", "--density 0", "--density 1"]
OUT_OF_RANGE += ["--length 0", "--policy mass@0.2"]


def command(model, folder, *more):
    text = folder / "text.txt"
    text.write_text(" ".join(f"{word} {word * word % 97}" for word in range(600)))
    return ["calibrate", "--model", str(model), "--out", str(folder / "heads.json"), "--text", str(text), "--length", "800",
            "--windows", "1", "--needles", "1", "--density", "0.4", *SMALL, *more]  # fmt: skip


def first_is_best(model, lessons, policies):
    return [0.1 * place for place, _ in enumerate(policies)]


@pytest.fixture(scope="module")
def calibrated(tiny_llama, tmp_path_factory):
    """The file that the command writes."""
    folder = tmp_path_factory.mktemp("calibrate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate.learning, "loss_rises", first_is_best)
        assert main(command(tiny_llama, folder)) == 0
    return folder / "heads.json"


def test_file_is_a_policy_for_every_layer_and_head(calibrated):
    policy = policy_from_json(calibrated.read_text())
    assert (policy.name, policy.block_size, policy.query_pool, policy.key_pool) == ("mass", 16, 4, 4)
    assert [len(row) for row in policy.head_factors] == [4, 4]
    assert len({factor for row in policy.head_factors for factor in row}) > 1
    assert sorted(path.name for path in calibrated.parent.iterdir()) == ["heads.json", "text.txt"]


def test_same_command_again_writes_the_same_and_another_seed_something_else(
    calibrated, tiny_llama, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(calibrate.learning, "loss_rises", first_is_best)
    (tmp_path / "heads.json").write_text("{}")  # replaced
    assert main(command(tiny_llama, tmp_path)) == 0
    assert (tmp_path / "heads.json").read_text() == calibrated.read_text()
    captured = capsys.readouterr()
    said = " ".join(captured.err.split())
    assert captured.out == ""
    found = re.search(rf"wrote {tmp_path / 'heads.json'}: the factors, .* density (\S+) on these prompts, share (\S+)", said)
    assert found is not None
    assert float(found[1]) == pytest.approx(0.4, rel=0.06)  # a tiny model's heads step far from share to share
    assert float(found[2]) == pytest.approx(json.loads(calibrated.read_text())["share"], rel=0.01)
    assert main(command(tiny_llama, tmp_path, "--seed", "1", "--needle-weight", "0")) == 0
    other = policy_from_json((tmp_path / "heads.json").read_text())
    assert other.head_factors != policy_from_json(calibrated.read_text()).head_factors


@pytest.mark.parametrize(
    ("text", "answer", "best"),
    [
        ((0.01, 0.02, 0.03), (0.1, 0.2, 0.3), "the factors"),
        ((0.03, 0.01, 0.02), (0.1, 0.1, 0.1), "their square roots"),
        ((0.01, 0.02, 0.03), (0.3, 0.2, 0.1), "one share"),
    ],
)
def test_the_file_holds_what_loses_least_of_other_prompts(text, answer, best, tiny_llama, tmp_path, monkeypatch, capsys):
    asked = []

    def rises(model, lessons, policies):
        asked.append((lessons, policies))
        return list(answer if lessons[0].answer else text)

    rise = torch.rand(2, 4, len(SHARES), generator=torch.Generator().manual_seed(0)).double().cumsum(-1)
    curves = Curves(rise, rise, 1 - 0.9 * rise / rise[..., -1:])
    monkeypatch.setattr(calibrate.learning, "learn", lambda *arguments: curves)
    monkeypatch.setattr(calibrate.learning, "loss_rises", rises)
    assert main(command(tiny_llama, tmp_path)) == 0
    said = " ".join(capsys.readouterr().err.split())
    for name, of_text, of_answer in zip(("the factors", "their square roots", "one share"), text, answer, strict=True):
        assert f"other prompts with {name}: loss {of_text:+.4f} nats a token of a text, {of_answer:+.4f} of an answer" in said
    assert f"{best}, which loses least there" in said
    (_, (factors, roots, single)), _ = asked
    written = policy_from_json((tmp_path / "heads.json").read_text())
    assert written == {"the factors": factors, "their square roots": roots, "one share": single}[best]
    assert single.head_factors is None
    tables = [torch.tensor(policy.head_factors) for policy in (factors, roots)]
    torch.testing.assert_close(tables[0].sqrt(), tables[1])


def test_other_prompts_are_not_those_learnt_from(tiny_llama, tmp_path, monkeypatch):
    seen = {"learnt": [], "tried": []}
    learn, rises = calibrate.learning.learn, calibrate.learning.loss_rises

    def learnt(model, lessons, *more):
        seen["learnt"] += [lesson.ids for lesson in lessons]
        return learn(model, lessons, *more)

    def tried(model, lessons, policies):
        seen["tried"] += [lesson.ids for lesson in lessons]
        return rises(model, lessons, policies)

    monkeypatch.setattr(calibrate.learning, "learn", learnt)
    monkeypatch.setattr(calibrate.learning, "loss_rises", tried)
    assert main(command(tiny_llama, tmp_path)) == 0
    assert len(seen["learnt"]) == len(seen["tried"]) == 2
    assert not any(ids in seen["learnt"] for ids in seen["tried"])


def test_run_takes_the_file_and_a_share_of_its_own(calibrated, tiny_llama, capsys):
    densities = []
    for spec in (str(calibrated), f"{calibrated}:share=90"):
        arguments = ["run", "--model", str(tiny_llama), "--context", "800", "--max-new-tokens", "1", "--dense-below", "0"]
        assert main([*arguments, "--policy", spec, "--json"]) == 3
        report = json.loads(capsys.readouterr().out)
        assert report["policy"]["head_factors"] == json.loads(calibrated.read_text())["head_factors"]
        assert all(layer["sparse"] for layer in report["sparse"]["layers"])
        densities.append(report["sparse"]["density"])
    assert 0.2 < densities[1] < densities[0] < 0.7


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--length", "5000"], 1, "--length: expected at most 4096, the model's context, got 5000"),
        (["--length", "60"], 1, "--length: expected at least"),
        (["--windows", "9"], 1, "--text: expected at least 7200 tokens for 9 windows of 800"),
        (["--policy", "paper"], 1, "--policy: expected mass"),
        (["--text", "absent.txt"], 2, "--text: cannot read absent.txt"),
        (["--text", "text.txt"], 1, "--text: expected files of different names"),
        (["--haystack", "absent.txt"], 2, "--haystack: cannot read absent.txt"),
        (["--haystack", "empty.txt"], 2, "--haystack: empty.txt is empty"),
        (["--out", "absent/heads.json"], 2, "--out: cannot write absent/heads.json"),
        (["--out", "."], 2, "--out: cannot write .: Is a directory"),
        (["--density", "0.01"], 1, "--density: expected a number between 0.1"),
        *[(text.split(), 2, f"{text.split()[0]}: ") for text in OUT_OF_RANGE],
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_behind(arguments, code, says, tiny_llama, tmp_path, monkeypatch, complaint):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibrate.learning, "learn", None)  # all of this is known before the long part
    (tmp_path / "empty.txt").write_text("")
    assert says in complaint(main, [*command(tiny_llama, tmp_path), *arguments], code)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "text.txt"]


def test_a_file_that_was_there_survives_a_mistake(tiny_llama, tmp_path):
    (tmp_path / "heads.json").write_text("mine")
    assert main(command(tiny_llama, tmp_path, "--length", "5000")) == 1
    assert (tmp_path / "heads.json").read_text() == "mine"


def test_a_policy_whose_folder_went_away_is_printed(tiny_llama, tmp_path, monkeypatch, capsys):
    away = tmp_path / "away"
    away.mkdir()
    monkeypatch.setattr(calibrate.learning, "loss_rises", lambda *given: rmtree(away, True) or first_is_best(*given))
    assert main(command(tiny_llama, tmp_path, "--out", str(away / "heads.json"))) == 1
    captured = capsys.readouterr()
    assert policy_from_json(captured.out).head_factors is not None
    last = captured.err.splitlines()[-1]
    assert last.startswith(f"stem-attention: --out: cannot write {away / 'heads.json'}: No such file")
    assert "standard output" in last


def test_the_least_length_that_is_named_is_enough(tiny_llama, tmp_path, monkeypatch, complaint):
    monkeypatch.setattr(calibrate.learning, "check_density", lambda *arguments: 1 / 0)  # what comes next
    line = complaint(main, command(tiny_llama, tmp_path, "--length", "60"), 1)
    needed = int(re.search(r"--length: expected at least (\d+) .* got 60;", line)[1])
    with pytest.raises(ZeroDivisionError):
        main(command(tiny_llama, tmp_path, "--length", str(needed)))


@pytest.mark.parametrize(
    ("kind", "windows"),
    [("qwen2", {"use_sliding_window": True, "max_window_layers": 1}), ("mistral", {})],
    ids=["of-some-layers", "of-all-layers"],
)
def test_model_with_windows_is_refused(kind, windows, tmp_path, capsys):
    assert main(command(save(toy(kind, sliding_window=64, **windows), tmp_path / "windows"), tmp_path)) == 1
    assert "calibrate takes models of full causal attention alone" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "heads.json").exists()
