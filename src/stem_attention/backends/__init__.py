"""How attention over a selection runs: one folder per backend, and the choice among them."""

from stem_attention.backends.base import Backend, Packing, Request
from stem_attention.backends.registry import Explanation, backend_names, explain_request, get_backend

__all__ = ["Backend", "Explanation", "Packing", "Request", "backend_names", "explain_request", "get_backend"]
