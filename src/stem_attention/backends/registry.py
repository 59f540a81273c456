"""The backends there are, and which one serves a request."""

from dataclasses import dataclass
from functools import cache

from stem_attention.backends.base import Backend, Request
from stem_attention.backends.fa4 import FA4Backend
from stem_attention.backends.hopper import HopperBackend
from stem_attention.backends.reference import ReferenceBackend
from stem_attention.backends.torch import TorchBackend
from stem_attention.backends.triton import TritonBackend
from stem_attention.errors import UnsupportedError, bad_argument
from stem_attention.policies.base import Policy
from stem_attention.policies.mass import Mass

AUTO = "auto"


@cache
def _backends() -> dict[str, Backend]:
    """All backends, fastest first."""
    backends = (HopperBackend(), FA4Backend(), TritonBackend(), TorchBackend(), ReferenceBackend())
    return {backend.name: backend for backend in backends}


def backend_names() -> tuple[str, ...]:
    """List the valid values of ``backend=``."""
    return (AUTO, *_backends())


@dataclass(frozen=True)
class Explanation:
    """Name the backend that serves a request, and say why each other one does not.

    Attributes:
        request: What was asked for.
        chosen: Name of the backend that runs, or None when none can.
        reasons: One clause per backend, fastest first.
        dense_below: Prompts of fewer tokens run dense; None when no backend can run.
        path: What a sparse call of :func:`stem_attention` runs through, from there to what computes, as module and function;
            "and" where selection and attention part.
    """

    request: Request
    chosen: str | None
    reasons: dict[str, str]
    dense_below: int | None = None
    path: tuple[str, ...] = ()

    def __str__(self) -> str:
        asked, chosen = self.request, self.chosen or "none"
        dims = f"head_dim={asked.head_dim}" + ("" if asked.value_dim is None else f" value_dim={asked.value_dim}")
        lines = [f"{asked.device} {asked.dtype} {dims} block_size={asked.block_size}: {chosen}"]
        lines += [f"  {name}: {reason}" for name, reason in self.reasons.items()]
        if self.chosen is not None:
            lines.append(f"  prompts of fewer than {self.dense_below} tokens run dense, others through")
            lines += [f"    {hop}" for hop in self.path]
        return "\n".join(lines)


def check_known(backend: str) -> None:
    """Raise a ValueError unless there is a backend of that name."""
    if backend not in backend_names():
        raise bad_argument("backend", f"one of {', '.join(backend_names())}", repr(backend), 'use "auto" unless you compare')


def explain_request(
    request: Request, backend: str = AUTO, policy: Policy | None = None, dense_below: int | None = None
) -> Explanation:
    """Say which backend ``backend`` resolves to for ``request``, and why; ValueError where that is no known name."""
    check_known(backend)
    chosen, reasons = None, {}
    for name, candidate in _backends().items():
        if (obstacle := candidate.why_not(request)) is not None:
            reasons[name] = f"cannot run: {obstacle}"
        elif backend not in (AUTO, name):
            reasons[name] = f"not asked for: backend={backend!r}"
        elif backend == AUTO and (only := candidate.only_by_name(request)) is not None:
            reasons[name] = only
        elif chosen is not None:
            reasons[name] = f"slower than {chosen.name}"
        else:
            chosen = candidate
            reason = "runs: asked for by name" if backend == name else "runs: the fastest that supports this"
            reasons[name] = f"{reason}; {candidate.caveat}" if candidate.caveat else reason
    if chosen is None:
        return Explanation(request, None, reasons)
    entered = ("stem_attention.api.stem_attention", "stem_attention.ops._attention", "stem_attention.backends.run.run")
    path = (*entered, *chosen.path(policy or Mass()))
    return Explanation(request, chosen.name, reasons, chosen.dense_limit(dense_below), path)


@cache
def get_backend(request: Request, backend: str = AUTO) -> Backend:
    """Return the backend that serves ``request``; UnsupportedError with every backend's reason where none can."""
    explanation = explain_request(request, backend)
    if explanation.chosen is None:
        raise UnsupportedError(f"backend={backend!r} cannot run this call.\n{explanation}")
    return _backends()[explanation.chosen]
