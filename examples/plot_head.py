"""Plot what one attention head keeps, from any tensors: `python examples/plot_head.py [picture.png]`.

For the heads of a real model there is `stem-attention inspect --plot picture.png`.
"""

import sys

import torch
from matplotlib.figure import Figure

from stem_attention import Mass, select_blocks

HEAD = 3
torch.manual_seed(0)
q, k, v = (torch.randn(1, 8192, heads, 64) for heads in (8, 2, 2))
k[:, 2000:2400] += 0.3 * q.mean((1, 2))[:, None, None]  # a passage that every query likes a little

selection = select_blocks(q, k, v, policy=Mass())
kept, counts = selection.to_mask()[0, HEAD], selection.counts[0, HEAD]

figure = Figure(figsize=(10, 4.5), layout="constrained")
blocks, rows = figure.subplots(1, 2)
blocks.imshow(kept, cmap="Blues", interpolation="nearest")
blocks.set(title=f"head {HEAD}: kept blocks, density {selection.density():.3f}", xlabel="key block", ylabel="query block")
rows.step(range(len(counts)), counts, where="mid")
rows.set(title="blocks kept per query block", xlabel="query block", ylabel="blocks", ylim=(0, None))
file = sys.argv[1] if len(sys.argv) > 1 else "head.png"
figure.savefig(file)
print(f"wrote {file}")
