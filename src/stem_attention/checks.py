"""Checks of tensor arguments, shared by every public entry."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from stem_attention.config import StemConfig
from stem_attention.errors import UnsupportedError, bad_argument
from stem_attention.selection import BlockSelection

_DEFAULT = StemConfig()
_unpack_dual: Callable[[Tensor], tuple[Tensor, Tensor | None]] = unpack_dual
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_qkv(q: Tensor, k: Tensor, v: Tensor, layout: tuple[str, ...] = ("batch", "length", "heads", "dim")) -> None:
    """Check rank, dtype, device, heads and dimensions of q, k and v.

    Raises:
        ValueError: The message names the tensor, what was expected, what came and the way out.
        UnsupportedError: A gradient would be needed.
    """
    axes = ", ".join(layout)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise bad_argument(name, f"a tensor ({axes})", type(x).__name__, "pass a torch.Tensor")
        if x.dim() != len(layout):
            raise bad_argument(name, f"{len(layout)} dimensions ({axes})", f"shape {_shape(x)}", "reshape or transpose it")
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            expected = "bfloat16, float16, float32 or float64" if name == "q" else f"the dtype of q, {q.dtype}"
            raise bad_argument(name, expected, x.dtype, "convert it with .to()")
        if x.device != q.device:
            raise bad_argument(name, f"the device of q, {q.device}", x.device, "move it with .to()")
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise bad_argument(name, "a contiguous last dimension", f"strides {x.stride()}", "call .contiguous()")
        if x.shape[-1] != q.shape[-1] or x.shape[-1] == 0:
            raise bad_argument(
                name, f"the head dimension of q, {q.shape[-1]}, and not 0", x.shape[-1], "match the last dimensions"
            )
    if v.shape != k.shape:
        raise bad_argument("v", f"the shape of k, {_shape(k)}", _shape(v), "give one value for every key")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        fix = "query head h reads kv head h // (q_heads // kv_heads)"
        raise bad_argument("k", f"a number of kv heads that divides the {heads} query heads", kv_heads, fix)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise UnsupportedError("Stem has no backward pass yet; call it under torch.no_grad() or torch.inference_mode()")
    # Operators drop tangents without a word, and forward mode asks no tensor whether it requires a gradient.
    if not torch.compiler.is_compiling() and any(_unpack_dual(x)[1] is not None for x in (q, k, v)):
        raise UnsupportedError("Stem has no forward-mode derivative; detach q, k and v, or leave the dual level")


def check_batch(q: Tensor, k: Tensor) -> None:
    """Check batch and lengths of ``(batch, length, heads, dim)`` tensors.

    Raises:
        ValueError: Empty or different batches, or fewer keys than queries.
    """
    if q.shape[0] == 0 or q.shape[0] != k.shape[0]:
        got = f"{q.shape[0]} in q and {k.shape[0]} in k"
        raise bad_argument("q", "the same batch size in q and k, at least 1", got, "skip the call for an empty batch")
    if k.shape[1] < q.shape[1]:
        fix = "queries are the last positions of the keys; pass the cached keys too"
        raise bad_argument("k", f"at least the {q.shape[1]} positions of q", k.shape[1], fix)


def check_scale(scale: float | None, head_dim: int) -> float:
    """The softmax scale, ``1 / sqrt(head_dim)`` unless given.

    Raises:
        ValueError: It is not a finite number.
    """
    if scale is None:
        return float(head_dim**-0.5)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) <= sys.float_info.max:
        raise bad_argument("scale", "a finite number or None", repr(scale), "leave it out for 1 / sqrt(head_dim)")
    return float(scale)


def check_config(config: StemConfig | None, heads: int | None = None) -> StemConfig:
    """The config, ``StemConfig()`` unless given; for a call of one layer if that has ``heads`` query heads.

    Raises:
        ValueError: It is something else, or its ``head_factors`` are for several layers or another number of heads.
    """
    if config is None:
        return _DEFAULT
    if not isinstance(config, StemConfig):
        raise bad_argument("config", "a StemConfig or None", type(config).__name__, "build one with StemConfig(...)")
    if heads is not None and config.head_factors is not None:
        shape = len(config.head_factors), len(config.head_factors[0])
        if shape != (1, heads):
            expected = f"head_factors of one layer and the {heads} query heads of q"
            raise bad_argument("config", expected, f"{shape[0]} x {shape[1]} of them", "pass config.for_layer(layer)")
    return config


def check_backend(backend: str) -> str:
    """The name of a backend; whether there is one of that name is for the registry to say.

    Raises:
        ValueError: It is not a string.
    """
    if not isinstance(backend, str):
        raise bad_argument("backend", "the name of a backend", repr(backend), 'use "auto" unless you compare')
    return backend


def check_flag(name: str, value: bool) -> None:
    """Check that an argument is ``True`` or ``False``.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(value, bool):
        raise bad_argument(name, "True or False", repr(value), "pass one of the two")


def check_prompt_len(prompt_len: int | None, kv_len: int) -> int:
    """The length of the whole prompt, ``kv_len`` unless given.

    Raises:
        ValueError: It is shorter than the keys that are there.
    """
    if prompt_len is None:
        return kv_len
    if isinstance(prompt_len, bool) or not isinstance(prompt_len, int) or prompt_len < kv_len:
        fix = "it counts every token of the prompt, also those still to come"
        raise bad_argument("prompt_len", f"an integer >= the {kv_len} keys given", repr(prompt_len), fix)
    return prompt_len


def check_selection(selection: BlockSelection, q: Tensor, k: Tensor) -> None:
    """Check that a selection was made for these tensors. Its contents are not read here.

    Raises:
        ValueError: It is for other shapes or another device.
    """
    if not isinstance(selection, BlockSelection):
        raise bad_argument("selection", "a BlockSelection", type(selection).__name__, "make one with select_blocks or a policy")
    made_for = (*selection.counts.shape[:2], selection.q_len, selection.kv_len)
    needed = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if made_for != needed:
        raise bad_argument("selection", f"(batch, q_heads, q_len, kv_len) = {needed}", made_for, "select for these q, k and v")
    for part in (selection.indices, selection.counts):
        if part.device != q.device:
            raise bad_argument("selection", f"the device of q, {q.device}", part.device, "move it or select again")


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
