"""Who runs a model's prefill: Stem, and dense attention as transformers offers it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from stem_attention.config import StemConfig
from stem_attention.evaluation.bench_ttft_models import prefill
from stem_attention.evaluation.bench_ttft_parts import Observed, observe
from stem_attention.integrations.transformers import LayerCall, configure, register, set_config
from stem_attention.testing import relative_error

STEM = "Stem"
# Units of the dtype's rounding: of one attention, and of what a whole model makes of it. The floor is for float32, where
# sums in another order already differ by more.
_ATTENTION_ROUNDINGS, _ATTENTION_FLOOR = 4.0, 1e-5
_LOGITS_ROUNDINGS, _LOGITS_FLOOR = 8.0, 1e-4


class WrongResultError(Exception):
    """Stem's own result failed its check; there is nothing to time."""


@dataclass(frozen=True)
class Contestant:
    """A way to run a model's attention.

    Attributes:
        name: What tables call it.
        implementation: What transformers calls it.
        kernel: torch's kernel that "sdpa" is held to.
        module: What must be importable for it, if anything: transformers might go and fetch what it misses.
    """

    name: str
    implementation: str
    kernel: SDPBackend | None = None
    module: str | None = None

    @property
    def installed(self) -> bool:
        """Whether what it needs is here. Parents of a dotted module are imported."""
        if self.module is None:
            return True
        parent = self.module.rpartition(".")[0]
        return (not parent or find_spec(parent) is not None) and find_spec(self.module) is not None

    @contextmanager
    def running(self, model: PreTrainedModel, config: StemConfig) -> Iterator[None]:
        """Inside, the model runs its attention so.

        Raises:
            ImportError: transformers lacks a package for it.
        """
        if model.config._attn_implementation != self.implementation:
            model.set_attn_implementation(self.implementation)
        if self.name == STEM:
            set_config(model, config)
        if self.kernel is None:
            yield
        else:
            with sdpa_kernel(self.kernel):
                yield


@dataclass(frozen=True)
class ModelCheck:
    """How far a prefill is from the same with torch's plain attention, as relative errors.

    Attributes:
        tokens: Length of the prompt.
        attention: Of the first layer's attention.
        logits: Of the next token's logits.
    """

    tokens: int
    attention: float
    logits: float

    def problem(self, dtype: torch.dtype) -> str | None:
        """Why the result is not to be trusted, or None."""
        rounding = torch.finfo(dtype).eps
        limits = {
            "attention": max(_ATTENTION_ROUNDINGS * rounding, _ATTENTION_FLOOR),
            "logits": max(_LOGITS_ROUNDINGS * rounding, _LOGITS_FLOOR),
        }
        for name, limit in limits.items():
            error = getattr(self, name)
            if math.isnan(error) or error > limit:
                return f"{name} differ by {error:.1e} from dense, more than {limit:.1e}"
        return None


_PLAIN = Contestant("plain", "sdpa", SDPBackend.MATH)


def contestants(device: torch.device, dense: bool) -> list[Contestant]:
    """Stem, and dense attention unless left out: the fastest kernels that there may be on a GPU."""
    register()
    stem = Contestant(STEM, "stem")
    if not dense:
        return [stem]
    if device.type != "cuda":
        return [Contestant("SDPA", "sdpa"), stem]
    return [
        Contestant("cuDNN SDPA", "sdpa", SDPBackend.CUDNN_ATTENTION),
        Contestant("Flash SDPA", "sdpa", SDPBackend.FLASH_ATTENTION),
        Contestant("FlashAttention-2", "flash_attention_2", module="flash_attn"),
        Contestant("FlashAttention-3", "flash_attention_3", module="flash_attn_interface"),
        Contestant("FlashAttention-4", "flash_attention_4", module="flash_attn.cute"),
        stem,
    ]


def check_contestants(
    model: PreTrainedModel, entrants: list[Contestant], tokens: Tensor, config: StemConfig
) -> tuple[list[Contestant], dict[str, ModelCheck], dict[str, str]]:
    """Compare everyone with plain dense attention on a short prompt, Stem with every block kept.

    Returns:
        Those that ran and are right, everyone's check, and for each left out the reason.

    Raises:
        WrongResultError: Stem is wrong, or its layers would run dense.
    """
    keep_all = _keeping_all(config)
    expected = _observed(model, _PLAIN, tokens, config)
    admitted, checks, left_out = [], {}, {}
    for entrant in entrants:
        if not entrant.installed:
            left_out[entrant.name] = "not installed"
            continue
        try:
            found = _observed(model, entrant, tokens, keep_all)
        except ImportError:  # flash_attn is a folder that several packages share
            left_out[entrant.name] = "not installed"
            continue
        except (RuntimeError, ValueError) as error:  # what kernels raise that do not take a shape
            if entrant.name == STEM:
                raise
            left_out[entrant.name] = f"cannot run: {(str(error).strip().splitlines() or ['no message'])[0]}"
            continue
        check = ModelCheck(
            tokens.shape[1],
            relative_error(found.layer.out, expected.layer.out),
            relative_error(found.logits, expected.logits),
        )
        problem = check.problem(found.logits.dtype)
        if problem is not None and entrant.name == STEM:
            raise WrongResultError(f"wrong result at {check.tokens} tokens: {problem}")
        if problem is not None:
            left_out[entrant.name] = f"wrong: {problem}"
            continue
        admitted.append(entrant)
        checks[entrant.name] = check
    _check_sparse(model, tokens, keep_all)
    return admitted, checks, left_out


def _keeping_all(config: StemConfig) -> StemConfig:
    """The config with a rule that drops nothing."""
    everywhere = replace(config, dense_below=0, dense_layers=0)
    if config.keep == "mass":
        return replace(everywhere, share=sys.float_info.min)
    return replace(everywhere, schedule="smooth", ratio_short=1.0, ratio_long=1.0, decay=1.0, forced="inside")


def _observed(model: PreTrainedModel, entrant: Contestant, tokens: Tensor, config: StemConfig) -> Observed:
    with entrant.running(model, config):
        return observe(model, tokens, layer=0)


def _check_sparse(model: PreTrainedModel, tokens: Tensor, config: StemConfig) -> None:
    calls: list[LayerCall] = []
    with Contestant(STEM, "stem").running(model, config), configure(observer=calls.append):
        prefill(model, tokens)
    dense = [call for call in calls if not call.sparse]
    if dense or not calls:
        reason = f"{len(dense)} layers ran dense: {dense[0].reason}" if dense else "no layer called it"
        raise WrongResultError(f"Stem did not run at {tokens.shape[1]} tokens: {reason}")
