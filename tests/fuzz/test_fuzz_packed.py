"""A packed batch, its keys packed too or in pages of any size, is right sequence by sequence."""

from itertools import pairwise

from stem_attention import select_blocks, stem_attention_varlen
from stem_attention.policies import Dense
from stem_attention.testing import assert_accurate, pack

from .poison import surrounded, undisturbed


def holds(problem, rig):
    single = [problem.qkv(rig.device, i) for i in range(len(problem.lengths))]
    batch = pack(single, problem.page_size)
    if problem.surrounded and not problem.page_size:
        batch |= {name: surrounded(batch[name]) for name in "qkv"}
    prompts = [kv_len + problem.prompt_extra for _, kv_len in problem.lengths]
    with undisturbed(batch["q"], poisoned=problem.poisoned):
        result = stem_attention_varlen(
            **batch, prompt_lens=prompts, policy=problem.policy, dense_below=problem.dense_below,
            return_lse=problem.return_lse, backend=rig.backend,
        )  # fmt: skip
    out, lse = result if problem.return_lse else (result, None)
    for i, (low, high) in enumerate(pairwise(batch["cu_seqlens_q"].tolist())):
        if low < high:
            # test_fuzz_whole.py judges what a sequence alone keeps.
            policy = Dense(problem.policy.block_size) if prompts[i] < problem.dense_below else problem.policy
            selection = select_blocks(*single[i], policy=policy, prompt_len=prompts[i], backend=rig.backend)
            assert_accurate(out[None, low:high], None if lse is None else lse[None, :, low:high], *single[i], selection)


def test_any_packed_batch_is_right(trials):
    trials(holds, packed=True)
