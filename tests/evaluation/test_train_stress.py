"""benchmarks/train_stress.py from its command line to a model that can be evaluated."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from stem_attention.evaluation.models import find_model, load_model
from stem_attention.evaluation.stress import LAYOUT, Stress, read_vocabulary

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ARGUMENTS = ["--size", "tiny", "--device", "cpu", "--tokens", "512", "--lengths", "128,256", "--minutes", "0.5"]
ARGUMENTS += ["--log-every", "0", "--samples", "2"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("train_stress")


@pytest.fixture
def parts(script) -> ModuleType:
    return importlib.import_module("stress_model")


@pytest.fixture
def trainer(script, parts):
    torch.manual_seed(0)
    return script.Trainer(
        parts.SIZES["tiny"], parts.build(parts.SIZES["tiny"]), torch.device("cpu"), torch.float32, 5e-3, seed=0
    )


def test_three_steps_make_a_model_that_loads_and_can_go_on(script, tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "model", tmp_path / "checkpoint.pt"
    assert script.main([*ARGUMENTS, "--steps", "3", "--out", str(out), "--checkpoint", str(checkpoint)]) == 0
    layout = json.loads((out / LAYOUT).read_text())
    assert layout["progress"]["steps"] == 3
    assert layout["progress"]["tokens"] == 3 * 5 * 128
    assert layout["progress"]["skipped"] == 0
    assert len(layout["progress"]["history"]) == 3
    model, _ = load_model(find_model(str(out)), torch.device("cpu"), torch.float32)
    assert Stress(model, read_vocabulary(out), ["recall"], [256]).cases()

    for start in (checkpoint, out):
        again = tmp_path / f"again-{start.name}"
        assert script.main([*ARGUMENTS, "--steps", "2", "--out", str(again), "--resume", str(start)]) == 0
        assert json.loads((again / LAYOUT).read_text())["progress"]["steps"] == 5


def test_training_lowers_the_loss(trainer) -> None:
    losses = [trainer.step(128, 1024, 1.0) for _ in range(12)]
    assert losses[-1] < losses[0] - 0.3


def test_checkpoint_brings_back_weights_and_moments(script, parts, trainer, tmp_path: Path) -> None:
    trainer.step(128, 512, 1.0)
    trainer.save(tmp_path / "checkpoint.pt", tmp_path / "model", {})
    other = script.Trainer(trainer.size, parts.build(trainer.size), torch.device("cpu"), torch.float32, 5e-3, seed=0)
    other.load(tmp_path / "checkpoint.pt")
    other.chance.setstate(trainer.chance.getstate())
    other.generator.set_state(trainer.generator.get_state())
    assert trainer.step(128, 512, 1.0) == other.step(128, 512, 1.0)
    for name, master in trainer.masters.items():
        assert torch.equal(master, other.masters[name])


def test_step_that_is_not_finite_changes_nothing(trainer) -> None:
    before = {name: master.clone() for name, master in trainer.masters.items()}
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = float("nan")
    trainer.step(128, 512, 1.0)
    assert trainer.progress.skipped == 1
    assert all(torch.equal(master, before[name]) for name, master in trainer.masters.items())


def test_rows_grow_when_learned_or_when_their_time_is_over(script) -> None:
    progress = script.Progress(accuracy={"128/recall/0": 0.95, "128/hops/0": 0.5}, stage_steps=100)
    progress.advance(0.2, [128, 256])
    assert progress.stage == 0
    progress.accuracy["128/hops/0"] = 0.95
    progress.advance(0.2, [128, 256])
    assert (progress.stage, progress.stage_steps) == (1, 0)
    progress.advance(1.0, [128, 256])
    assert progress.stage == 1, "there is nothing longer"
    late = script.Progress(accuracy={"128/recall/0": 0.0})
    late.advance(0.5, [128, 256])
    assert late.stage == 1


def test_stretched_rows_reach_far_positions_and_stay_one_text(parts, trainer) -> None:
    positions = parts.stretched(4, 128, torch.Generator().manual_seed(0))
    assert torch.equal(positions[0], torch.arange(128))
    assert (positions.diff(dim=1) >= 1).all()
    assert 128 < positions[1::2].max() < parts.SPAN
    ids = trainer.draw(128, 512, with_repeats=False).ids
    end = torch.tensor([125])
    changed = ids.clone()
    changed[0, 1] = ids[0, 1] + 1
    first, second = (parts.answer_logits(trainer.model, rows, end, positions.roll(1, 0))[0] for rows in (ids, changed))
    assert not torch.equal(first, second), "the end still sees the beginning across the jumps"


def test_every_task_weighs_the_same(parts, trainer) -> None:
    asked = trainer.draw(256, 5120, with_repeats=True)
    tasks = [name.split("/")[1] for name in asked.names]
    for task in set(tasks):
        mine = torch.tensor([other == task for other in tasks])[asked.groups]
        assert asked.weights[mine].sum().item() == pytest.approx(0.2)


def test_repeats_ask_only_for_what_has_been_seen(parts) -> None:
    vocabulary = parts.SIZES["tiny"].vocabulary
    batch = parts.draw_repeats(vocabulary, 8, 128, torch.Generator().manual_seed(0))
    for ids, starts in zip(batch.ids.tolist(), batch.answers.tolist(), strict=True):
        period = next(gap for gap in range(1, 128) if ids[gap:] == ids[:-gap])
        assert 16 <= period < 64
        asked = [start for start in starts if start >= 0]
        assert len(asked) > 15
        assert min(asked) > period, "one token before an answer has been seen a period ago"


def test_bf16_model_is_rounded_from_the_masters_and_keeps_its_frequencies(script, parts, tmp_path: Path) -> None:
    size = parts.SIZES["tiny"]
    trainer = script.Trainer(size, parts.build(size), torch.device("cpu"), torch.bfloat16, 1e-3, seed=0)
    before = {name: master.clone() for name, master in trainer.masters.items()}
    trainer.step(128, 640, 1.0)
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, trainer.masters[name].bfloat16())
    assert any(not torch.equal(master, before[name]) for name, master in trainer.masters.items())
    trainer.save(None, tmp_path, {})
    loaded, _ = load_model(find_model(str(tmp_path)), torch.device("cpu"), torch.bfloat16)
    assert torch.equal(loaded.model.rotary_emb.inv_freq, trainer.model.model.rotary_emb.inv_freq)
    assert loaded.config.rope_parameters["rope_theta"] == 1e8
    ids = torch.randint(size.vocabulary.size, (1, 64))
    assert torch.equal(loaded(ids).logits, trainer.model(ids).logits)
