"""Details of a measure: its tables and pictures, beside the one number by which contenders are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from stem_evals.contender import DENSE
from stem_evals.figures import draw_grids
from stem_evals.intervals import Estimate, mean_interval
from stem_evals.layers import LAST
from stem_evals.measure import Record

EAGER = "eager torch"


@dataclass(frozen=True)
class Part:
    """One table or one picture of a report; the title of a picture is also its file's."""

    title: str
    content: pd.DataFrame | Figure
    note: str = ""


def _over(values: Iterable[Record]) -> Estimate:
    """Loss minus dense's, mean of windows or of stretches of them."""
    return mean_interval([one["loss"] - one["dense_loss"] for one in values])


def perplexity(records: Sequence[Record]) -> list[Part]:
    """Whole windows, and stretches of positions, over dense's."""
    whole, positions = [], []
    for (text, tokens, name), part in pd.DataFrame(records).groupby(["text", "tokens", "contender"], sort=False):
        head = {"text": text, "tokens": str(tokens), "contender": name, "density": f"{part['density'].mean():.3f}"}
        whole.append({
            **head, "perplexity": f"{math.exp(part['loss'].mean()):.3f}",
            "KL from dense": mean_interval(part["kl"].tolist()).text(lambda x: f"{max(x, 0.0):.4f}"),
            "same top token": mean_interval(part["same"].tolist()).text(lambda x: f"{min(x, 1.0):.1%}"),
            "seconds": f"{part['seconds'].median():.2f}", "windows": str(len(part)),
        })  # fmt: skip
        if name != DENSE:
            count = len(part["buckets"].iloc[0])
            over = [_over(buckets[i] for buckets in part["buckets"]).text(lambda x: f"{math.exp(x):.4f}") for i in range(count)]
            positions.append({**head, **{f"{i}/{count} to {i + 1}/{count}": text for i, text in enumerate(over)}})
    return [
        Part("Whole windows", pd.DataFrame(whole), "KL in nats per token. Intervals: Student's t over windows."),
        Part("Perplexity over dense, by position", pd.DataFrame(positions), "Each window is cut into equal stretches."),
    ]


def needle(records: Sequence[Record]) -> list[Part]:
    """Depth against length; every number counts at the depth of the grid that is nearest to where it stood."""
    frame = pd.DataFrame(records).explode(["places", "hits"])
    depths = pd.Index(sorted(frame["depth"].unique()), name="depth")
    frame["depth"] = [min(depths, key=lambda depth: (abs(depth - place), depth)) for place in frame["places"]]
    parts = []
    for kind, mine in frame.astype({"hits": float}).groupby("kind", sort=False):
        tokens = pd.Index(sorted(mine["tokens"].unique()), name="tokens")
        grids = {
            str(name): part.pivot_table(index="depth", columns="tokens", values="hits").reindex(index=depths, columns=tokens)
            for name, part in mine.groupby("contender", sort=False)
        }
        prompts = mine["case"].nunique()
        title = f"{kind}: share of the numbers found (higher is better), n {prompts} prompts"
        parts.append(Part(f"needle-{kind}", draw_grids(grids, title, "RdYlGn", 0.0, cells=True)))
    return parts


def layers(records: Sequence[Record]) -> list[Part]:
    """Describe what is kept of the attention's mass, and what comes out, with recall by layer and head as a heat map."""
    tables, pictures = [], []
    for tokens, mine in pd.DataFrame(records).groupby("tokens"):
        rows, recalls = [], {}
        for name, part in mine.groupby("contender", sort=False):
            mean = {field: np.mean(part[field].tolist(), axis=0) for field in _LAYERS}
            recalls[str(name)] = pd.DataFrame(mean["recall"]).rename_axis(index="layer", columns="query head")
            rows.append({
                "contender": name, "density": f"{part['density'].mean():.3f}", "recall": f"{mean['recall'].mean():.4f}",
                "worst layer": f"{mean['recall'].mean(-1).min():.4f}", "last block": f"{mean['recall_last'].mean():.4f}",
                "output error": f"{mean['output_error'].mean():.4f}",
                **{f"{field[:-6]}s error by quarter": " ".join(map("{:.3f}".format, mean[field])) for field in _LAYERS[3:]},
                f"last {LAST} logits": mean_interval(part["logit_error_last"].tolist()).text("{:.4f}".format),
            })  # fmt: skip
        tables.append(Part(f"Layers, {tokens} tokens", pd.DataFrame(rows), _LAYERS_NOTE))
        if shown := {name: recall for name, recall in recalls.items() if name != DENSE}:
            pictures.append(
                Part(
                    f"recall-{tokens}",
                    draw_grids(
                        shown, f"mass recall (higher is better), {tokens} tokens, n {mine['case'].nunique()} windows", "viridis"
                    ),
                )
            )
    return [*tables, *pictures]


_LAYERS = ("recall", "recall_last", "output_error", "hidden_error", "logit_error")
_LAYERS_NOTE = (
    "Recall: share of the dense attention mass in kept blocks, on the dense model's own activations. Errors: norm of the "
    "difference from dense over the norm of dense; outputs of the heads on the dense model's activations, hidden states and "
    "logits after all layers ran sparse."
)


@dataclass(frozen=True)
class RelativeCost:
    """A contender's attention time, selection included, over dense's.

    Attributes:
        ratio: Mean over the windows that both ran on the same device.
        fused: Whether the library's kernels chose the blocks; otherwise eager torch did, and a kernel would be faster.
    """

    ratio: Estimate
    fused: bool

    @property
    def text(self) -> str:
        """As a cell of a table."""
        return self.ratio.text("{:.3f}".format) + ("" if self.fused else f", {EAGER}")


def relative_costs(records: Sequence[Record]) -> dict[tuple[int, str], RelativeCost]:
    """Costs by tokens and contender, of all that have a window in common with dense, dense itself included.

    Args:
        records: Of the measure ``cost``.
    """
    if not records:
        return {}
    frame = pd.DataFrame(records)
    dense = frame.loc[frame["contender"] == DENSE, ["case", "device", "whole_ms"]]
    joined = frame.merge(dense, on=["case", "device"], suffixes=("", "_dense"))
    joined["ratio"] = joined["whole_ms"] / joined["whole_ms_dense"]
    return {
        (int(tokens), str(name)): RelativeCost(mean_interval(part["ratio"].tolist()), all(part["fused"]))
        for (tokens, name), part in joined.groupby(["tokens", "contender"], sort=False)
    }


def cost(records: Sequence[Record]) -> list[Part]:
    """Time of all layers' attention."""
    costs, rows = relative_costs(records), []
    for tokens, place in pd.DataFrame(records).groupby("tokens"):
        for name, part in place.groupby("contender", sort=False):
            relative = costs.get((int(tokens), str(name)))
            rows.append({
                "tokens": str(tokens), "contender": name, "density": f"{part['density'].mean():.3f}",
                **{f"{field}, ms": f"{part[f'{field}_ms'].mean():.2f}" for field in ("selection", "attention", "whole")},
                "over dense": relative.ratio.text("{:.3f}".format) if relative else "",
                "selection by": _chooser(part), "windows": str(len(part)),
            })  # fmt: skip
    note = (
        "Sums over the layers, on the inputs that a dense prefill gives each of them; medians of a few rounds, means over "
        "windows. Dense is the fastest dense attention of the machine, over dense the mean ratio window by window. Whole is "
        "one call that chooses and attends; where eager torch chooses, it does not say how fast that choice could be made."
    )
    return [Part("Attention time of a prompt", pd.DataFrame(rows), note)]


def _chooser(part: pd.DataFrame) -> str:
    """Who chose the blocks; of dense attention, which one attended."""
    fastest = sorted({min(times, key=times.get) for times in part["dense_ms"] if times})
    if fastest:
        return "nothing to select: " + ", ".join(fastest)
    return "kernels" if all(part["fused"]) else EAGER


DETAILS: dict[str, Callable[[Sequence[Record]], list[Part]]] = {
    "perplexity": perplexity, "needle": needle, "layers": layers, "cost": cost
}  # fmt: skip
