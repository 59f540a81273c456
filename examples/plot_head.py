# %% [markdown]
# What one attention head keeps: `python examples/plot_head.py [picture.png]`, or cell by cell in an editor that knows `# %%`.
#
# The tensors are made up, so that it ends in seconds. For the heads of a real model there is
# `stem-attention inspect --plot picture.png`.

# %% Queries and keys whose attention is known: each query likes one passage, its neighbours, and tokens at fixed distances.
import sys

import torch
from matplotlib.figure import Figure

from stem_attention import Mass, select_blocks

HEAD, TOKENS = 3, 8192
torch.manual_seed(0)
q, k, v = (torch.randn(1, TOKENS, heads, 64) for heads in (8, 2, 2))
liked = 0.6 * torch.randn(64)
q, k[:, 2000:2400] = q + liked, k[:, 2000:2400] + liked
angle = torch.arange(TOKENS)[None, :, None] / 300
q[..., :2] = k[..., :2] = 5 * torch.stack([angle.cos(), angle.sin()], -1)

# %% The blocks that the policy keeps: a boolean matrix of query blocks and key blocks for each head.
policy = Mass()
selection = select_blocks(q, k, v, policy=policy)
kept, counts = selection.to_mask()[0, HEAD], selection.counts[0, HEAD]
causal = len(kept) * (len(kept) + 1) // 2
print(f"head {HEAD} keeps {kept.sum()} of {causal} blocks")

# %% What the head looks at, without leaving anything out: dense attention, summed over blocks of 64 tokens.
size, group = policy.block_size, q.shape[2] // k.shape[2]
scores = q[0, :, HEAD] @ k[0, :, HEAD // group].T / 8
weights = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
attention = weights.view(TOKENS // size, size, TOKENS // size, size).sum((1, 3)) / size
print(f"the kept blocks hold {(attention * kept).sum() / attention.sum():.1%} of its attention")

# %% Side by side: what it looks at, what is kept of it, and how much that is row by row.
figure = Figure(figsize=(13, 4.2), layout="constrained")
looked, blocks, rows = figure.subplots(1, 3)
looked.imshow(attention.sqrt(), cmap="viridis", interpolation="nearest", aspect="auto")
looked.set(title=f"head {HEAD}: dense attention (root)", xlabel="key block", ylabel="query block")
blocks.imshow(kept, cmap="Blues", interpolation="nearest", aspect="auto")
blocks.set(title=f"kept by Mass(), {kept.sum() / causal:.1%} of the blocks", xlabel="key block")
rows.step(range(len(counts)), counts, where="mid", label="kept")
rows.plot(range(len(counts)), range(1, len(counts) + 1), color="0.6", linestyle=":", label="all causal blocks")
rows.set(title="blocks per query block (fewer is faster)", xlabel="query block", ylim=(0, None))
rows.legend()
file = sys.argv[1] if len(sys.argv) > 1 else "head.png"
figure.savefig(file)
print(f"wrote {file}")
