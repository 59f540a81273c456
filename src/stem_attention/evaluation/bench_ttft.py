"""Time to first token: whole models read whole prompts, dense and with Stem, in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stem_attention.api import dense_limit, select_blocks
from stem_attention.config import StemConfig
from stem_attention.evaluation.bench_ttft_contestants import STEM, Contestant
from stem_attention.evaluation.bench_ttft_models import prefill, random_tokens
from stem_attention.evaluation.bench_ttft_parts import Layer, Parts, observe

# Dense prefills of long prompts take seconds: from here on a peer that was this much slower than the best at the length
# before stays out, and dense peers make no first call of their own.
LONG = 65536
_CLEARLY_SLOWER = 1.1
_REPEATS = ((32768, 5), (LONG, 3))
_LONG_REPEATS = 2


@dataclass
class Timing:
    """One contestant at one length.

    Attributes:
        first: Seconds of the process's first call at this length, compilation included; None where it was not measured.
        warm: Seconds of every timed prefill.
        parts: Those of one more prefill, taken apart.
        peak: Most bytes allocated during a prefill, weights included; None on a CPU.
    """

    first: float | None = None
    warm: list[float] = field(default_factory=list)
    parts: Parts = field(default_factory=lambda: Parts(0.0, 0.0, 0.0))
    peak: int | None = None

    @property
    def seconds(self) -> float:
        """Median of the timed prefills."""
        return statistics.median(self.warm)


@dataclass(frozen=True)
class PrefillResult:
    """One length.

    Attributes:
        length: Tokens.
        density: Kept share of the causal blocks in the middle layer; 1 where Stem runs dense.
        timings: By contestant.
        left_out: Contestants without times, and why.
    """

    length: int
    density: float
    timings: dict[str, Timing]
    left_out: dict[str, str]

    @property
    def best_dense(self) -> str | None:
        """The fastest dense contestant, if any ran."""
        dense = [name for name in self.timings if name != STEM]
        return min(dense, key=lambda name: self.timings[name].seconds, default=None)

    @property
    def ratios(self) -> dict[str, float]:
        """How many times faster Stem is than the fastest dense contestant: in all, and in attention; and its memory."""
        best = self.best_dense
        if best is None or STEM not in self.timings:
            return {}
        dense, ours = self.timings[best], self.timings[STEM]
        attention = min(timing.parts.attention for name, timing in self.timings.items() if name != STEM)
        found = {"total": dense.seconds / ours.seconds, "attention": attention / ours.parts.attention}
        return found if dense.peak is None or ours.peak is None else {**found, "memory": ours.peak / dense.peak}


def repeat_count(length: int, asked: int | None) -> int:
    """Timed prefills of a length: ``asked``, else fewer the longer they are."""
    return asked if asked is not None else next((few for below, few in _REPEATS if length < below), _LONG_REPEATS)


def pass_count(length: int, entrants: list[Contestant], repeats: int) -> int:
    """Prefills that :func:`time_prefill` makes if none runs out of memory."""
    return len(entrants) * (repeats + 1) + sum(_has_first_call(entrant, length) for entrant in entrants)


def _has_first_call(entrant: Contestant, length: int) -> bool:
    return entrant.name == STEM or length < LONG


def outpaced(results: list[PrefillResult], length: int) -> dict[str, str]:
    """Dense contestants that need not run at a length, given the results of shorter ones, and why."""
    best = results[-1].best_dense if results else None
    if length < LONG or best is None:
        return {}
    last = results[-1]
    slower = {name: timing.seconds / last.timings[best].seconds for name, timing in last.timings.items() if name != STEM}
    clearly = {
        name: f"{ratio:.2f} times the time of {best} at {last.length} tokens"
        for name, ratio in slower.items()
        if ratio > _CLEARLY_SLOWER
    }
    return {**{name: why for name, why in last.left_out.items() if name != STEM}, **clearly}


def time_lengths(
    model: PreTrainedModel, entrants: list[Contestant], lengths: list[int], config: StemConfig, *, repeats: int | None,
    seed: int, on_length: Callable[[int, int], Callable[[], None]],
) -> list[PrefillResult]:  # fmt: skip
    """:func:`time_prefill` at every length.

    Args:
        model: The model.
        entrants: Checked contestants.
        lengths: Tokens, ascending.
        config: Stem's.
        repeats: Timed prefills of each; by default fewer the longer they are.
        seed: Of the tokens.
        on_length: Called with each length and the prefills to come; what it returns is called after every prefill.
    """
    results: list[PrefillResult] = []
    for length in lengths:
        resting = outpaced(results, length)
        running = [entrant for entrant in entrants if entrant.name not in resting]
        count = repeat_count(length, repeats)
        on_pass = on_length(length, pass_count(length, running, count))
        result = time_prefill(model, running, length, config, repeats=count, seed=seed, on_pass=on_pass)
        result.left_out.update(resting)
        results.append(result)
    return results


def time_prefill(
    model: PreTrainedModel, entrants: list[Contestant], length: int, config: StemConfig, *, repeats: int, seed: int,
    on_pass: Callable[[], None],
) -> PrefillResult:  # fmt: skip
    """Run everyone's first call, then a prefill taken apart, then the timed ones in turn.

    Args:
        model: The model.
        entrants: Checked contestants.
        length: Tokens of the prompt.
        config: Stem's.
        repeats: Timed prefills of each.
        seed: Of the tokens.
        on_pass: Called after every prefill.
    """
    tokens = random_tokens(model, length, seed)
    timings: dict[str, Timing] = {}
    left_out: dict[str, str] = {}
    density = 1.0
    for entrant in entrants:
        with entrant.running(model, config):
            opened = _open(model, tokens, _has_first_call(entrant, length), on_pass)
        if opened is None:
            torch.cuda.empty_cache()
            left_out[entrant.name] = "out of memory"
            continue
        timings[entrant.name], layer = opened
        if entrant.name == STEM:
            density = _density(layer, config.for_layer(_middle_layer(model)))
        del opened, layer  # as large as a layer's attention
    running = [entrant for entrant in entrants if entrant.name in timings]
    for current in range(repeats):
        first = current % max(len(running), 1)
        for entrant in [*running[first:], *running[:first]]:
            with entrant.running(model, config), _PeakMemory(tokens.device) as memory:
                timings[entrant.name].warm.append(prefill_seconds(model, tokens))
            timings[entrant.name].peak = memory.peak
            on_pass()
    return PrefillResult(length, density, timings, left_out)


def _open(model: PreTrainedModel, tokens: Tensor, first_call: bool, on_pass: Callable[[], None]) -> tuple[Timing, Layer] | None:
    """The first call, if asked for, and the prefill taken apart with its middle layer; None where memory runs out."""
    timing = Timing()
    try:
        if first_call:
            timing.first = prefill_seconds(model, tokens)
            on_pass()
        observed = observe(model, tokens, _middle_layer(model))
        on_pass()
    except torch.OutOfMemoryError:
        return None
    timing.parts = observed.parts
    return timing, observed.layer


def _middle_layer(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().num_hidden_layers) // 2


def prefill_seconds(model: PreTrainedModel, tokens: Tensor) -> float:
    """From the call to the logits, the host's part included."""
    _wait(tokens.device)
    start = perf_counter()
    prefill(model, tokens)
    _wait(tokens.device)
    return perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _density(layer: Layer, config: StemConfig) -> float:
    """Of a layer's selection, from what went into its attention."""
    q, k, v = (x.transpose(1, 2) for x in (layer.query, layer.key, layer.value))
    if k.shape[1] < dense_limit(device=q.device, dtype=q.dtype, head_dim=q.shape[3], config=config):
        return 1.0
    with torch.inference_mode():
        return select_blocks(q, k, v, config=config).density()


class _PeakMemory:
    """Most bytes allocated while it is open; None on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak: int | None = None

    def __enter__(self) -> _PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self._device)
