"""Prefills: what is timed and reported, what a host without "sdpa" gets, and what a picture of a head shows."""

import pytest
import torch
from tests.toys import toy
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stem_attention import Mass, Stem, UnsupportedError
from stem_attention.models.prefill import agreement, attending, default_attention, read, watch
from stem_attention.models.views import HeadRecorder, reach, selections_by_layer

IDS = [index * 37 % 257 for index in range(200)]
SMALL = Mass(block_size=16, query_pool=4, key_pool=4, tail_blocks=1)


def test_a_dense_reading_is_the_host_itself(model):
    calls = []
    reading = read(model, IDS, None, positions=5, max_new_tokens=3, on_attention=calls.append)
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).logits[0, -5:]
        answer = model.generate(torch.tensor([IDS]), max_new_tokens=3, do_sample=False)[0, len(IDS) :].tolist()
    torch.testing.assert_close(reading.logits, expected)
    assert reading.tokens == [token for token in answer if token != 0]
    assert [call.layer for call in calls] == [0, 1]
    assert reading.attention_seconds == [call.seconds for call in calls]
    assert (reading.calls, reading.density, reading.dense_reasons) == ([], 1.0, "")


def test_a_sparse_reading_says_what_each_layer_did(model):
    dense, sparse = (read(model, IDS, policy, dense_below=0) for policy in (None, SMALL))
    assert [call.sparse for call in sparse.calls] == [True, True]
    assert 0 < sparse.density < 1
    assert agreement(dense, sparse)["kl"] > 1e-9
    everything = read(model, IDS, Stem.uniform(block_size=16, ratio_short=1.0, ratio_long=1.0), dense_below=0)
    assert agreement(dense, everything)["kl"] < 1e-9
    first = read(model, IDS, SMALL, dense_below=0, dense_layers=1)
    assert [call.sparse for call in first.calls] == [False, True]
    short = read(model, IDS, SMALL, dense_below=1000)
    assert (short.density, short.dense_reasons) == (1.0, "short prompt")


@pytest.mark.parametrize(("kind", "name"), [("llama", "sdpa"), pytest.param("gemma2", "eager", marks=pytest.mark.newer_host)])
def test_dense_attention_is_the_hosts_default(kind, name):
    model, before, calls = toy(kind), dict(ALL_ATTENTION_FUNCTIONS), []
    assert default_attention(model) == name
    with watch(name, calls.append):
        model.set_attn_implementation(name)
        model(torch.tensor([IDS]))
    assert [call.layer for call in calls] == [0, 1]
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    with attending(model, SMALL) as used:
        assert (used, model.config._attn_implementation) == ("stem", "stem")


@pytest.mark.parametrize("policy", [None, SMALL])
def test_a_model_that_gives_nan(policy, model):
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(UnsupportedError, match=f"gives NaN, {'dense' if policy is None else 'sparse'}"):
        read(model, IDS, policy, dense_below=0)


def test_a_view_shows_the_shares_of_dense_attention_and_what_of_them_is_kept(model):
    seen = {}
    recorder = HeadRecorder([1], [3])

    def record(call):
        recorder(call)
        seen[call.layer] = call

    reading = read(model, IDS, SMALL, dense_below=0, on_attention=record)
    (view,) = recorder.views(reading)
    call = seen[1]
    scores = call.q[0, 3] @ call.k[0, 1].T * call.scale
    weights = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)
    for row in range(13):
        mean = torch.nn.functional.pad(weights[row * 16 : (row + 1) * 16].mean(0), (0, 8)).unflatten(0, (-1, 16)).sum(1)
        torch.testing.assert_close(view.attention[row, : row + 1], mean[: row + 1], rtol=1e-4, atol=1e-6)
        assert bool(view.attention[row, row + 1 :].isnan().all())
    selection = selections_by_layer(reading)[1]
    assert torch.equal(view.kept, selection.to_mask()[0, 3])
    expected = torch.stack([view.attention[row, : row + 1][view.kept[row, : row + 1]].sum() for row in range(13)]).mean()
    assert view.kept_attention == pytest.approx(float(expected), rel=1e-5)
    assert view.density < view.kept_attention < 1
    assert reach(reading)[1, 3] == view.median_distance
    assert (selection.counts[0, :, 12] == 13).all(), "the last row keeps all"
