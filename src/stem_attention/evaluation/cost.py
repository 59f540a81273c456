"""What attention costs: the time of the choice and of the sparse attention, layer by layer on a model's own activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean, median

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stem_attention.api import block_sparse_attention, dense_limit, select_blocks, stem_attention
from stem_attention.backends import Request, get_backend
from stem_attention.backends.fused import FusedBackend
from stem_attention.config import StemConfig
from stem_attention.errors import UnsupportedError
from stem_attention.evaluation.bench_checks import dense_problem
from stem_attention.evaluation.bench_peers import admit, dense_peers
from stem_attention.evaluation.bench_timing import Call, time_in_turn
from stem_attention.evaluation.layers import check_full_attention
from stem_attention.evaluation.measure import Case, Record, What
from stem_attention.evaluation.prefill import AttentionCall, Watcher, read
from stem_attention.evaluation.texts import Text
from stem_attention.evaluation.windows import Windows
from stem_attention.policies import Mass, Policy, Stem, UniformTopK

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
        whole: Seconds of both: of one :func:`stem_attention.stem_attention` call if the library's kernels choose, else the sum.
        fused: Whether the library's GPU kernels choose; False for a choice in eager torch.
        peers: Of a dense layer, seconds of every dense attention that runs here, by name; ``attention`` is the fastest.
    """

    density: float
    selection: float
    attention: float
    whole: float
    fused: bool
    peers: dict[str, float] = field(default_factory=dict)


def layer_cost(what: What, call: AttentionCall) -> LayerCost:
    """Time a contender on what one layer of a dense prefill got; nothing is copied.

    Raises:
        UnsupportedError: No dense attention runs here, where one is to be timed.
    """
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    scale = q.shape[3] ** -0.5 if call.scale is None else call.scale
    if what is None or (isinstance(what, StemConfig) and _stays_dense(what, call.layer, q)):
        return _dense_cost(q, k, v)
    if isinstance(what, StemConfig):
        return _config_cost(q, k, v, what.for_layer(call.layer), scale)
    config = config_of(what)
    return _policy_cost(q, k, v, what, scale) if config is None else _config_cost(q, k, v, config, scale)


def config_of(policy: Policy) -> StemConfig | None:
    """The config with which :func:`stem_attention.select_blocks` chooses what a policy chooses; None where there is none."""
    if isinstance(policy, UniformTopK):
        return policy.as_stem().config
    return policy.config if isinstance(policy, Stem | Mass) else None


def _stays_dense(config: StemConfig, layer: int, q: Tensor) -> bool:
    limit = dense_limit(device=q.device, dtype=q.dtype, head_dim=q.shape[3], config=config)
    return layer < config.dense_layers or q.shape[1] < limit


def _dense_cost(q: Tensor, k: Tensor, v: Tensor) -> LayerCost:
    calls, left_out = admit(dense_peers(q, k, v), lambda out: dense_problem(out, q, k, v, _CHECKED_ROWS))
    if not calls:
        raise UnsupportedError(f"no dense attention to compare with: {'; '.join(map(': '.join, left_out.items()))}")
    peers = _medians(calls, q.device)
    fastest = min(peers.values())
    return LayerCost(1.0, 0.0, fastest, fastest, True, peers)


def _config_cost(q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float) -> LayerCost:
    sparse = replace(config, dense_below=0)
    select = partial(select_blocks, q, k, v, config=sparse, scale=scale)
    selection = select()
    calls: dict[str, Call] = {
        "selection": select,
        "attention": partial(block_sparse_attention, q, k, v, selection, scale=scale),
        "whole": partial(stem_attention, q, k, v, config=sparse, scale=scale),
    }
    seconds = _medians(calls, q.device)
    fused = isinstance(get_backend(Request.of(q, config.block_size)), FusedBackend)
    return LayerCost(selection.density(), seconds["selection"], seconds["attention"], seconds["whole"], fused)


def _policy_cost(q: Tensor, k: Tensor, v: Tensor, policy: Policy, scale: float) -> LayerCost:
    select = partial(policy, q, k, v, scale=scale)
    selection = select()
    calls: dict[str, Call] = {
        "selection": select,
        "attention": partial(block_sparse_attention, q, k, v, selection, scale=scale),
    }
    seconds = _medians(calls, q.device)
    whole = seconds["selection"] + seconds["attention"]
    return LayerCost(selection.density(), seconds["selection"], seconds["attention"], whole, fused=False)


def _medians(calls: Mapping[str, Call], device: torch.device) -> dict[str, float]:
    times = time_in_turn(calls, device, REPEATS, lambda: None)
    return {name: median(times[name].work) for name in calls}


class Cost(Windows):
    """Windows of texts, attention timed under each contender; see :class:`stem_attention.evaluation.measure.Measure`.

    One dense prefill gives every layer's exact inputs, on which the contender is timed (:func:`layer_cost`), one layer after
    the other, with nothing else running.

    Args:
        model: Loaded by :func:`stem_attention.evaluation.models.load_model`.
        tokenizer: Its tokenizer.
        texts: What to read, no two of the same name.
        lengths: Tokens of a window; all lengths are run.
        windows: Windows of each length and text, spread through the text without overlap.

    Raises:
        ValueError: A text is too short, or two share a name.
        UnsupportedError: Some layers of the model attend to something else than all earlier tokens.
    """

    name = "cost"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[Text],
        lengths: Sequence[int],
        windows: int,
    ) -> None:
        check_full_attention(model, self.name)
        super().__init__(model, tokenizer, texts, lengths, windows)

    def run(self, case: Case, what: What, watcher: Watcher) -> Record:
        """The record holds milliseconds by layer and their sums; ``seconds`` is the sum of the whole calls."""
        ids = self.ids(case)
        layers = list[LayerCost]()

        def timing(call: AttentionCall) -> None:
            layers.append(layer_cost(what, call))
            watcher(call)

        read(self._model, ids, None, positions=1, on_attention=timing)
        return {"device": _device_name(self._model.device), **summary(layers)}


def summary(layers: Sequence[LayerCost]) -> Record:
    """What a record says of all layers."""
    parts = {part: [_milliseconds(getattr(layer, part)) for layer in layers] for part in ("selection", "attention", "whole")}
    sums = {f"{part}_ms": round(sum(values), _DIGITS) for part, values in parts.items()}
    peers = {name for layer in layers for name in layer.peers}
    return {
        "density": fmean(layer.density for layer in layers),
        "seconds": sums["whole_ms"] / 1e3,
        "fused": all(layer.fused for layer in layers),
        "repeats": REPEATS,
        **parts,
        **sums,
        "dense_ms": {name: _milliseconds(sum(layer.peers.get(name, 0.0) for layer in layers)) for name in sorted(peers)},
    }


def _milliseconds(seconds: float) -> float:
    return round(1e3 * seconds, _DIGITS)


def _device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else str(torch.get_device_module(device).get_device_name(device))
