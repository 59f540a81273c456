"""Measure what attention costs: the time of choice and sparse attention, layer by layer on a model's own activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean

import torch

from stem_attention import block_sparse_attention, select_blocks, stem_attention
from stem_attention.backends import Request, get_backend
from stem_attention.backends.triton.backend import TritonBackend
from stem_attention.errors import UnsupportedError
from stem_attention.models.prefill import AttentionCall, read
from stem_attention.policies import Policy
from stem_evals.bench.checks import dense_problem
from stem_evals.bench.peers import admit, dense_peers
from stem_evals.bench.timing import Call, medians, time_in_turn
from stem_evals.measure import Case, Record
from stem_evals.windows import Windows

REPEATS = 3
"""Timed rounds of every call, after the clock's own warm-up."""

_CHECKED_ROWS = 128  # queries at the end of a dense peer's result that are compared with fp64
_DIGITS = 4  # of milliseconds


@dataclass(frozen=True)
class LayerCost:
    """Median seconds of one layer's attention.

    Attributes:
        density: Kept share of the causal block pairs.
        selection: Seconds of the choice alone; 0 where everything is kept without one.
        attention: Seconds of the attention over what was chosen.
        whole: Seconds of one :func:`stem_attention.stem_attention` call, which does both.
        fused: Whether the backend's own kernels choose; False for a choice in the policy's plain torch code.
        peers: Of dense attention, seconds of every kernel that runs here, by name; ``attention`` is the fastest.
    """

    density: float
    selection: float
    attention: float
    whole: float
    fused: bool
    peers: dict[str, float] = field(default_factory=dict)


def layer_cost(policy: Policy | None, call: AttentionCall) -> LayerCost:
    """Time a contender on what one layer of a dense prefill got; nothing is copied.

    Raises:
        UnsupportedError: No dense attention runs here, where one is to be timed.
    """
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    if policy is None:
        calls, left_out = admit(dense_peers(q, k, v), lambda out: dense_problem(out, q, k, v, _CHECKED_ROWS))
        if not calls:
            raise UnsupportedError(f"no dense attention to compare with: {'; '.join(map(': '.join, left_out.items()))}")
        peers = medians(time_in_turn(calls, q.device, REPEATS, lambda: None))
        return LayerCost(1.0, 0.0, min(peers.values()), min(peers.values()), True, peers)
    mine, scores = policy.for_layer(call.layer), {"scale": call.scale, "softcap": call.softcap}
    select = partial(select_blocks, q, k, v, policy=mine, **scores)
    selection = select()
    timed: dict[str, Call] = {
        "selection": select,
        "attention": partial(block_sparse_attention, q, k, v, selection, sinks=call.sinks, **scores),
        "whole": partial(stem_attention, q, k, v, policy=mine, dense_below=0, sinks=call.sinks, **scores),
    }
    backend = get_backend(Request.of(q, v, policy.block_size))
    fused = isinstance(backend, TritonBackend) and backend.selector(mine) is not None
    found = medians(time_in_turn(timed, q.device, REPEATS, lambda: None))
    return LayerCost(selection.density(), found["selection"], found["attention"], found["whole"], fused)


class Cost(Windows):
    """Windows of texts, attention timed under each contender; see :class:`stem_evals.measure.Measure`.

    One dense prefill gives every layer's exact inputs, on which the contender is timed (:func:`layer_cost`), one layer after
    the other, with nothing else running.
    """

    name = "cost"
    looks_into_layers = True

    def run(self, case: Case, policy: Policy | None) -> Record:
        """The record holds milliseconds by layer and their sums; ``seconds`` is the sum of the whole calls."""
        layers = list[LayerCost]()
        read(self._model, self.ids(case), None, positions=1, on_attention=lambda call: layers.append(layer_cost(policy, call)))
        device = self._model.device
        name = "cpu" if device.type == "cpu" else str(torch.get_device_module(device).get_device_name(device))
        return {"device": name, **summary(layers)}


def summary(layers: Sequence[LayerCost]) -> Record:
    """Describe what a record says of all layers."""
    parts = {part: [_milliseconds(getattr(layer, part)) for layer in layers] for part in ("selection", "attention", "whole")}
    sums = {f"{part}_ms": round(sum(values), _DIGITS) for part, values in parts.items()}
    peers = sorted({name for layer in layers for name in layer.peers})
    return {
        "density": fmean(layer.density for layer in layers),
        "seconds": sums["whole_ms"] / 1e3,
        "fused": all(layer.fused for layer in layers),
        "repeats": REPEATS,
        **parts,
        **sums,
        "dense_ms": {name: _milliseconds(sum(layer.peers.get(name, 0.0) for layer in layers)) for name in peers},
    }


def _milliseconds(seconds: float) -> float:
    return round(1e3 * seconds, _DIGITS)
