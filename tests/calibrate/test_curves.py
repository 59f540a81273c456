"""What heads lose at every share: against selections of keep by mass, and gradients that recomputing does not change."""

from dataclasses import replace

import pytest
import torch
from tests.toys import toy
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stem_attention import Mass
from stem_attention.calibrate import curves
from stem_attention.calibrate.curves import SHARES, feeling, head_curves
from stem_attention.testing import make_qkv

SMALL = Mass(block_size=16, query_pool=4, key_pool=8, tail_blocks=1, local_blocks=1, spread=0.1)


def layer(length, heads=(4, 2), dim=16):
    """Inputs whose attention is far from even, and a gradient."""
    q, k, v = make_qkv(1, length, length, *heads, dim)
    gradient = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    return 2 * q[0], 2 * k[0], v[0], gradient[0]


def attention(q, k, v, mask, scale):
    """fp64, of tokens ``(length, heads, dim)`` under a mask of token pairs."""
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def brute_force(q, k, v, gradient, policy, scale):
    """One real selection and two real attentions for each share; also each head's density, by selecting for it alone."""
    length, size = len(q), policy.block_size
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    dense = attention(q, k, v, causal, scale)
    sums, costs, densities = [], [], []
    for share in SHARES:
        selection = replace(policy, share=share)(q[None], k[None], v[None], scale=scale)
        blocks = selection.to_mask()[0]
        tokens = blocks.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, :length, :length] & causal
        change = ((attention(q, k, v, tokens, scale) - dense) * gradient.double()).sum(-1)
        sums.append(change.sum(0))
        costs.append(change.square().sum(0))
        densities.append(blocks.sum((1, 2)).double() / torch.ones_like(blocks[0]).tril().sum())
        assert float(densities[-1].mean()) == pytest.approx(selection.density())
    return torch.stack(sums, 1), torch.stack(costs, 1), torch.stack(densities, 1)


@pytest.mark.parametrize(
    ("policy", "length", "heads", "scale"),
    [
        (SMALL, 160, (4, 2), 0.25),
        (SMALL, 160, (3, 3), 0.6),
        (SMALL, 149, (4, 1), 0.25),
        (replace(SMALL, tail_blocks=0, sink_blocks=0), 149, (2, 1), 0.25),
        (replace(SMALL, tail_blocks=3, local_blocks=2), 200, (2, 1), 0.25),
    ],
    ids=["grouped", "a-kv-head-each", "partial-block", "partial-block-of-no-tail", "long-tail"],
)
def test_costs_and_densities_are_those_of_real_selections(policy, length, heads, scale):
    inputs = layer(length, heads)
    sums, costs, densities = head_curves(*inputs, policy, scale)
    expected_sums, expected_costs, expected_densities = brute_force(*inputs, policy, scale)
    assert torch.equal(densities, expected_densities)
    assert costs.dtype == torch.float64
    # Where everything is kept the brute force has zero and fp32 its rounding.
    torch.testing.assert_close(sums, expected_sums, rtol=1e-3, atol=1e-4 * float(expected_sums.abs().max()))
    torch.testing.assert_close(costs, expected_costs, rtol=1e-3, atol=1e-8 * float(expected_costs.max()))
    assert float(costs[:, -1].min()) > 1e3 * float(costs[:, 0].max())
    assert bool((densities[:, 0] > densities[:, -1]).all())
    assert not head_curves(*inputs[:3], torch.zeros_like(inputs[3]), policy, scale)[1].any(), "no gradient costs nothing"


def test_the_policys_own_shares_do_not_count():
    inputs = layer(96)
    expected = head_curves(*inputs, SMALL, 0.25)
    for policy in (replace(SMALL, share=100.0), replace(SMALL, head_factors=((0.1, 1.0, 2.0, 9.0),))):
        for got, want in zip(head_curves(*inputs, policy, 0.25), expected, strict=True):
            assert torch.equal(got, want)


def test_a_small_workspace_changes_nothing(monkeypatch):
    inputs = layer(149)
    _, costs, densities = head_curves(*inputs, SMALL, 0.25)
    monkeypatch.setattr(curves, "_WORKSPACE", 1)
    _, row_by_row, same = head_curves(*inputs, SMALL, 0.25)
    assert torch.equal(densities, same)
    torch.testing.assert_close(row_by_row, costs, rtol=1e-4, atol=1e-8 * float(costs.max()))


def test_weights_of_kept_blocks_that_vanish_leave_a_finite_cost():
    q, k, v, gradient = layer(160, (1, 1))
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    q[..., 0] = 100.0
    k[40, 0, 0] = 100.0  # a score of 10000: in fp32 all other weights of the later queries are 0
    gradient[:48] = 0
    _, costs, _ = head_curves(q, k, v, gradient, replace(SMALL, spread=0.0), 1.0)
    assert bool(costs.isfinite().all())
    everything = ((attention(q, k, v, torch.ones(160, 160).tril().bool(), 1.0) * gradient).sum(-1)[:144] ** 2).sum()
    assert float(costs[0, -1]) == pytest.approx(float(everything), rel=1e-4)


IDS = torch.arange(2 * 70).reshape(2, 70) * 37 % 257


def gradients(model):
    """A scalar of the model, backwards: the gradient of its input."""
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded, use_cache=False).logits[:, 1::7].square().sum().backward()
    return embedded.grad


def state(model):
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        model.config._attn_implementation,
        getattr(model, "is_activation_checkpointing", None),
        ALL_ATTENTION_FUNCTIONS["sdpa"],
        list(ALL_ATTENTION_FUNCTIONS),
    )


def told_nothing(*args):
    raise AssertionError("nothing to tell")


def test_every_layer_tells_its_attention_and_its_gradient_once(model, monkeypatch):
    """Against plain autograd, which keeps all activations."""
    outputs, inputs, inner = [], [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def keeping(module, q, k, v, mask, **named):
        out, weights = inner(module, q, k, v, mask, **named)
        out.retain_grad()
        outputs.append(out)
        inputs.append((q.detach(), k.detach(), v.detach(), named["scaling"]))
        return out, weights

    with monkeypatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", keeping)
        expected = gradients(model)
    told = []
    with feeling(model, lambda *found: told.append(found)):
        torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert [index for index, *_ in told] == [1, 0]
        gradients(model)
    assert [index for index, *_ in told] == [1, 0, 1, 0]
    for index, q, k, v, scale, gradient in told:
        assert gradient.shape == outputs[index].shape == (2, 70, 4, 8)
        assert not gradient.requires_grad
        torch.testing.assert_close(gradient, outputs[index].grad, rtol=1e-3, atol=1e-4 * float(outputs[index].grad.abs().max()))
        assert scale == inputs[index][3]
        for got, want in zip((q, k, v), inputs[index][:3], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_activations_are_computed_again(model):
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    with feeling(model, lambda *found: None):
        gradients(model)
    assert len(calls) == 2


def test_dropout_stays_off():
    model = toy("llama", attention_dropout=0.5)
    expected = gradients(model)
    with feeling(model, lambda *found: None):
        torch.testing.assert_close(gradients(model), expected)


def test_a_host_without_sdpa_is_felt_in_its_eager_attention():
    told, model = [], toy("gpt_oss", num_local_experts=2, num_experts_per_tok=1)
    before = state(model)
    with feeling(model, lambda *found: told.append(found[0])):
        gradients(model)
    assert told == [1, 0]
    assert state(model) == before


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_is_left_as_it_was(model, implementation, frozen):
    model.set_attn_implementation(implementation)
    model.lm_head.weight.requires_grad_(not frozen)
    before = state(model)
    with feeling(model, lambda *found: None):
        assert state(model)[1] == [False] * len(before[1])
        gradients(model)
    assert state(model) == before
    with pytest.raises(KeyboardInterrupt), feeling(model, told_nothing):
        raise KeyboardInterrupt
    assert state(model) == before
    with pytest.raises(AssertionError, match="nothing to tell"), feeling(model, told_nothing):
        gradients(model)
    assert state(model) == before


def test_a_model_that_cannot_compute_again_is_refused_untouched(model, monkeypatch):
    before = state(model)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match="does not support"), feeling(model, told_nothing):
        raise AssertionError("entered")
    assert state(model) == before
