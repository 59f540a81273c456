"""How attention over a selection runs: one folder per backend, and the choice among them."""

from stem_attention.backends.base import Backend, Request
from stem_attention.backends.registry import Explanation, backend_names, explain_request, get_backend
from stem_attention.backends.run import attend, backend_of, run, select

__all__ = [
    "Backend", "Explanation", "Request", "attend", "backend_names", "backend_of", "explain_request", "get_backend", "run",
    "select",
]  # fmt: skip
