"""The backends there are, and which one serves a request."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from stem_attention.backends.base import Backend, Request
from stem_attention.backends.hopper import HopperBackend
from stem_attention.backends.reference import ReferenceBackend
from stem_attention.backends.torch import TorchBackend
from stem_attention.backends.triton import TritonBackend
from stem_attention.errors import UnsupportedError, bad_argument

AUTO = "auto"


@cache
def _backends() -> dict[str, Backend]:
    """All backends, fastest first."""
    return {backend.name: backend for backend in (HopperBackend(), TritonBackend(), TorchBackend(), ReferenceBackend())}


def backend_names() -> tuple[str, ...]:
    """Valid values of ``backend=``."""
    return (AUTO, *_backends())


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a request, and why each other one does not.

    Attributes:
        request: What was asked for.
        chosen: Name of the backend that runs, or None when none can.
        reasons: One clause per backend, fastest first.
    """

    request: Request
    chosen: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        asked = self.request
        lines = [
            f"{asked.device} {asked.dtype} head_dim={asked.head_dim} block_size={asked.block_size}: {self.chosen or 'none'}"
        ]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.reasons.items()])


def explain_request(request: Request, backend: str = AUTO) -> Explanation:
    """Say which backend ``backend`` resolves to for ``request``, and why.

    Raises:
        ValueError: ``backend`` is not a known name.
    """
    if backend not in backend_names():
        raise bad_argument("backend", f"one of {', '.join(backend_names())}", repr(backend), 'use "auto" unless you compare')
    chosen, reasons = None, {}
    for name, candidate in _backends().items():
        obstacle = candidate.supports(request)
        if obstacle is not None:
            reasons[name] = f"cannot run: {obstacle}"
        elif backend == name or (backend == AUTO and chosen is None and name != "reference"):
            chosen = name
            reason = "runs: asked for by name" if backend == name else "runs: the fastest that supports this"
            reasons[name] = f"{reason}; {candidate.caveat}" if candidate.caveat else reason
        elif backend != AUTO:
            reasons[name] = f"not asked for: backend={backend!r}"
        else:
            reasons[name] = "the oracle, only by name" if name == "reference" else f"slower than {chosen}"
    return Explanation(request, chosen, reasons)


@cache
def get_backend(request: Request, backend: str = AUTO) -> Backend:
    """The backend that serves ``request``.

    Raises:
        ValueError: ``backend`` is not a known name.
        UnsupportedError: It cannot serve the request; the message gives every backend's reason.
    """
    explanation = explain_request(request, backend)
    if explanation.chosen is None:
        raise UnsupportedError(f"backend={backend!r} cannot run this call.\n{explanation}")
    return _backends()[explanation.chosen]
