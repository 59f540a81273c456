"""Serve models in SGLang with Stem.

    pip install stem-attention
    python -m sglang.launch_server --model-path MODEL --prefill-attention-backend stem --decode-attention-backend fa3

and ``--disable-prefill-cuda-graph`` behind it.

SGLang finds the plug-in by its entry point. Prompts are read sparsely, straight from the token-granular cache, also in chunks
and behind cached prefixes; whatever else prefill does goes to the decode backend's own prefill. docs/sglang.md tells more.
"""

import logging
from typing import Any

from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend

from stem_attention.errors import bad_argument
from stem_attention.integrations.serving.settings import read_settings

__all__ = ["NAME", "create", "register"]

NAME = "stem"

logger = logging.getLogger(__name__)


def register() -> None:
    """Make ``--prefill-attention-backend stem`` known; SGLang's entry point, called in each of its processes.

    Raises:
        ValueError: ``STEM_ATTENTION_SETTINGS`` is bad; the message names the field.
    """
    read_settings()
    if NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([NAME])
    register_attention_backend(NAME)(create)


def create(runner: Any) -> Any:
    """Build the backend for a ``ModelRunner``; what Stem does not do, the decode backend's own prefill does.

    Raises:
        ValueError: The decode backend is ``stem`` as well, the settings are bad, or the policy is for another model.
        UnsupportedError: Nothing of this model could take Stem.
    """
    # These load SGLang's pools and forward batches, which the processes that only read arguments do not need.
    from stem_attention.integrations.sglang.backend import StemAttentionBackend
    from stem_attention.integrations.sglang.layers import check_model, rank_heads

    settings, decode, model = read_settings(), runner.decode_attention_backend_str, runner.model_config
    if decode == NAME:
        fix = "Stem only reads prompts: choose stem with --prefill-attention-backend"
        raise bad_argument("--decode-attention-backend", "a backend of SGLang's own, such as fa3", repr(decode), fix)
    check_model(runner)
    settings.policy.check_model(model.num_attention_layers, model.num_attention_heads)
    chosen = settings.explain(runner.device, runner.dtype, model.head_dim, getattr(model, "v_head_dim", None))
    backend = StemAttentionBackend(runner, ATTENTION_BACKENDS[decode](runner), settings, chosen, rank_heads(model))
    logger.info(
        "Stem is on: prompts of %d tokens or more are read sparsely by stem-attention's %s backend, the rest by %s; %s",
        backend.dense_below, chosen.chosen, decode, settings,
    )  # fmt: skip
    return backend
