"""A prompt in chunks is right wherever it is cut; chunks that meet on block borders keep what one call keeps."""

from itertools import pairwise

import torch

from stem_attention import Mass, Stem, select_blocks
from stem_attention.policies import BigBird, Dense, Longformer, SinkWindow, Strided

from .test_fuzz_whole import assert_right

INVARIANT = (Mass, Stem, Dense, SinkWindow, Strided, Longformer, BigBird)


def holds(problem, rig):
    q, k, v = problem.qkv(rig.device)
    size, kv_len, start = problem.policy.block_size, k.shape[1], k.shape[1] - q.shape[1]
    options = {"policy": problem.policy, "prompt_len": kv_len + problem.prompt_extra, "backend": rig.backend}
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


def test_a_prompt_in_chunks_is_right(trials):
    trials(holds)
