"""Time to first token: the models are the right ones, the check can fail, and the parts are those of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stem_attention import StemConfig

pytest.importorskip("transformers")

from stem_attention.evaluation import bench_ttft
from stem_attention.evaluation.bench_ttft import PrefillResult, Timing, outpaced, pass_count, repeat_count, time_lengths
from stem_attention.evaluation.bench_ttft_contestants import (
    STEM,
    Contestant,
    WrongResultError,
    check_contestants,
    contestants,
)
from stem_attention.evaluation.bench_ttft_models import ARCHITECTURES, build_model, prefill, random_tokens
from stem_attention.evaluation.bench_ttft_parts import Parts, observe
from stem_attention.integrations import transformers as integration

CPU = torch.device("cpu")
SPARSE = StemConfig(dense_below=0, block_size=32, stride=8)


@pytest.fixture
def tiny() -> Any:
    return build_model(ARCHITECTURES["tiny"], torch.float32, CPU, seed=0)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-3.1-8b", 8030261248), ("qwen3-8b", 8190735360), ("qwen2.5-7b", 7615616512), ("llama-3.2-1b", 1235814400)],
)
def test_architectures_have_as_many_parameters_as_the_published_models(name, parameters):
    model = build_model(ARCHITECTURES[name], torch.bfloat16, torch.device("meta"), seed=0)
    assert sum(x.numel() for x in model.parameters()) == parameters
    attention = model.get_submodule("model.layers.0.self_attn")
    assert attention.head_dim == ARCHITECTURES[name].head_dim
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}


def test_everyone_is_checked_against_plain_attention(tiny):
    admitted, checks, left_out = check_contestants(tiny, contestants(CPU, dense=True), random_tokens(tiny, 200, 0), SPARSE)
    assert [entrant.name for entrant in admitted] == ["SDPA", STEM]
    assert left_out == {}
    assert all(check.attention < 1e-6 and check.logits < 1e-5 for check in checks.values())


def test_a_wrong_stem_is_not_timed(tiny, monkeypatch):
    right = integration.stem_attention
    monkeypatch.setattr(integration, "stem_attention", lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    with pytest.raises(WrongResultError, match="wrong result at 200 tokens: attention differ"):
        check_contestants(tiny, contestants(CPU, dense=False), random_tokens(tiny, 200, 0), SPARSE)


def test_a_stem_that_would_run_dense_is_not_timed(tiny):
    # Too few queries for the sparse path: every layer is the host's own dense attention, and its result right.
    tokens = random_tokens(tiny, integration.MIN_QUERY_LEN - 1, 0)
    with pytest.raises(WrongResultError, match="2 layers ran dense: short query"):
        check_contestants(tiny, contestants(CPU, dense=False), tokens, SPARSE)


def test_a_peer_that_is_not_installed_is_left_out(tiny):
    absent = [
        Contestant("no package", "flash_attention_4", module="flash_attn.cute"),
        Contestant("another's package", "flash_attention_3", module="torch"),
    ]
    admitted, _, left_out = check_contestants(tiny, [*absent, *contestants(CPU, False)], random_tokens(tiny, 200, 0), SPARSE)
    assert [entrant.name for entrant in admitted] == [STEM]
    assert left_out == {"no package": "not installed", "another's package": "not installed"}


def test_parts_lie_inside_the_whole_and_observing_changes_nothing(tiny):
    tokens = random_tokens(tiny, 300, 0)
    before = prefill(tiny, tokens)
    observed = observe(tiny, tokens, layer=1)
    assert torch.equal(observed.logits, before)
    assert 0 < observed.parts.attention + observed.parts.mlp < observed.parts.total
    assert observed.layer.query.shape == (1, 4, 300, 16)
    assert observed.layer.out.shape == (1, 300, 4, 16)
    assert torch.equal(prefill(tiny, tokens), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.modules())


def test_the_last_logits_are_those_of_the_whole_prompt(tiny):
    tokens = random_tokens(tiny, 100, 0)
    with torch.inference_mode():
        expected = tiny(tokens).logits[:, -1]
    torch.testing.assert_close(prefill(tiny, tokens), expected)


def test_every_length_has_first_call_parts_repeats_and_density(tiny):
    passes: dict[int, int] = {}
    announced = {}

    def start(length: int, total: int) -> Any:
        announced[length], passes[length] = total, 0
        return lambda: passes.__setitem__(length, passes[length] + 1)

    entrants = contestants(CPU, dense=True)
    config = StemConfig(dense_below=1000, block_size=32, stride=8)
    results = time_lengths(tiny, entrants, [500, 1500], config, repeats=2, seed=0, on_length=start)
    assert passes == announced == {500: 8, 1500: 8}
    assert [result.density for result in results] == [1.0, pytest.approx(results[1].density)]
    assert 0 < results[1].density < 1
    for result in results:
        assert set(result.timings) == {"SDPA", STEM}
        assert all(len(t.warm) == 2 and t.first is not None and t.peak is None for t in result.timings.values())
        assert result.ratios["total"] == result.timings["SDPA"].seconds / result.timings[STEM].seconds


def test_the_density_is_that_of_the_observed_layers_own_factors(tiny):
    def density(*factors: tuple[float, ...]) -> float:
        config = StemConfig.mass(dense_below=0, key_pool=16, block_size=32, head_factors=factors)
        (result,) = time_lengths(
            tiny, contestants(CPU, dense=False), [800], config, repeats=1, seed=0, on_length=lambda *_: lambda: None
        )
        return result.density

    low, high = (0.1,) * 4, (100.0,) * 4
    assert density(low, high) < density(high, low)  # of the second of two layers


def test_out_of_memory_leaves_one_out_and_times_the_others(tiny, monkeypatch):
    def exhausted(model: Any, *_: Any) -> float:
        if model.config._attn_implementation == "sdpa":
            raise torch.OutOfMemoryError
        return 1.0

    monkeypatch.setattr(bench_ttft, "prefill_seconds", exhausted)
    entrants = contestants(CPU, dense=True)
    (result,) = time_lengths(tiny, entrants, [300], SPARSE, repeats=1, seed=0, on_length=lambda *_: lambda: None)
    assert result.left_out == {"SDPA": "out of memory"}
    assert list(result.timings) == [STEM]
    assert result.ratios == {}


def timed(**seconds: float) -> dict[str, Timing]:
    return {name: Timing(warm=[second], parts=Parts(second, second / 2, 0.0)) for name, second in seconds.items()}


def test_clearly_slower_peers_rest_at_long_lengths():
    before = PrefillResult(32768, 0.3, timed(quick=1.0, near=1.05, slow=1.3, Stem=0.5), {"gone": "out of memory"})
    assert outpaced([before], 65535) == {}
    assert outpaced([], 65536) == {}
    assert outpaced([before], 65536) == {"gone": "out of memory", "slow": "1.30 times the time of quick at 32768 tokens"}


def test_ratios_are_to_the_fastest_dense_peer():
    result = PrefillResult(8192, 0.3, timed(quick=1.0, slow=4.0, Stem=0.5), {})
    result.timings["quick"].peak, result.timings[STEM].peak = 200, 206
    assert result.ratios == {"total": 2.0, "attention": 2.0, "memory": 1.03}


def test_longer_prompts_repeat_less_and_dense_peers_make_no_first_call_there():
    assert [repeat_count(n, None) for n in (8192, 32768, 65536)] == [5, 3, 2]
    assert repeat_count(65536, 7) == 7
    entrants = [Contestant("dense", "sdpa"), Contestant(STEM, "stem")]
    assert pass_count(8192, entrants, 3) == 10
    assert pass_count(65536, entrants, 2) == 7
