"""A model on "stem" is sparse where it should be, dense where it must be, and says which."""

from dataclasses import replace

import pytest
import torch

from stem_attention import Stem, block_sparse_attention, select_blocks
from stem_attention.integrations.transformers import attention, mask

from .tiny import BY_MASS, FACTORS, hosts, logits, normal, observed, small_llama, tokens, transformers

SPARSE = Stem(block_size=16, stride=4, sink_blocks=1, local_blocks=1, tail_blocks=1, min_blocks=2)
LENGTH = 320


@pytest.fixture(scope="module")
def llama():
    return small_llama()


def forward(q, k, v, padding):
    """The layer's output under the mask that a model of this integration gets for a padded batch."""
    (batch, _, q_len, _), kv_len, given = q.shape, k.shape[2], None
    if padding is not None:
        given = mask.stem_mask(batch, q_len, kv_len, q_offset=kv_len - q_len, attention_mask=padding)
    with hosts.use_policy(SPARSE, dense_below=0):
        out = hosts.attention_forward(torch.nn.Module(), q, k, v, given)[0]
    return out


def test_a_long_prompt_is_sparse_with_the_budgets_of_the_policy(llama):
    out, calls = observed(llama, SPARSE, input_ids=tokens())
    assert [(call.layer, call.q_len, call.kv_len, call.sparse, call.reason) for call in calls] == [
        (layer, LENGTH, LENGTH, True, "prefill") for layer in range(3)
    ]
    assert all(call.selection is not None and call.seconds > 0 for call in calls)
    assert [call.density for call in calls] == [pytest.approx(SPARSE.density(LENGTH))] * 3
    assert torch.equal(logits(llama, SPARSE, input_ids=tokens()), out)
    dense, calls = observed(llama, SPARSE, dense_below=LENGTH + 1, input_ids=tokens())
    assert [(call.sparse, call.reason, call.density) for call in calls] == [(False, "short prompt", 1)] * 3
    assert (dense - out).abs().max() > 0.01


@pytest.mark.parametrize("watched", [False, True])
def test_a_layer_with_sinks_a_cap_and_other_values_is_what_the_reference_computes(watched):
    q, k, v = (normal(2, heads, LENGTH, dim, seed=i) for i, (heads, dim) in enumerate(((4, 16), (2, 16), (2, 24))))
    sinks, observer = torch.tensor([0.5, 3.0, -2.0, 6.0]).bfloat16(), (lambda call: None) if watched else None
    with hosts.use_policy(BY_MASS, dense_below=0, observer=observer):
        out, _ = hosts.attention_forward(torch.nn.Module().eval(), 3 * q, k, v, None, s_aux=sinks, softcap=4.0, scaling=0.5)
    inputs = [x.transpose(1, 2) for x in (3 * q, k, v)]
    options = {"softcap": 4.0, "scale": 0.5, "backend": "reference"}
    selection = select_blocks(*inputs, policy=BY_MASS, **options)
    assert selection.density() < 0.9
    expected = block_sparse_attention(*inputs, selection, sinks=sinks.float(), **options)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_left_padded_rows_are_computed_as_if_they_came_alone():
    q, k, v = (normal(3, heads, LENGTH, 16, seed=i) for i, heads in enumerate((4, 2, 2)))
    starts = (0, 37, 37)
    padding = torch.stack([torch.arange(LENGTH) >= start for start in starts])
    out = forward(q, k, v, padding)
    for row, start in enumerate(starts):
        assert torch.equal(out[row : row + 1, start:], forward(*(x[row : row + 1, :, start:] for x in (q, k, v)), None))
        assert not out[row, :start].any()
    alone = forward(q[1:, :, 100:], k[1:, :, 37:], v[1:, :, 37:], None)
    assert torch.equal(forward(q[:, :, 100:], k, v, padding)[1:], alone)
    padding[1:] = False
    assert [bool(row.any()) for row in forward(q, k, v, padding)] == [True, False, False]


def test_a_padded_batch_is_seen_row_by_row_and_short_rows_stay_dense(llama):
    padding = torch.ones(3, LENGTH, dtype=torch.long)
    padding[1:, :200] = 0
    inputs = {"input_ids": tokens(3), "attention_mask": padding}
    out, calls = observed(llama, SPARSE, dense_below=200, **inputs)
    seen = [(call.kv_len, call.sparse, call.reason) for call in calls[:2]]
    assert seen == [(LENGTH, True, "prefill"), (120, False, "short prompt")]
    with torch.no_grad(), hosts.use_policy(SPARSE, dense_below=200):
        torch.testing.assert_close(llama(**inputs).logits[padding.bool()], out[padding.bool()])


def chunked(model, prompt_len):
    cache = transformers.DynamicCache(config=model.config)
    found = [
        observed(model, SPARSE, prompt_len=prompt_len, input_ids=chunk, past_key_values=cache)
        for chunk in tokens().split(64, 1)
    ]
    return torch.cat([out for out, _ in found], 1), [call for _, calls in found for call in calls]


def test_chunks_keep_the_blocks_of_one_call_when_the_prompt_length_is_known(llama):
    whole, calls = observed(llama, SPARSE, input_ids=tokens())
    pieces, chunk_calls = chunked(llama, LENGTH)
    torch.testing.assert_close(pieces, whole, atol=1e-4, rtol=1e-4)
    for layer, call in enumerate(calls):
        masks = [chunk.selection.to_mask() for chunk in chunk_calls if chunk.layer == layer]
        padded = [torch.nn.functional.pad(each, (0, LENGTH // 16 - each.shape[3])) for each in masks]
        assert torch.equal(torch.cat(padded, 2), call.selection.to_mask())
    assert (chunked(llama, None)[0] - whole).abs().max() > 0.01
    with pytest.raises(ValueError, match="prompt_len"):
        observed(llama, SPARSE, prompt_len=LENGTH - 1, input_ids=tokens())


def test_decode_short_queries_and_the_first_layers_are_dense(llama):
    cache = transformers.DynamicCache(config=llama.config)
    reasons = []
    for length in (100, 1, hosts.MIN_QUERY_LEN - 1, hosts.MIN_QUERY_LEN):
        _, calls = observed(llama, SPARSE, dense_layers=1, input_ids=tokens(length=length), past_key_values=cache)
        reasons.append([call.reason for call in calls])
    sparse = ["dense layer", "prefill", "prefill"]
    assert reasons == [sparse, ["decode"] * 3, ["short query"] * 3, sparse]


def test_each_layer_and_head_obeys_its_own_factor(llama, monkeypatch):
    inputs = []

    def noting(q, k, v, **options):
        inputs.append((q, k, v))
        return select_blocks(q, k, v, **options)

    monkeypatch.setattr(attention, "select_blocks", noting)
    _, calls = observed(llama, replace(BY_MASS, head_factors=FACTORS), input_ids=tokens())
    assert [call.layer for call in calls] == [0, 1, 2]
    for qkv, row, call in zip(inputs, FACTORS, calls, strict=True):
        for head, factor in enumerate(row):
            alone = select_blocks(*qkv, policy=replace(BY_MASS, share=BY_MASS.share * factor))
            assert torch.equal(call.selection.to_mask()[:, head], alone.to_mask()[:, head])
        assert len(call.selection.counts.sum(2).unique()) > 1  # or these factors show nothing
