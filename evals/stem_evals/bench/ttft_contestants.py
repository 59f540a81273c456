"""Who runs a model's prefill, taken apart and checked: Stem, and dense attention as transformers offers it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from stem_attention import Policy
from stem_attention.integrations.transformers import LayerCall, use_policy
from stem_attention.models.prefill import wrap_attention
from stem_attention.policies import Dense
from stem_attention.testing import relative_error
from stem_evals.bench.checks import WrongResultError
from stem_evals.bench.peers import STEM, Peer, admit
from stem_evals.bench.timing import wait
from stem_evals.bench.ttft_models import prefill

# Units of the dtype's rounding: of one attention, and of what a whole model makes of it. The floor is for float32, where
# sums in another order already differ by more.
_ATTENTION_ROUNDINGS, _ATTENTION_FLOOR = 4.0, 1e-5
_LOGITS_ROUNDINGS, _LOGITS_FLOOR = 8.0, 1e-4


@dataclass(frozen=True)
class Contestant:
    """A way to run a model's attention.

    Attributes:
        name: For tables.
        implementation: What transformers calls it.
        kernel: torch's kernel that "sdpa" is held to.
        policy: Stem's.
        dense_below: Prompts of fewer tokens run dense in spite of the policy.
        installed: Whether its package is here; transformers might go and fetch what it misses.
    """

    name: str
    implementation: str
    kernel: SDPBackend | None = None
    policy: Policy | None = None
    dense_below: int | None = None
    installed: bool = True

    @contextmanager
    def running(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside, the model runs its attention so."""
        if model.config._attn_implementation != self.implementation:
            model.set_attn_implementation(self.implementation)
        with ExitStack() as stack:
            if self.kernel is not None:
                stack.enter_context(sdpa_kernel(self.kernel))
            if self.policy is not None:
                stack.enter_context(use_policy(self.policy, dense_below=self.dense_below))
            yield


def contestants(device: torch.device, policy: Policy, dense_below: int | None, dense: bool = True) -> list[Contestant]:
    """Dense attention unless left out, with the fastest kernels that there may be on a GPU; and last Stem."""
    stem = Contestant(STEM, "stem", policy=policy, dense_below=dense_below)
    if not dense:
        return [stem]
    if device.type != "cuda":
        return [Contestant("SDPA", "sdpa"), stem]
    return [
        Contestant("cuDNN SDPA", "sdpa", SDPBackend.CUDNN_ATTENTION),
        Contestant("Flash SDPA", "sdpa", SDPBackend.FLASH_ATTENTION),
        Contestant("FlashAttention-2", "flash_attention_2", installed=is_flash_attn_2_available()),
        Contestant("FlashAttention-3", "flash_attention_3", installed=is_flash_attn_3_available()),
        Contestant("FlashAttention-4", "flash_attention_4", installed=is_flash_attn_4_available()),
        stem,
    ]


class Observed(NamedTuple):
    """A prefill taken apart: logits, seconds of its parts; one layer's q, k, v and out, ``(1, length, heads, dim)`` each."""

    logits: Tensor
    seconds: dict[str, float]
    qkv: list[Tensor]
    out: Tensor


def observe(model: PreTrainedModel, contestant: Contestant, tokens: Tensor, layer: int = 0) -> Observed:
    """One prefill, ``total`` and all layers' ``attention`` timed: what another attention can change, without projections."""
    kept: list[Tensor] = []
    moments: list[Any] = []

    def mark() -> None:
        moments.append(_now(tokens.device))

    def timed(attend: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
        mark()
        result = attend(module, *args, **kwargs)
        mark()
        if module.layer_idx == layer:
            kept.extend([*(x.transpose(1, 2) for x in args[:3]), result[0]])
        return result

    with contestant.running(model), wrap_attention(contestant.implementation, timed):
        mark()
        logits = prefill(model, tokens)
        mark()
    wait(tokens.device)
    begin, *inner, end = moments
    attention = sum(_span(*pair) for pair in zip(inner[::2], inner[1::2], strict=True))
    return Observed(logits, {"total": _span(begin, end), "attention": attention}, kept[:3], kept[3])


def _now(device: torch.device) -> Any:
    """A moment of the device's time, without waiting for it, or on a CPU of the host's."""
    if device.type != "cuda":
        return perf_counter()
    kind: Any = torch.cuda.Event  # which torch has no types for
    event = kind(enable_timing=True)
    event.record()
    return event


def _span(start: Any, end: Any) -> float:
    return float(end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3)


def check_contestants(
    model: PreTrainedModel, entrants: list[Contestant], tokens: Tensor
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Compare everyone with plain dense attention on a short prompt, Stem with every block kept.

    Returns:
        Of those that ran and are right, relative errors of the first layer's ``attention`` and of the ``logits``; and for
        each other one the reason why it is left out.

    Raises:
        WrongResultError: Stem is wrong, or does not run, or some layer runs dense under its policy.
    """
    rounding = torch.finfo(model.dtype).eps
    limits = {
        "attention": max(_ATTENTION_ROUNDINGS * rounding, _ATTENTION_FLOOR),
        "logits": max(_LOGITS_ROUNDINGS * rounding, _LOGITS_FLOOR),
    }
    expected = observe(model, Contestant("plain", "sdpa", SDPBackend.MATH), tokens)
    checks: dict[str, dict[str, float]] = {}
    left_out = {entrant.name: "not installed" for entrant in entrants if not entrant.installed}

    def problem(name: str, found: Observed) -> str | None:
        pairs = {"attention": (found.out, expected.out), "logits": (found.logits, expected.logits)}
        errors = {part: relative_error(*pair) for part, pair in pairs.items()}
        wrong = [part for part, error in errors.items() if not error <= limits[part]]
        checks[name] = {"tokens": tokens.shape[1], **errors}
        return f"{wrong[0]} differ by {errors[wrong[0]]:.1e} from dense, more than {limits[wrong[0]]:.1e}" if wrong else None

    for entrant in entrants:
        keeping = entrant
        if entrant.policy is not None:
            keeping = replace(entrant, policy=Dense(block_size=entrant.policy.block_size), dense_below=0)
        if entrant.installed:
            peer: Peer[Observed] = partial(partial, observe, model, keeping, tokens)
            left_out |= admit({entrant.name: peer}, partial(problem, entrant.name))[1]
    if STEM in left_out:
        raise WrongResultError(f"wrong result at {tokens.shape[1]} tokens: {left_out[STEM]}")
    _check_sparse(model, entrants[-1], tokens)
    return {name: check for name, check in checks.items() if name not in left_out}, left_out


def _check_sparse(model: PreTrainedModel, stem: Contestant, tokens: Tensor) -> None:
    calls: list[LayerCall] = []
    with stem.running(model), use_policy(stem.policy, dense_below=0, observer=calls.append):
        prefill(model, tokens)
    reasons = {call.reason for call in calls if not call.sparse} if calls else {"no layer called it"}
    if reasons:
        raise WrongResultError(f"Stem did not run sparse at {tokens.shape[1]} tokens: {', '.join(sorted(reasons))}")
