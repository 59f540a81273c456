"""Section 6, as written: softmax over { j <= i, block(j) kept for block(i) } of scale * q.k, times v.

A soft cap c bounds the scores: c * tanh(scale * q.k / c). A sink is one more score of every row, whose weight meets no value.
Under a window w just keys j > i - w are seen.
"""

import torch
from torch import Tensor

from stem_attention.call import Call
from stem_attention.policies.metric import accumulator_dtype
from stem_attention.selection import BlockSelection


def attend(call: Call, selection: BlockSelection) -> tuple[Tensor, Tensor]:
    """Return ``(out, lse)``; fp64 inputs are computed in fp64, all others in fp32."""
    (q, k, v), sinks, dtype = (call.q, call.k, call.v), call.sinks, accumulator_dtype(call.q)
    group = q.shape[2] // k.shape[2]
    start, size = k.shape[1] - q.shape[1], selection.block_size
    keys = torch.arange(k.shape[1], device=q.device)
    mask = selection.to_mask()
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            kh, vh = k[b, :, h // group].to(dtype), v[b, :, h // group].to(dtype)
            for row in range(selection.rows):
                block = selection.first_row + row
                rows = torch.arange(max(block * size, start), min((block + 1) * size, k.shape[1]), device=q.device)
                kept = keys[mask[b, h, row].repeat_interleave(size)[: k.shape[1]]]
                scores = call.scale * (q[b, rows - start, h].to(dtype) @ kh[kept].T)
                if call.softcap is not None:
                    scores = call.softcap * (scores / call.softcap).tanh()
                scores = scores.masked_fill(kept > rows[:, None], -torch.inf)
                if call.window is not None:
                    scores = scores.masked_fill(kept <= rows[:, None] - call.window, -torch.inf)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h].to(dtype).expand(len(rows), 1)], 1)
                out[b, rows - start, h] = (scores.softmax(-1)[:, : len(kept)] @ vh[kept]).to(q.dtype)
                lse[b, h, rows - start] = scores.logsumexp(-1).to(torch.float32)
    return out, lse
