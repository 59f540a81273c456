"""Any policy keeps the blocks of the reference, and the whole call is attention over them."""

from stem_attention import select_blocks, stem_attention
from stem_attention.policies import Dense
from stem_attention.testing import assert_accurate

from .judge import assert_selected
from .poison import undisturbed


def assert_right(problem, rig, q, k, v, prompt_len):
    """Of selection and attention in one call, and of selection alone."""
    options = {"policy": problem.policy, "prompt_len": prompt_len, "backend": rig.backend}
    with undisturbed(q, k, v, poisoned=problem.poisoned):
        result = stem_attention(q, k, v, dense_below=problem.dense_below, return_lse=problem.return_lse, **options)
        selection = select_blocks(q, k, v, **options)
    out, lse = result if problem.return_lse else (result, None)
    assert_selected(selection, q, k, v, problem.policy, prompt_len)
    if prompt_len < problem.dense_below:
        selection = Dense(problem.policy.block_size)(q, k, v)
    assert_accurate(out, lse, q, k, v, selection)


def holds(problem, rig):
    q, k, v = problem.qkv(rig.device)
    assert_right(problem, rig, q, k, v, k.shape[1] + problem.prompt_extra)


def test_any_call_is_right(trials):
    trials(holds)
