"""Describe what a model class of transformers supports, and what is checked when a model takes "stem" or settings."""

import sys
from functools import wraps
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from stem_attention.errors import UnsupportedError, bad_argument
from stem_attention.integrations.transformers.settings import KEY, Default, Settings, store
from stem_attention.policies import Policy, read_policy

NAME = "stem"

# Models whose classes support eager attention alone because "sdpa" knows no sinks and no soft caps, which Stem computes.
_OURS = ("flint", "gemma2", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash", "t5gemma", "vaultgemma")
# By config class. A compiled graph can read this dictionary, but not the classes.
_EAGER_ONLY: dict[type[Any], bool] = {}


def is_eager_only(config: PreTrainedConfig | None, model_class: type[PreTrainedModel] | None = None) -> bool:
    """Say whether the classes of a config, or else this one, support eager attention alone, for reasons that are not known.

    Then only their own function knows what they compute, and only the masks of "eager" fit it.
    """
    kind: Any = type(config)
    if kind in _EAGER_ONLY or torch.compiler.is_compiling():
        return _EAGER_ONLY.get(kind, False)
    module = sys.modules.get(kind.__module__.replace(".configuration_", ".modeling_"))
    found = [cls for cls in vars(module).values() if getattr(cls, "config_class", None) is kind] if module else []
    found = found or ([] if model_class is None else [model_class])
    known = kind.__module__.startswith(tuple(f"transformers.models.{name}." for name in _OURS))
    _EAGER_ONLY[kind] = not known and any(issubclass(cls, PreTrainedModel) and not cls._supports_sdpa for cls in found)
    return _EAGER_ONLY[kind]


def _keeps_own_attention(model: PreTrainedModel) -> bool:
    """Say whether layers of a class never call the function that is registered under the name in their config."""
    # The source of a class from a notebook cannot be read: its base class tells.
    known: Any = next(cls for cls in type(model).__mro__ if hasattr(sys.modules.get(cls.__module__), "__file__"))
    if not known._can_set_attn_implementation():
        return True
    # Older files pick a class from a table, by the name in the config.
    return any(name.endswith("_ATTENTION_CLASSES") for name in vars(sys.modules[known.__module__]))


def _own_attention_error(model: PreTrainedModel) -> UnsupportedError:
    return UnsupportedError(
        f"{type(model).__name__} keeps its own attention: its class does not use the attention interface of transformers; load "
        'it with attn_implementation="eager", or use another model class'
    )


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the part of a config that its text decoder reads, the very object."""
    found = config.get_text_config(decoder=True)
    return config if config.is_encoder_decoder and type(found) is type(config) else found  # older ones give a changed copy


def watch_loading() -> None:
    """Have transformers ask :func:`_take` whenever a model takes "stem"; it offers no hook of its own for that."""
    inner = PreTrainedModel.get_correct_attn_implementation

    @wraps(inner)
    def asking(model: PreTrainedModel, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        return inner(model, _take(model) if requested_attention == NAME else requested_attention, *args, **kwargs)

    PreTrainedModel.get_correct_attn_implementation = asking  # type: ignore[method-assign, assignment]


def _take(model: PreTrainedModel) -> str | None:
    """Check a model that takes "stem"; None, the host's own choice, is for a part with its own attention that reads no text."""
    if _keeps_own_attention(model):
        if _text_config(model.config) is model.config and hasattr(model.config, "vocab_size"):
            raise _own_attention_error(model)
        return None
    is_eager_only(model.config, type(model))
    if getattr(model.config, KEY, None) is not None:
        store(model.config, getattr(model.config, KEY))
    return NAME


def register(policy: Policy | str | None = None, *, dense_below: int | None = None, dense_layers: int = 0) -> None:
    """Set what models on "stem" keep that store nothing of their own; ``register()`` is ``Mass()`` again.

    Importing the package has made "stem" known. Arguments and errors as in :func:`set_policy`.
    """
    Default.settings = Settings(read_policy(policy), dense_below, dense_layers)


def set_policy(
    model: PreTrainedModel, policy: Policy | str | None = None, *, dense_below: int | None = None, dense_layers: int = 0
) -> None:
    """Store what a model keeps in its (text) config, with which it is saved and loaded again.

    Args:
        model: A model on "stem".
        policy: A policy, a spec such as ``"mass:share=8"``, or None for the default.
        dense_below: Prompts of fewer tokens run dense, with 0 none; None where dense attention was measured to be faster.
        dense_layers: First layers that run dense.

    Raises:
        ValueError: An argument is bad, or the policy was made for another model.
        UnsupportedError: As in :func:`check_model`.
    """
    config = check_model(model)
    store(config, Settings(Default.settings.policy if policy is None else read_policy(policy), dense_below, dense_layers))


def check_model(model: PreTrainedModel) -> PreTrainedConfig:
    """Check that a model runs "stem", and return the config that its text layers read.

    Raises:
        ValueError: ``model`` is no model of transformers.
        UnsupportedError: Its class keeps its own attention or has none, or it was loaded with another attention function.
    """
    if not isinstance(model, PreTrainedModel):
        fix = "load one with from_pretrained, or pass the one inside if this wraps it, as peft, torch.compile and DDP do"
        raise bad_argument("model", "a model of transformers", type(model).__name__, fix)
    text = _text_config(model.config)
    owners = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part.config is text] or [model]
    for owner in owners:
        if _keeps_own_attention(owner):
            raise _own_attention_error(owner)
    if not any("ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[type(part).__module__]) for part in owners[0].modules()):
        raise UnsupportedError(f"{type(model).__name__} has no attention layer for Stem to run; leave it as it is")
    if text._attn_implementation != NAME:
        runs = f'{type(model).__name__} runs attn_implementation="{text._attn_implementation}"'
        raise UnsupportedError(f'{runs}; call model.set_attn_implementation("{NAME}")')
    return text
