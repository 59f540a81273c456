"""Perplexity of a tiny random model against the sums written out, and what sparse reading does to it."""

import math

import pytest
import torch
from tests.toys import toy

from stem_attention import UnsupportedError
from stem_attention.models.texts import Text
from stem_attention.policies import SinkWindow, Stem
from stem_evals.perplexity import BUCKETS, Perplexity, read_text, score_text

TOKENS = 700  # more than one slice of logits, and no multiple of one
SPARSE = Stem(block_size=32, ratio_short=0.1, min_blocks=1, sink_blocks=1, local_blocks=1, tail_blocks=0)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(257, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()


def logits(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, :-1].double()


def test_perplexity_is_that_of_the_models_own_logits(model, ids):
    dense = read_text(model, ids, None)
    score = score_text(model, ids, dense, dense)
    losses = torch.nn.functional.cross_entropy(logits(model, ids), torch.tensor(ids[1:]), reduction="none")
    torch.testing.assert_close(score["loss"], losses, rtol=1e-4, atol=1e-5)
    assert torch.equal(score["loss"], score["dense_loss"])
    assert (score["kl"] == 0).all()
    assert (score["same"] == 1).all()
    assert dense.reading.density == 1.0


def test_sparse_scores_are_those_of_the_two_sets_of_logits(model, ids):
    dense, sparse = read_text(model, ids, None), read_text(model, ids, SinkWindow(1, 1, 32))
    score = score_text(model, ids, dense, sparse)
    model.set_attn_implementation("sdpa")  # the last reading left it on "stem"
    p = logits(model, ids).log_softmax(-1)
    with torch.inference_mode():
        q = model.lm_head(sparse.hidden[:-1]).double().log_softmax(-1)
    torch.testing.assert_close(score["kl"], (p.exp() * (p - q)).sum(-1), rtol=1e-3, atol=1e-6)
    assert torch.equal(score["same"], (p.argmax(-1) == q.argmax(-1)).double())
    torch.testing.assert_close(score["dense_loss"], score_text(model, ids, dense, dense)["loss"])
    assert score["kl"].mean() > 0
    assert 0 < score["same"].mean() < 1


def test_model_that_scales_its_logits_after_the_head_is_refused():
    model = toy("granite", logits_scaling=8.0)
    with pytest.raises(UnsupportedError, match="GraniteForCausalLM changes its logits"):
        read_text(model, [1, 2, 3, 4], None)
    assert not model.base_model._forward_hooks


@pytest.fixture
def measure(model, tokenizer):
    """Two windows of each of two lengths."""
    text = Text("letters", "".join(chr(33 + (5 * i + i // 7) % 60) for i in range(1500)))
    return Perplexity(model, tokenizer, [text], [400, 700], 2)


def test_cases_are_windows_of_every_length_by_stable_names(measure):
    assert [case.key for case in measure.cases()] == ["letters-400-0", "letters-400-1100", "letters-700-0", "letters-700-800"]
    assert [case.tokens for case in measure.cases()] == [400, 400, 700, 700]


def test_record_has_totals_and_buckets_that_add_up(measure):
    record = measure.run(measure.cases()[2], SPARSE)
    buckets = record["buckets"]
    assert len(buckets) == BUCKETS
    assert (buckets[0]["first"], buckets[-1]["last"]) == (1, record["predicted"]) == (1, 699)
    for name in ("loss", "dense_loss", "kl", "same"):
        total = sum(bucket[name] * (bucket["last"] - bucket["first"] + 1) for bucket in buckets)
        assert total / 699 == pytest.approx(record[name])
    assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
    assert 0 < record["density"] < 1


def test_record_does_not_depend_on_what_ran_before(measure):
    case, other = measure.cases()[:2]
    measure.run(case, None)
    in_order = measure.run(case, SPARSE)
    measure.run(other, None)
    resumed = measure.run(case, SPARSE)  # its dense reading has to be made again
    assert {**resumed, "seconds": 0} == {**in_order, "seconds": 0}
