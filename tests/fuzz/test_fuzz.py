"""Any problem is right: the blocks that a policy keeps, attention over any lists and its gradients, chunks, a packed batch."""

from itertools import pairwise

import torch

from stem_attention import Mass, Stem, block_sparse_attention, select_blocks, stem_attention, stem_attention_varlen
from stem_attention.policies import BigBird, Dense, Longformer, SinkWindow, Strided
from stem_attention.testing import assert_accurate, pack, random_selection

from .judge import assert_gradients, assert_selected
from .poison import surrounded, undisturbed

INVARIANT = (Mass, Stem, Dense, SinkWindow, Strided, Longformer, BigBird)


def attention_over_any_lists(problem, rig):
    """As exact as torch's own."""
    q, k, v = problem.qkv(rig.device)
    shape = len(problem.lengths), problem.heads, *problem.lengths[0], problem.policy.block_size
    selection = random_selection(*shape, problem.density, rig.device, problem.seed)
    extra = {**problem.extra(rig.device), "window": problem.window}
    with undisturbed(q, k, v, selection.indices, selection.counts, poisoned=problem.poisoned):
        result = block_sparse_attention(q, k, v, selection, return_lse=problem.return_lse, backend=rig.backend, **extra)
    out, lse = result if problem.return_lse else (result, None)
    assert_accurate(out, lse, q, k, v, selection, **extra)


def gradients_over_any_lists(problem, rig):
    """Of q, k, v and sinks, as exact as those of plain attention."""
    q, k, v = problem.qkv(rig.device)
    if q.dtype == torch.float16:  # loud values would overflow in the products of the gradient
        v = v / v.abs().max().clamp(min=1)
    shape = len(problem.lengths), problem.heads, *problem.lengths[0], problem.policy.block_size
    selection = random_selection(*shape, problem.density, rig.device, problem.seed)
    extra, inputs = problem.extra(rig.device), [x.detach().requires_grad_() for x in (q, k, v)]
    inputs += [] if extra["sinks"] is None else [extra["sinks"].requires_grad_()]
    draw = torch.Generator().manual_seed(problem.seed)
    d_out = torch.randn((*q.shape[:3], v.shape[3]), generator=draw).to(q.device, q.dtype)
    with undisturbed(q, k, v, d_out, selection.indices, selection.counts, poisoned=problem.poisoned):
        out = block_sparse_attention(*inputs[:3], selection, backend=rig.backend, **extra)
        found = torch.autograd.grad(out, inputs, d_out)
    assert_gradients(found, d_out, q, k, v, selection, *(x.detach() for x in inputs[3:]), softcap=problem.softcap)


def assert_right(problem, rig, q, k, v, prompt_len):
    """Of selection and attention in one call, and of selection alone."""
    options = {"policy": problem.policy, "prompt_len": prompt_len, "backend": rig.backend, "softcap": problem.softcap}
    extra = problem.extra(rig.device)
    limits = {"dense_below": problem.dense_below, "return_lse": problem.return_lse}
    with undisturbed(q, k, v, poisoned=problem.poisoned):
        result = stem_attention(q, k, v, sinks=extra["sinks"], **limits, **options)
        selection = select_blocks(q, k, v, **options)
    out, lse = result if problem.return_lse else (result, None)
    assert_selected(selection, q, k, v, problem.policy, prompt_len, softcap=problem.softcap)
    if prompt_len < problem.dense_below:
        selection = Dense(problem.policy.block_size)(q, k, v)
    assert_accurate(out, lse, q, k, v, selection, **extra)


def any_call(problem, rig):
    """A policy keeps the blocks of the reference, and the whole call is attention over them."""
    q, k, v = problem.qkv(rig.device)
    assert_right(problem, rig, q, k, v, k.shape[1] + problem.prompt_extra)


def a_prompt_in_chunks(problem, rig):
    """Wherever it is cut; chunks that meet on block borders keep what one call keeps."""
    q, k, v = problem.qkv(rig.device)
    size, kv_len, start = problem.policy.block_size, k.shape[1], k.shape[1] - q.shape[1]
    options = {"policy": problem.policy, "prompt_len": kv_len + problem.prompt_extra, "backend": rig.backend}
    options["softcap"] = problem.softcap
    whole = select_blocks(q, k, v, **options)
    border = max(start, (start + kv_len) // 2 // size * size)
    for low, high in pairwise(sorted({start, border, max(kv_len - 1, start), kv_len})):
        chunk = q[:, low - start : high - start], k[:, :high], v[:, :high]
        assert_right(problem, rig, *chunk, options["prompt_len"])
        inside_a_block = low % size or (high % size and high != kv_len)
        of_the_whole = getattr(problem.policy, "magnitude", None) == "zscore"  # which looks at all keys there are
        if not inside_a_block and not of_the_whole and isinstance(problem.policy, INVARIANT):
            part = select_blocks(*chunk, **options)
            rows = slice(part.grid.first_row - whole.grid.first_row, part.grid.end_row - whole.grid.first_row)
            same = torch.equal(part.to_mask(), whole.to_mask()[:, :, rows, : part.grid.key_blocks])
            assert same, f"tokens {low} to {high} as a chunk keep other blocks"


def any_packed_batch(problem, rig):
    """Its keys packed too or in pages of any size, sequence by sequence."""
    single = [problem.qkv(rig.device, i) for i in range(len(problem.lengths))]
    batch = pack(single, problem.page_size)
    if problem.surrounded and not problem.page_size:
        batch |= {name: surrounded(batch[name]) for name in "qkv"}
    prompts, extra = [kv_len + problem.prompt_extra for _, kv_len in problem.lengths], problem.extra(rig.device)
    with undisturbed(batch["q"], poisoned=problem.poisoned):
        result = stem_attention_varlen(
            **batch, prompt_lens=prompts, policy=problem.policy, dense_below=problem.dense_below,
            return_lse=problem.return_lse, backend=rig.backend, **extra,
        )  # fmt: skip
    out, lse = result if problem.return_lse else (result, None)
    for i, (low, high) in enumerate(pairwise(batch["cu_seqlens_q"].tolist())):
        if low < high:
            # any_call judges what a sequence alone keeps.
            policy = Dense(problem.policy.block_size) if prompts[i] < problem.dense_below else problem.policy
            options = {"policy": policy, "prompt_len": prompts[i], "softcap": problem.softcap, "backend": rig.backend}
            selection = select_blocks(*single[i], **options)
            alone = out[None, low:high], None if lse is None else lse[None, :, low:high]
            assert_accurate(*alone, *single[i], selection, **extra)


def test_attention_over_any_lists_is_right(trials):
    trials(attention_over_any_lists)


def test_gradients_over_any_lists_are_right(trials):
    trials(gradients_over_any_lists)


def test_any_call_is_right(trials):
    trials(any_call)


def test_a_prompt_in_chunks_is_right(trials):
    trials(a_prompt_in_chunks)


def test_any_packed_batch_is_right(trials):
    trials(any_packed_batch, packed=True)
