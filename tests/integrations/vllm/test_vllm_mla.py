"""Multi-head latent attention in vLLM: prompts that a step reads whole take Stem, all else is the host's prefill backend."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
pytest.importorskip("vllm.v1.attention.backends.mla.prefill.registry", reason="this vLLM has no MLA prefill backends")

from vllm.model_executor.layers.attention.mla_attention import MLACommonPrefillMetadata
from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum

from stem_attention import Mass, UnsupportedError, stem_attention
from stem_attention.integrations.vllm import counters, mla

from .served import KEEP_ALL, SIZES, generate, prompts

HEADS, DIM, VALUE_DIM = 4, 192, 128
SPARSE = {"policy": "mass:share=8", "dense_below": 0, "min_query_len": 32}
LATENT = {
    "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": VALUE_DIM,
    "num_key_value_heads": SIZES["num_attention_heads"], "first_k_dense_replace": 2, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def deepseek(models):
    return models("DeepseekV2Config", **LATENT)


def start(engine: Any, model: Any, settings: dict[str, Any] | None) -> Any:
    """An engine in fp32; vLLM's other CPU backend for MLA computes in bf16 alone."""
    if settings is None:
        return engine(model, attention_config={"backend": "CPU_MLA"})
    asked = {"backend": "CPU_MLA", "mla_prefill_backend": "CUSTOM"}
    return engine(model, attention_config=asked, additional_config={"stem_attention": settings})


@pytest.fixture
def calls(monkeypatch):
    """Every sparse call, one a layer and step, and its result."""
    seen: list[Any] = []
    run = mla.run

    def spy(call: Any) -> Any:
        seen.append((call, run(call)))
        return seen[-1][1]

    monkeypatch.setattr(mla, "run", spy)
    return seen


@pytest.mark.parametrize("min_query_len", [32, 300])
def test_tokens_are_the_hosts(min_query_len, deepseek, engine, calls):
    asked = prompts(700, 37, 1001, 300, 129)
    expected = generate(start(engine, deepseek, None), asked)
    assert not counters()["sparse_rows"]
    assert generate(start(engine, deepseek, {**KEEP_ALL, "min_query_len": min_query_len}), asked) == expected
    sparse = sum(len(prompt) >= min_query_len for prompt in asked)
    assert counters()["sparse_rows"] == sparse
    assert counters()["dense_rows"] == ({} if sparse == 5 else {"short chunk": 5 - sparse})
    assert len(calls) % 2 == 0, "both layers"


def test_long_prompts_are_read_sparsely(deepseek, engine, calls):
    generate(start(engine, deepseek, SPARSE), prompts(1500))
    assert len(calls) == 2
    for call, (out, _) in calls:
        assert (call.q.shape, call.v.shape) == ((1500, HEADS, DIM), (1500, HEADS, VALUE_DIM))
        again = stem_attention(
            call.q[None], call.k[None], call.v[None], policy=Mass(share=8.0), dense_below=0, scale=call.scale
        )
        torch.testing.assert_close(out[None], again, rtol=1e-5, atol=1e-5)
    assert counters()["density"] < 0.9


def built(settings: dict[str, Any], asked: bool = True) -> Any:
    """A prefill backend as a layer of vLLM builds it."""
    attention = SimpleNamespace(mla_prefill_backend=MLAPrefillBackendEnum.CUSTOM if asked else None)
    parallel = SimpleNamespace(decode_context_parallel_size=1, use_ubatching=False)
    config = SimpleNamespace(
        attention_config=attention, parallel_config=parallel, cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        model_config=SimpleNamespace(dtype=torch.float32), additional_config={"stem_attention": settings},
    )  # fmt: skip
    sizes = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": VALUE_DIM}
    return mla.StemMLAPrefill(num_heads=HEADS, scale=DIM**-0.5, **sizes, vllm_config=config)


@dataclass
class Vllm026Step:
    """A step's prefill metadata as vLLM 0.26 has them: lengths are on the device, those of earlier chunks are cut in pieces."""

    query_start_loc: torch.Tensor
    max_query_len: int
    chunked_context: Any


@pytest.mark.parametrize("is_026", [False, True], ids=["0.32", "0.26"])
@pytest.mark.parametrize("context", [None, [0, 90, 0, 0], [0, 0, 0, 64], [10] * 4], ids=["none", "middle", "last", "all"])
def test_rows_with_earlier_chunks_are_the_hosts_and_all_have_the_log_sum_exp(context, is_026, calls, monkeypatch):
    """Two steps after one another, of four prompts, of which one is too short."""
    lengths = [70, 50, 9, 33]
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    chunked = None if context is None else SimpleNamespace(context_lens_list=context)
    step = MLACommonPrefillMetadata(
        block_table=torch.zeros(4, 1), query_start_loc=starts, max_query_len=70, chunked_context=chunked,
        query_lens_cpu=torch.tensor(lengths),
    )  # fmt: skip
    if is_026:
        pieces = torch.tensor([[min(n, 64) for n in context or []], [max(n - 64, 0) for n in context or []]])
        step = Vllm026Step(starts, 70, None if context is None else SimpleNamespace(seq_lens=pieces))
    q, k = torch.randn(2, 162, HEADS, DIM)
    v = torch.randn(162, HEADS, 2 * VALUE_DIM)[..., VALUE_DIM:]  # as vLLM hands them over, beside the keys
    results, told = [], list[Any]()
    monkeypatch.setattr(mla, "report_now_and_then", told.append)
    for backend in (built(KEEP_ALL, asked=False), built(KEEP_ALL)):
        backend.clone()
        for _ in range(2):
            backend.prepare_metadata(step)
            results.append(backend.run_prefill_new_tokens(q, k, v, True))
            results.append((backend.run_prefill_new_tokens(q, k, v, False), results[-1][1]))
    for out, lse in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse, results[0][1], rtol=1e-4, atol=1e-5)
    taken = [n >= 32 and not before for n, before in zip(lengths, context or [0] * 4, strict=True)]
    assert {call.batch.sequences for call, _ in calls} == ({sum(taken)} if any(taken) else set())
    assert len(told) == 2 * any(taken), "every step with sparse rows may report"
    dense = counters()["dense_rows"]
    assert dense.get("earlier chunks", 0) == 2 * sum(map(bool, context or []))


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"dense_layers": 1}, "dense_layers"), ({"policy": {"policy": "mass", "head_factors": [[1.0] * 4] * 2}}, "every layer")],
)
def test_what_belongs_to_one_layer_is_refused(settings, what):
    with pytest.raises(UnsupportedError, match=f"leave out .*{what}"):
        built(settings)
