"""A model on "stem" is sparse where it should be, dense where it must be, and says which."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stem_attention import StemConfig, UnsupportedError
from stem_attention.integrations import transformers as integration
from stem_attention.integrations import transformers_dense, transformers_mask
from stem_attention.integrations.transformers import (
    MIN_QUERY_LEN,
    LayerCall,
    attention_forward,
    configure,
    register,
    set_config,
)
from stem_attention.policies import Stem
from stem_attention.policies.budget import row_budgets

from .tiny import MIXED, SMALL, build

transformers = pytest.importorskip("transformers")
register()

SPARSE = StemConfig(dense_below=0, block_size=16, stride=4, sink_blocks=1, local_blocks=1, tail_blocks=1, min_blocks=2)
LENGTH = 320


@pytest.fixture(scope="module")
def llama() -> Any:
    return build(transformers.LlamaConfig(**SMALL))


def tokens(batch: int = 1, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def observed(model: Any, policy: Any = SPARSE, prompt_len: int | None = None, **inputs: Any) -> tuple[Any, list[LayerCall]]:
    calls: list[LayerCall] = []
    with torch.no_grad(), configure(policy, observer=calls.append, prompt_len=prompt_len):
        return model(**inputs), calls


def logits(model: Any, policy: Any = SPARSE, **inputs: Any) -> Tensor:
    with torch.no_grad(), configure(policy):
        out: Tensor = model(**inputs).logits
    return out


def test_a_long_prompt_is_sparse_with_the_budgets_of_the_config(llama: Any) -> None:
    out, calls = observed(llama, input_ids=tokens())
    kept = sum(row_budgets(SPARSE, LENGTH // 16))
    assert [(call.layer, call.q_len, call.kv_len, call.sparse, call.reason) for call in calls] == [
        (layer, LENGTH, LENGTH, True, "prefill") for layer in range(3)
    ]
    assert all(call.selection is not None and call.seconds > 0 for call in calls)
    assert [call.selection.density() for call in calls if call.selection] == [kept / (20 * 21 // 2)] * 3
    assert torch.equal(logits(llama, input_ids=tokens()), out.logits)
    dense = logits(llama, StemConfig(dense_below=10_000), input_ids=tokens())
    assert (dense - out.logits).abs().max() > 0.01


@pytest.mark.parametrize("policy", [Stem(SPARSE), SPARSE], ids=["policy", "config"])
def test_a_policy_runs_like_its_config(llama: Any, policy: Any) -> None:
    torch.testing.assert_close(logits(llama, policy, input_ids=tokens()), logits(llama, input_ids=tokens()))


def test_left_padded_rows_are_computed_as_if_they_came_alone() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, LENGTH, 16, generator=g) for heads in (4, 2, 2))
    module = torch.nn.Module()
    starts = (0, 37, 37)
    mask = torch.stack([torch.arange(LENGTH) >= start for start in starts])
    with configure(SPARSE):
        out, _ = attention_forward(module, q, k, v, mask)
        for row, start in enumerate(starts):
            alone, _ = attention_forward(module, *(x[row : row + 1, :, start:] for x in (q, k, v)), None)
            assert torch.equal(out[row : row + 1, start:], alone)
            assert not out[row, :start].any()
        continued, _ = attention_forward(module, q[:, :, 100:], k, v, mask)
        alone, _ = attention_forward(module, q[1:, :, 100:], k[1:, :, 37:], v[1:, :, 37:], None)
        assert torch.equal(continued[1:], alone)


def test_rows_of_padding_alone_give_zeros() -> None:
    q = torch.randn(2, 4, 64, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1] = False
    with configure(SPARSE):
        out, _ = attention_forward(torch.nn.Module(), q, q, q, mask)
    assert out[0].any()
    assert not out[1].any()


def test_a_padded_batch_is_seen_row_by_row_and_short_rows_stay_dense(llama: Any) -> None:
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1:, :200] = 0
    policy = StemConfig(**{**SPARSE.to_dict(), "dense_below": 200})
    inputs = {"input_ids": tokens(3), "attention_mask": mask}
    out, calls = observed(llama, policy, **inputs)
    assert [(call.kv_len, call.sparse, call.reason) for call in calls[:2]] == [
        (LENGTH, True, "prefill"),
        (120, False, "short prompt"),
    ]
    torch.testing.assert_close(logits(llama, policy, **inputs)[mask.bool()], out.logits[mask.bool()])


def chunked(model: Any, ids: Tensor, size: int, prompt_len: int | None) -> tuple[Tensor, list[LayerCall]]:
    cache, pieces, calls = transformers.DynamicCache(config=model.config), [], []
    for chunk in ids.split(size, 1):
        out, seen = observed(model, prompt_len=prompt_len, input_ids=chunk, past_key_values=cache)
        pieces.append(out.logits)
        calls += seen
    return torch.cat(pieces, 1), calls


def test_chunks_keep_the_blocks_of_one_call_when_the_prompt_length_is_known(llama: Any) -> None:
    whole, calls = observed(llama, input_ids=tokens())
    pieces, chunk_calls = chunked(llama, tokens(), 64, LENGTH)
    torch.testing.assert_close(pieces, whole.logits, atol=1e-4, rtol=1e-4)
    for layer, call in enumerate(calls):
        assert call.selection is not None
        masks = [chunk.selection.to_mask() for chunk in chunk_calls if chunk.layer == layer and chunk.selection]
        padded = [torch.nn.functional.pad(mask, (0, LENGTH // 16 - mask.shape[3])) for mask in masks]
        assert torch.equal(torch.cat(padded, 2), call.selection.to_mask())
    unaware, _ = chunked(llama, tokens(), 64, None)
    assert (unaware - whole.logits).abs().max() > 0.01


def test_a_prompt_length_that_is_too_small_is_named(llama: Any) -> None:
    with pytest.raises(ValueError, match="prompt_len"):
        observed(llama, prompt_len=LENGTH - 1, input_ids=tokens())


def test_decode_and_short_queries_are_dense(llama: Any) -> None:
    cache = transformers.DynamicCache(config=llama.config)
    reasons = []
    for length in (100, 1, MIN_QUERY_LEN - 1, MIN_QUERY_LEN):
        _, calls = observed(llama, input_ids=tokens(length=length), past_key_values=cache)
        reasons.append({call.reason for call in calls})
    assert reasons == [{"prefill"}, {"decode"}, {"short query"}, {"prefill"}]


def test_the_first_layers_can_be_left_dense(llama: Any) -> None:
    _, calls = observed(llama, StemConfig(**{**SPARSE.to_dict(), "dense_layers": 2}), input_ids=tokens())
    assert [call.reason for call in calls] == ["dense layer", "dense layer", "prefill"]


@pytest.mark.parametrize("whole_mask", [True, False], ids=["one mask", "pieces"])
@pytest.mark.parametrize("kind", ["Qwen3Config", "Gemma3TextConfig"])
def test_sliding_layers_are_dense_however_long(kind: str, whole_mask: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a size the mask of a window is built in pieces; a low limit shows it on a short prompt."""
    if not whole_mask:
        monkeypatch.setattr(transformers_mask, "WINDOW_MASK_ENTRIES", 0)
        monkeypatch.setattr(transformers_dense, "_MIN_WINDOW_ROWS", 50)
    extra = {"use_sliding_window": True, "max_window_layers": 1} if kind == "Qwen3Config" else {}
    stem, host = (build(getattr(transformers, kind)(**SMALL, **MIXED, **extra), name) for name in ("stem", "sdpa"))
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :90] = 0
    keep_all = StemConfig(dense_below=0, ratio_short=1, ratio_long=1, decay=1, block_size=16, stride=4)
    caches = [transformers.DynamicCache(config=model.config) for model in (stem, host)]
    for step, end in ((0, 200), (200, LENGTH)):
        inputs = {"input_ids": tokens(2)[:, step:end], "attention_mask": mask[:, :end]}
        out, calls = observed(stem, keep_all, past_key_values=caches[0], **inputs)
        assert {call.layer: call.reason for call in calls} == {0: "prefill", 1: "sliding window", 2: "prefill"}
        expected = logits(host, past_key_values=caches[1], **inputs)
        real = mask[:, step:end].bool()
        torch.testing.assert_close(out.logits[real], expected[real], atol=2e-4, rtol=1e-4)


def test_the_host_gets_no_gradient_from_the_sparse_path(llama: Any) -> None:
    with configure(SPARSE), pytest.raises(UnsupportedError, match="no_grad"):
        llama(input_ids=tokens())


def test_a_context_ends_and_belongs_to_its_thread(llama: Any) -> None:
    results: list[Tensor] = []
    dense = logits(llama, None, input_ids=tokens())
    with configure(SPARSE):
        worker = threading.Thread(target=lambda: results.append(logits(llama, None, input_ids=tokens())))
        worker.start()
        worker.join()
        with configure(StemConfig()), torch.no_grad():
            results.append(llama(input_ids=tokens()).logits)
    results.append(logits(llama, None, input_ids=tokens()))
    assert all(torch.equal(result, dense) for result in results)
    assert not torch.equal(logits(llama, SPARSE, input_ids=tokens()), dense)


@pytest.mark.parametrize(
    "arguments",
    [{"policy": "stem"}, {"observer": 3}, {"prompt_len": 0}, {"prompt_len": True}],
    ids=["policy", "observer", "prompt_len", "bool"],
)
def test_configure_names_a_bad_argument(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(arguments))}: expected"), configure(**arguments):
        pass


LAYERS = ((0.1, 0.5, 2.0, 9.0), (4.0, 4.0, 0.2, 1.0), (0.3, 6.0, 1.0, 1.0))
BY_MASS = StemConfig.mass(dense_below=0, block_size=16, query_pool=4, key_pool=4, tail_blocks=1, local_blocks=1)


def test_each_layer_and_head_obeys_its_own_factor(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs: list[tuple[Tensor, Tensor, Tensor]] = []
    choose = integration.select_blocks

    def noting(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        inputs.append((q, k, v))
        return choose(q, k, v, **options)

    monkeypatch.setattr(integration, "select_blocks", noting)
    _, calls = observed(llama, replace(BY_MASS, head_factors=LAYERS), input_ids=tokens())
    assert [call.layer for call in calls] == [0, 1, 2]
    for (q, k, v), row, call in zip(inputs, LAYERS, calls, strict=True):
        assert call.selection is not None
        for head, factor in enumerate(row):
            alone = choose(q, k, v, config=replace(BY_MASS, share=BY_MASS.share * factor), scale=0.25)
            assert torch.equal(call.selection.to_mask()[:, head], alone.to_mask()[:, head])
        assert len(call.selection.counts.sum(2).unique()) > 1  # or these factors show nothing


def test_factors_of_another_model_are_refused(llama: Any) -> None:
    fewer_heads = replace(BY_MASS, head_factors=[row[:3] for row in LAYERS])
    with pytest.raises(ValueError, match="head_factors of one layer and the 4 query heads of q, got 1 x 3 of them"):
        logits(llama, fewer_heads, input_ids=tokens())
    with pytest.raises(ValueError, match="layer: expected one of the 2 layers of head_factors, got 2"):
        logits(llama, replace(BY_MASS, head_factors=LAYERS[:2]), input_ids=tokens())


def test_torch_compile_takes_each_layers_factors_in_one_graph() -> None:
    torch.compiler.reset()
    model = build(transformers.LlamaConfig(**SMALL))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    config, plain = replace(BY_MASS, head_factors=LAYERS), logits(model, BY_MASS, input_ids=tokens())
    eager = logits(model, config, input_ids=tokens())
    assert (eager - plain).abs().max() > 0.01  # or these factors show nothing
    torch.testing.assert_close(logits(compiled, config, input_ids=tokens()), eager)
    torch.testing.assert_close(
        logits(compiled, replace(config, head_factors=LAYERS[:1]), input_ids=tokens()),
        logits(model, replace(config, head_factors=LAYERS[:1]), input_ids=tokens()),
    )
    set_config(model, config)
    torch.testing.assert_close(logits(compiled, None, input_ids=tokens()), eager)


def test_torch_compile_follows_the_settings() -> None:
    torch.compiler.reset()
    model = build(transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 1}))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    other = StemConfig(**{**SPARSE.to_dict(), "ratio_short": 0.5, "ratio_long": 0.4})
    sparse, dense = (logits(compiled, policy, input_ids=tokens()) for policy in (SPARSE, None))
    set_config(model, other)
    stored = logits(compiled, None, input_ids=tokens())
    for policy, result in ((SPARSE, sparse), (StemConfig(), dense), (other, stored)):
        torch.testing.assert_close(result, logits(model, policy, input_ids=tokens()))
    assert min((sparse - dense).abs().max(), (sparse - stored).abs().max(), (dense - stored).abs().max()) > 0.01
