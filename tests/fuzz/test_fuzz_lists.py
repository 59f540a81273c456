"""Attention over any lists, of any shape, dtype and layout, is as exact as torch's own."""

from stem_attention import block_sparse_attention
from stem_attention.testing import assert_accurate, random_selection

from .poison import undisturbed


def holds(problem, rig):
    q, k, v = problem.qkv(rig.device)
    shape = len(problem.lengths), problem.heads, *problem.lengths[0], problem.policy.block_size
    selection = random_selection(*shape, problem.density, rig.device, problem.seed)
    with undisturbed(q, k, v, selection.indices, selection.counts, poisoned=problem.poisoned):
        result = block_sparse_attention(q, k, v, selection, return_lse=problem.return_lse, backend=rig.backend)
    out, lse = result if problem.return_lse else (result, None)
    assert_accurate(out, lse, q, k, v, selection)


def test_attention_over_any_lists_is_right(trials):
    trials(holds)
