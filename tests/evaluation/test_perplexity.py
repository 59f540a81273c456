"""Perplexity of a tiny random model against the sums written out, and what sparse reading does to it."""

import math

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from stem_attention import StemConfig, UnsupportedError
from stem_attention.evaluation.models import take_stem
from stem_attention.evaluation.perplexity import read_text, score_text, stdlib_text, text_ids
from stem_attention.policies import SinkWindow

TOKENS = 700  # more than one slice of logits, and no multiple of one
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.3,
}  # fmt: skip
KEEP_ALL = StemConfig(ratio_short=1.0, ratio_long=1.0, decay=1.0, dense_below=0)
SPARSE = StemConfig(block_size=32, ratio_short=0.1, min_blocks=1, sink_blocks=1, local_blocks=1, tail_blocks=0, dense_below=0)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    take_stem(model)
    return model


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return torch.randint(97, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()


def logits(model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, :-1].double()


def test_perplexity_is_that_of_the_models_own_logits(model, ids: list[int]) -> None:
    dense = read_text(model, ids, None)
    score = score_text(model, ids, dense, dense)
    losses = torch.nn.functional.cross_entropy(logits(model, ids), torch.tensor(ids[1:]), reduction="none")
    assert score.tokens == TOKENS - 1
    assert score.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert score.perplexity_last_half == pytest.approx(math.exp(losses[(TOKENS - 1) // 2 :].mean()), rel=1e-5)
    assert (score.kl, score.top1) == (0.0, 1.0)
    assert dense.reading.density == 1.0


def test_sparse_scores_are_those_of_the_two_sets_of_logits(model, ids: list[int]) -> None:
    dense, sparse = read_text(model, ids, None), read_text(model, ids, SinkWindow(1, 1, 32))
    score = score_text(model, ids, dense, sparse)
    model.set_attn_implementation("sdpa")  # the last reading left it on "stem"
    p = logits(model, ids).log_softmax(-1)
    with torch.inference_mode():
        q = model.lm_head(sparse.hidden[:-1]).double().log_softmax(-1)
    assert score.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert score.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert score.kl > 0
    assert score.top1 < 1


def test_keeping_everything_scores_as_dense(model, ids: list[int]) -> None:
    dense, all_kept = read_text(model, ids, None), read_text(model, ids, KEEP_ALL)
    score = score_text(model, ids, dense, all_kept)
    assert all_kept.reading.density == 1.0
    assert [call.sparse for call in all_kept.reading.calls] == [True, True]
    assert score.perplexity == pytest.approx(score_text(model, ids, dense, dense).perplexity, rel=1e-5)
    assert score.kl < 1e-9


def test_density_is_the_mean_over_layers_and_dense_layers_count_as_one(model, ids: list[int]) -> None:
    reading = read_text(model, ids, StemConfig.from_dict({**SPARSE.to_dict(), "dense_layers": 1})).reading
    kept = reading.calls[1].selection
    assert kept is not None
    assert reading.density == pytest.approx((1 + kept.density()) / 2)
    assert kept.density() < 0.5


def test_watcher_sees_every_layer(model, ids: list[int]) -> None:
    seen: list[int] = []
    read_text(model, ids, SPARSE, on_attention=lambda call: seen.append(call.layer))
    assert seen == [0, 1]


def test_model_that_scales_its_logits_after_the_head_is_refused() -> None:
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)).eval()
    with pytest.raises(UnsupportedError, match="GraniteForCausalLM changes its logits"):
        read_text(model, [1, 2, 3, 4], None)
    assert not model.base_model._forward_hooks


class Bytes:
    """Stands for a tokenizer: one token per byte."""

    def __call__(self, text: str) -> "Bytes":
        self.input_ids = list(text.encode())
        return self


def test_text_is_cut_to_length_and_too_short_a_text_is_refused() -> None:
    assert text_ids(Bytes(), "abcdef", 3) == [97, 98, 99]
    with pytest.raises(ValueError, match="text: expected at least 7 tokens, got 6"):
        text_ids(Bytes(), "abcdef", 7)
    with pytest.raises(ValueError, match="tokens: expected an integer >= 2"):
        text_ids(Bytes(), "abcdef", 1)


def test_standard_library_gives_a_long_text_that_repeats() -> None:
    text = stdlib_text()
    assert len(text) > 500_000
    assert text == stdlib_text()
