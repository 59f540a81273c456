"""Time to first token: the models are the right ones, the check can fail, and the parts are those of the whole."""

import pytest
import torch
from tests.evals.records import bench_setup
from transformers import AttentionInterface

from stem_attention import Mass
from stem_attention.integrations.transformers.attention import MIN_QUERY_LEN
from stem_evals.bench import ttft
from stem_evals.bench.checks import WrongResultError
from stem_evals.bench.peers import STEM
from stem_evals.bench.ttft_contestants import Contestant, check_contestants, contestants, observe
from stem_evals.bench.ttft_models import ARCHITECTURES, build_model, prefill, random_tokens

CPU = torch.device("cpu")
POLICY = Mass(block_size=32)


@pytest.fixture
def tiny():
    return build_model(ARCHITECTURES["tiny"], torch.float32, CPU, seed=0)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-3.1-8b", 8030261248), ("qwen3-8b", 8190735360), ("qwen2.5-7b", 7615616512), ("llama-3.2-1b", 1235814400)],
)
def test_architectures_have_as_many_parameters_as_the_published_models(name, parameters):
    model = build_model(ARCHITECTURES[name], torch.bfloat16, torch.device("meta"), seed=0)
    assert sum(x.numel() for x in model.parameters()) == parameters
    assert model.get_submodule("model.layers.0.self_attn").head_dim == ARCHITECTURES[name].heads.head_dim
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}


def test_everyone_is_checked_against_plain_attention(tiny):
    absent = Contestant("FlashAttention-9", "flash_attention_9", installed=False)
    checks, left_out = check_contestants(tiny, [absent, *contestants(CPU, POLICY, 0)], random_tokens(tiny, 200, 0))
    assert left_out == {"FlashAttention-9": "not installed"}
    assert checks.keys() == {"SDPA", STEM}
    assert all(check["attention"] < 1e-6 and check["logits"] < 1e-5 for check in checks.values())


def test_a_wrong_stem_is_not_timed(tiny, monkeypatch):
    right = AttentionInterface._global_mapping["stem"]
    wrong = lambda *args, **kwargs: (right(*args, **kwargs)[0] * 1.001, None)  # noqa: E731
    monkeypatch.setitem(AttentionInterface._global_mapping, "stem", wrong)
    with pytest.raises(WrongResultError, match="wrong result at 200 tokens: wrong: attention differ"):
        check_contestants(tiny, contestants(CPU, POLICY, 0), random_tokens(tiny, 200, 0))


def test_a_stem_that_would_run_dense_is_not_timed(tiny):
    # Too few queries for the sparse path: every layer is the host's own dense attention, and its result right.
    with pytest.raises(WrongResultError, match="did not run sparse at 31 tokens: short query"):
        check_contestants(tiny, contestants(CPU, POLICY, 0), random_tokens(tiny, MIN_QUERY_LEN - 1, 0))


def test_attention_lies_inside_the_whole_and_observing_changes_nothing(tiny):
    tokens, sdpa = random_tokens(tiny, 300, 0), Contestant("SDPA", "sdpa")
    before = prefill(tiny, tokens)
    with torch.inference_mode():  # the last logits are those of the whole prompt
        torch.testing.assert_close(before, tiny(tokens).logits[:, -1])
    observed = observe(tiny, sdpa, tokens, layer=1)
    assert torch.equal(observed.logits, before)
    assert 0 < observed.seconds["attention"] < observed.seconds["total"]
    assert observed.qkv[0].shape == observed.out.shape == (1, 300, 4, 16)
    assert torch.equal(prefill(tiny, tokens), before)


def test_every_length_has_first_call_parts_repeats_and_density(tiny):
    steps, announced = [], []

    def start(name, total):
        announced.append(total)
        return lambda: steps.append(name)

    for length, sparse in ((500, False), (1500, True)):
        result = ttft.time_prefill(tiny, ["SDPA", STEM], length, bench_setup(POLICY, start=start, dense_below=1000, repeats=2))
        assert (result["density"] < 1) == sparse
        timings = result["timings"]
        assert timings.keys() == {"SDPA", STEM}
        assert all(len(taken["warm"]) == 2 and taken["first"] > 0 and taken["peak"] is None for taken in timings.values())
        assert result["ratios"]["total"] == timings["SDPA"]["seconds"] / timings[STEM]["seconds"]
    assert announced == [8, 8]
    assert steps == ["500 tokens"] * 8 + ["1500 tokens"] * 8


def test_density_is_that_of_the_middle_layers_own_factors(tiny):
    def density(*factors):
        policy = Mass(block_size=32, head_factors=factors)
        return ttft.time_prefill(tiny, [STEM], 800, bench_setup(policy))["density"]

    low, high = (0.1,) * 4, (100.0,) * 4
    assert density(low, high) < density(high, low)  # of the second of two layers


def test_out_of_memory_leaves_one_out_and_times_the_others(tiny, monkeypatch):
    def exhausted(model, *_):
        if model.config._attn_implementation == "sdpa":
            raise torch.OutOfMemoryError
        return 1.0

    monkeypatch.setattr(ttft, "prefill_seconds", exhausted)
    result = ttft.time_prefill(tiny, ["SDPA", STEM], 300, bench_setup(POLICY))
    assert result["left_out"] == {"SDPA": "out of memory"}
    assert list(result["timings"]) == [STEM]
    assert result["ratios"] == {}


def test_ratios_are_to_the_fastest_dense_peer():
    def timing(seconds, peak):
        return {"seconds": seconds, "parts": {"attention": seconds / 2}, "peak": peak}

    found = ttft.ratios({"quick": timing(1.0, 200), "slow": timing(4.0, 150), STEM: timing(0.5, 206)})
    assert found == {"total": 2.0, "attention": 2.0, "memory": 1.03}
