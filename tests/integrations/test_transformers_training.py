"""A model on "stem" trains: its gradients are those of the attention that ran, whatever host feature stands around it."""

from threading import Thread

import pytest
import torch
from tests.toys import toy

from stem_attention import Stem, UnsupportedError
from stem_attention.testing import relative_error

from .tiny import KEEP_ALL, hosts, small_llama, tokens, transformers

MLA = {
    "num_key_value_heads": 4, "head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "kv_lora_rank": 16, "q_lora_rank": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}  # fmt: skip
SPARSE = Stem(block_size=16, stride=4, sink_blocks=1, local_blocks=1, tail_blocks=1, min_blocks=2)
LENGTH = 320


def trained(policy, attention="stem", checkpoint=False, dense_below=0, **inputs):
    """The loss and gradients of every weight of a model in training, after one backward pass."""
    model = small_llama(attention).train()
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if attention == "stem":
        hosts.set_policy(model, policy, dense_below=dense_below)
    if not inputs:
        inputs = {"input_ids": tokens(2, LENGTH)}
    loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    loss.backward()
    return loss.detach(), torch.cat([weight.grad.flatten() for weight in model.parameters()])


def test_with_everything_kept_the_gradients_are_those_of_sdpa():
    (loss, ours), (expected, theirs) = trained(KEEP_ALL), trained(None, "sdpa")
    torch.testing.assert_close(loss, expected)
    assert relative_error(ours, theirs) < 1e-5
    assert torch.equal(trained(KEEP_ALL, dense_below=LENGTH + 1)[1], theirs)


def test_sparse_training_repeats_bit_for_bit_and_differs_from_dense():
    (loss, ours), (_, dense) = trained(SPARSE), trained(KEEP_ALL)
    assert relative_error(ours, dense) > 1e-3
    again = trained(SPARSE)
    assert torch.equal(again[0], loss)
    assert torch.equal(again[1], ours)


def test_checkpointing_changes_no_bit():
    assert torch.equal(trained(SPARSE, checkpoint=True)[1], trained(SPARSE)[1])


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_trains_a_model_of_fp32(compiled):
    """Its rotated queries and keys are fp32, its values are not."""

    def run(attention, autocast=True):
        model = small_llama(attention).train()
        if attention == "stem":
            hosts.set_policy(model, KEEP_ALL, dense_below=0)
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            forward(input_ids=tokens(1, LENGTH), use_cache=False).logits.float().square().sum().backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])

    torch.compiler.reset()
    exact = run("sdpa", autocast=False)
    assert 0 < relative_error(run("stem"), exact) <= 1.5 * relative_error(run("sdpa"), exact)


def test_a_block_that_does_not_reach_a_checkpointed_layer_is_refused_and_never_another_policy():
    """On a GPU torch computes such layers again in threads of its own; here a thread goes backwards as they do."""
    model, errors = small_llama().train(), []
    model.gradient_checkpointing_enable({"use_reentrant": False})

    def backward(loss):
        try:
            loss.backward()
        except UnsupportedError as error:
            errors.append(str(error))

    with hosts.use_policy(SPARSE, dense_below=0):
        loss = model(input_ids=tokens(1, LENGTH), use_cache=False).logits.sum()
        thread = Thread(target=backward, args=(loss,))
        thread.start()
        thread.join()
    assert len(errors) == 1
    assert "set_policy" in errors[0]


def test_a_layer_of_a_model_in_eval_that_is_computed_again_is_refused_too():
    model = small_llama().requires_grad_(False)
    first = model.model.layers[0].self_attn

    def layer(x):
        places = torch.arange(LENGTH)[None]
        return first(hidden_states=x, position_embeddings=model.model.rotary_emb(x, places), attention_mask=None)[0]

    hidden = torch.randn(1, LENGTH, model.config.hidden_size).requires_grad_()
    with hosts.use_policy(SPARSE, dense_below=0):
        out = torch.utils.checkpoint.checkpoint(layer, hidden, use_reentrant=False)
    with pytest.raises(UnsupportedError, match="set_policy"):
        out.sum().backward()
    out = torch.utils.checkpoint.checkpoint(layer, hidden, use_reentrant=False)
    with hosts.use_policy(observer=lambda call: None):
        out.sum().backward()  # the same settings


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_block_that_is_left_before_a_checkpointed_backward_pass_is_refused(reentrant):
    model = small_llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with hosts.use_policy(SPARSE, dense_below=0):
        loss = model(input_ids=tokens(1, LENGTH), use_cache=False).logits.sum()
    with pytest.raises(UnsupportedError, match="set_policy"):
        loss.backward()


def test_between_the_passes_of_a_checkpointed_model_another_policy_runs_in_inference_mode():
    """As a teacher's pass does, where a model learns from itself."""
    ids = tokens(1, LENGTH)

    def gradient(teacher_mode=None):
        model = small_llama().train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        hosts.set_policy(model, SPARSE, dense_below=0)
        loss = model(input_ids=ids, use_cache=False).logits.square().mean()
        if teacher_mode is not None:
            with teacher_mode(), hosts.use_policy(KEEP_ALL):
                model(input_ids=ids, use_cache=False)
        loss.backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])

    with pytest.raises(UnsupportedError, match=r"other settings.*inference_mode\(\)"):
        gradient(torch.no_grad)
    assert torch.equal(gradient(torch.inference_mode), gradient())


@pytest.mark.parametrize(("kind", "changes"), [("gemma2", {"sliding_window": 4096}), ("deepseek_v3", MLA)])
def test_soft_caps_and_values_of_another_dimension_train_however_they_are_checkpointed(kind, changes):
    def run(policy, attention="stem", checkpointing=None):
        model = toy(kind, **changes).train()
        model.set_attn_implementation(attention)
        if attention == "stem":
            hosts.set_policy(model, policy, dense_below=0)
        model.enable_input_require_grads()
        if checkpointing is not None:
            model.gradient_checkpointing_enable(checkpointing)
        model(input_ids=tokens(1, LENGTH), use_cache=False).logits.square().mean().backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])

    assert relative_error(run(KEEP_ALL), run(None, "eager")) < 1e-4
    sparse = run(SPARSE)
    assert relative_error(sparse, run(KEEP_ALL)) > 1e-4
    assert torch.equal(run(SPARSE, checkpointing={"use_reentrant": False}), sparse)
    assert torch.equal(run(SPARSE, checkpointing={"use_reentrant": True}), sparse)


def test_padded_rows_train_as_if_they_came_alone():
    padding, ids = torch.ones(2, LENGTH, dtype=torch.long), tokens(2, LENGTH)
    padding[1, :100] = 0

    def gradient(rows):
        model = small_llama().train()
        hosts.set_policy(model, SPARSE, dense_below=0)
        for ids, mask in rows:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            logits[mask.bool()].float().square().sum().backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])

    alone = gradient([(ids[:1], padding[:1]), (ids[1:, 100:], padding[1:, 100:])])
    assert relative_error(gradient([(ids, padding)]), alone) < 1e-5


def packed(lengths, borders=True):
    """What ``DataCollatorWithFlattening`` makes of sequences, with its borders or without."""
    features = [{"input_ids": ids[0].tolist()} for ids in (tokens(1, length, seed=length) for length in lengths)]
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=borders)
    batch = dict(collator(features))
    batch.pop("labels")
    return batch


@pytest.mark.parametrize("observed", [False, True])
def test_packed_sequences_are_sparse_one_by_one_where_the_host_says_where_they_begin(observed):
    lengths, calls = (LENGTH, 100, 47), []
    model = small_llama()
    options = {"observer": calls.append} if observed else {}
    with torch.no_grad(), hosts.use_policy(SPARSE, dense_below=0, **options):
        together = model(**packed(lengths)).logits[0].split(lengths)
        assert not observed or [call.kv_len for call in calls[:3]] == list(lengths)
        for length, found in zip(lengths, together, strict=True):
            torch.testing.assert_close(found, model(input_ids=tokens(1, length, seed=length)).logits[0], atol=1e-4, rtol=1e-4)


def test_packed_sequences_without_borders_are_dense():
    calls = []
    with torch.no_grad(), hosts.use_policy(SPARSE, dense_below=0, observer=calls.append):
        small_llama()(**packed((LENGTH, 100), borders=False), use_cache=False)
    assert {call.reason for call in calls} == {"custom mask"}


def test_borders_that_change_in_place_are_read_again():
    model, batch = small_llama(), packed((LENGTH, 100))
    with torch.no_grad(), hosts.use_policy(SPARSE, dense_below=0):
        model(**batch)
        other = packed((200, 220))
        batch["cu_seq_lens_q"].copy_(other["cu_seq_lens_q"])
        batch = {**other, "cu_seq_lens_q": batch["cu_seq_lens_q"]}
        torch.testing.assert_close(model(**batch).logits, model(**other).logits)


def test_packed_sequences_train():
    lengths = (LENGTH, 100)

    def gradient(batches):
        model = small_llama().train()
        hosts.set_policy(model, SPARSE, dense_below=0)
        for batch in batches:
            model(**batch, use_cache=False).logits.square().sum().backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])

    alone = [{"input_ids": tokens(1, length, seed=length)} for length in lengths]
    assert relative_error(gradient([packed(lengths)]), gradient(alone)) < 1e-5


def test_dropout_is_refused_by_name_where_attention_would_be_sparse():
    model = small_llama(attention_dropout=0.1).train()
    hosts.set_policy(model, SPARSE, dense_below=LENGTH)
    with pytest.raises(UnsupportedError, match="attention_dropout=0"):
        model(input_ids=tokens(1, LENGTH))
    model(input_ids=tokens(1, LENGTH - 1)).logits.sum().backward()  # a short one is the host's own
    with torch.no_grad():
        model(input_ids=tokens(1, LENGTH))
    model.eval()(input_ids=tokens(1, LENGTH)).logits.sum().backward()


def test_the_trainer_trains(tmp_path):
    pytest.importorskip("accelerate")
    model = small_llama()
    hosts.set_policy(model, SPARSE, dense_below=0)
    before = model.lm_head.weight.detach().clone()
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(8, LENGTH)]
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no", "use_cpu": True}
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(str(tmp_path), gradient_checkpointing=True, **options),
        train_dataset=rows,
    )
    assert trainer.train().training_loss > 0
    assert not torch.equal(model.lm_head.weight, before)


def test_lora_adapters_of_peft_train():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(small_llama(), peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)).train()
    hosts.set_policy(model.get_base_model(), SPARSE, dense_below=0)
    model(input_ids=tokens(1, LENGTH), use_cache=False).logits.square().sum().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert gradients
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
