"""The judges of the soak see what is wrong: each planted fault is found."""

import json
from dataclasses import replace
from random import Random

import pytest
import torch

import stem_attention as sa
from stem_attention.backends.torch import TorchBackend
from stem_attention.testing import make_qkv, random_selection, structured_qkv
from stem_attention.testing.judge import attention_faults, selection_faults
from stem_attention.testing.poison import new_memory_is_nan, surrounded
from stem_attention.testing.problems import Space, draw_problem
from stem_attention.testing.soak import main, run_workers, space_for

CONFIG = sa.StemConfig(block_size=16, stride=8, min_blocks=3, sink_blocks=1, local_blocks=1, tail_blocks=1, dense_below=0)
Q, K, V = make_qkv(1, 300, 300, 2, 1, 16)


def attended():
    selection = random_selection(1, 2, 300, 300, 16)
    return (*sa.block_sparse_attention(Q, K, V, selection, return_lse=True), selection)


SPOILED = {
    "one number is off": lambda out, lse: (out.index_fill(1, torch.tensor([7]), 0.01), lse),
    "one number is NaN": lambda out, lse: (out.masked_fill(torch.arange(300)[:, None, None] == 5, torch.nan), lse),
    "another dtype": lambda out, lse: (out.half(), lse),
    "another shape": lambda out, lse: (out[:, 1:], lse),
    "lse of another base": lambda out, lse: (out, lse * 1.0001),
}


@pytest.mark.parametrize("what", SPOILED)
def test_wrong_attention_is_seen(what):
    out, lse, selection = attended()
    assert attention_faults(out, lse, Q, K, V, selection) == []
    assert attention_faults(*SPOILED[what](out, lse), Q, K, V, selection)


def moved(mask, row, source, target):
    """One block of a head's row exchanged for another."""
    mask = mask.clone()
    mask[0, 0, row, source], mask[0, 0, row, target] = False, True
    return mask


def test_a_wrong_selection_is_seen():
    selection = sa.select_blocks(Q, K, V, config=CONFIG)
    assert selection_faults(selection, Q, K, V, CONFIG, 300) == []
    mask, row = selection.to_mask(), 12
    middle = slice(1, row)  # neither the sink nor the diagonal
    kept = mask[0, 0, row, middle].nonzero().flatten()[0].item() + 1
    dropped = (~mask[0, 0, row, middle]).nonzero().flatten()[0].item() + 1
    wrong = {
        "another block": moved(mask, row, kept, dropped),
        "no sink": moved(mask, row, 0, dropped),
        "one more": moved(mask, row, dropped, dropped),
    }
    wrong["one more"][0, 0, row, dropped] = True
    for made in wrong.values():
        bad = sa.BlockSelection.from_mask(made, block_size=16, q_len=300, kv_len=300)
        assert selection_faults(bad, Q, K, V, CONFIG, 300)
    for changed in (replace(CONFIG, decay=0.4, min_blocks=9), replace(CONFIG, tail_blocks=2), replace(CONFIG, beta=9.0)):
        assert selection_faults(selection, Q, K, V, changed, 300)


def test_a_wrong_selection_by_mass_is_seen():
    config = sa.StemConfig.mass(
        block_size=16, query_pool=4, key_pool=8, share=2.0, local_blocks=1, tail_blocks=1, dense_below=0
    )
    selection = sa.select_blocks(Q, K, V, config=config)
    assert selection_faults(selection, Q, K, V, config, 300) == []
    mask = selection.to_mask()
    free = torch.ones_like(mask).tril(-1)
    free[..., 0], free[..., -1, :] = False, False
    kept, dropped = (mask & free).nonzero()[0], (~mask & free).nonzero()[0]
    for at in (kept, dropped, torch.tensor([0, 0, 9, 0]), torch.tensor([0, 0, 18, 5])):  # a sink and the tail's row too
        wrong = mask.clone()
        wrong[tuple(at)] ^= True
        bad = sa.BlockSelection.from_mask(wrong, block_size=16, q_len=300, kv_len=300)
        assert selection_faults(bad, Q, K, V, config, 300)
    assert selection_faults(selection, Q, K, V, replace(config, share=4.0), 300)


def test_poison_is_where_it_should_be():
    view = surrounded(Q)
    assert torch.equal(view, Q)
    assert torch.as_strided(view, (1,), (1,), view.storage_offset() - 1).isnan()
    assert torch.as_strided(view, (1,), (1,), view.storage_offset() + 16).isnan()
    with new_memory_is_nan():
        assert torch.empty(5).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_soak_passes_and_its_report_says_what_ran(tmp_path, capsys):
    assert main(["--shapes", "12", "--seed", "3", "--json", str(tmp_path / "deep" / "soak.json")]) == 0
    report = json.loads((tmp_path / "deep" / "soak.json").read_text())
    assert report == json.loads(capsys.readouterr().out)
    assert report["shapes"] == sum(report["kinds"].values()) == 12
    assert report["failed"] == 0
    assert report["memory_growth_bytes"]["process"] < 64 << 20
    (samples,) = report["memory"]  # of one worker
    assert len(samples) == 12
    assert all(set(sample) == {"process"} and sample["process"] > 0 for sample in samples)


def test_every_worker_of_the_soak_tells_its_memory():
    report = run_workers(3, "torch", "cpu", 3, 2)
    assert [len(samples) for samples in report["memory"]] == [2, 2]
    assert report["shapes"] == 4


@pytest.mark.parametrize("space", [Space(), space_for("hopper", 0)], ids=["any", "gpu"])
def test_problems_have_head_factors_now_and_then_and_survive_json(space):
    problems = [draw_problem(Random(seed), space) for seed in range(200)]
    by_mass = [problem for problem in problems if problem.config.keep == "mass"]
    own = [problem for problem in by_mass if problem.config.head_factors is not None]
    assert 0 < len(own) < len(by_mass) < len(problems)
    for problem in own:
        assert [len(row) for row in problem.config.head_factors] == [problem.kv_heads * problem.group]
        told = json.loads(json.dumps(problem.to_json()))
        assert sa.StemConfig.from_dict(told["config"]) == problem.config


def test_a_head_that_obeys_anothers_share_is_found():
    q, k, v = structured_qkv(1, 320, 320, 2, 1, 16)
    config, swapped = (
        sa.StemConfig.mass(block_size=16, query_pool=4, key_pool=4, head_factors=[factors])
        for factors in ((0.5, 4.0), (4.0, 0.5))
    )
    assert not selection_faults(sa.select_blocks(q, k, v, config=config), q, k, v, config, 320)
    assert selection_faults(sa.select_blocks(q, k, v, config=swapped), q, k, v, config, 320)


def test_the_soak_fails_on_a_faulty_backend_and_tells_how_to_repeat_it(monkeypatch, capsys):
    honest = TorchBackend.attend

    def faulty(self, q, k, *rest):
        out, lse = honest(self, q, k, *rest)
        out[:, -1] *= 1.01
        return out, lse

    monkeypatch.setattr(TorchBackend, "attend", faulty)
    assert main(["--shapes", "6", "--seed", "3"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["failed"] > 0
    again = report["first_failures"][0]["only"]
    assert main(["--seed", "3", "--only", again]) == 1
    assert json.loads(capsys.readouterr().out)["problem"] == report["first_failures"][0]["problem"]


def test_a_backend_that_raises_or_writes_to_its_inputs_is_reported(monkeypatch, capsys):
    def writes(self, q, *rest):
        q.zero_()
        raise IndexError("planted")

    monkeypatch.setattr(TorchBackend, "attend", writes)
    assert main(["--shapes", "4"]) == 1
    assert "IndexError: planted" in capsys.readouterr().out
