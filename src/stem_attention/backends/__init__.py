"""How attention over a selection runs: one folder per backend, and the choice among them."""

from stem_attention.backends.base import Backend, Request
from stem_attention.backends.registry import Explanation, backend_names, explain_request, get_backend
from stem_attention.backends.run import backend_of, backward, run, run_kept, select

__all__ = [
    "Backend", "Explanation", "Request", "backend_names", "backend_of", "backward", "explain_request", "get_backend", "run",
    "run_kept", "select",
]  # fmt: skip
