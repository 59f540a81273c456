"""SGLang's objects, as its model runner hands them to an attention backend.

Where sglang is installed they are its own: ForwardBatch, RadixAttention, both pools and the torch_native backend. Elsewhere
stand-ins take their place, with the fields and signatures of the published source of 0.5.23. A model runner needs a model and
all of SGLang's packages: it is a plain namespace in both cases.
"""

import importlib.util
import sys
from dataclasses import dataclass
from enum import Enum, IntEnum
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

REAL = importlib.util.find_spec("sglang") is not None
LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 16
HEADS_OF_ALL_RANKS, CONTEXT = HEADS, 2048
PARALLEL = {"attn_cp_size": 1, "attn_dcp_size": 1, "attn_tp_size": 1, "attn_tp_rank": 0}


def make_exec(prefill_graphs: str = "disabled") -> Any:
    """What ``get_exec()`` answers once the launcher has published its arguments."""
    phases = SimpleNamespace(prefill=SimpleNamespace(backend=prefill_graphs))
    return SimpleNamespace(graph=SimpleNamespace(cuda_graph_config=phases))


class _ForwardMode(IntEnum):
    EXTEND, DECODE, MIXED, IDLE, TARGET_VERIFY = range(1, 6)

    def is_context_parallel_extend(self) -> bool:
        return self in (self.EXTEND, self.MIXED)

    def is_decode_or_idle(self) -> bool:
        return self in (self.DECODE, self.IDLE)


class _AttentionType(Enum):
    DECODER = "decoder"
    ENCODER_ONLY = "encoder_only"


class _AttentionBackend:
    needs_cpu_seq_lens = True
    extend_dummy_seqs_capped_by_req_pool = False


@dataclass
class _KVWriteLoc:
    loc: Tensor

    @classmethod
    def for_batch(cls, forward_batch: Any) -> Any:
        return cls(forward_batch.out_cache_loc)


# Torch does not index fp8.
_BYTES = {torch.float32: torch.float32, torch.float8_e4m3fn: torch.uint8}


class _Pool:
    kv_cache_layout = "nhd"

    def __init__(self, slots: int, dtype: torch.dtype) -> None:
        shape, self.dtype = (LAYERS, slots, KV_HEADS, DIM), dtype
        self.k_buffer, self.v_buffer = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)

    def get_key_buffer(self, layer_id: int) -> Tensor:
        return self.k_buffer[layer_id]

    def get_value_buffer(self, layer_id: int) -> Tensor:
        return self.v_buffer[layer_id]

    def set_kv_buffer(
        self, layer: Any, loc_info: _KVWriteLoc, cache_k: Tensor, cache_v: Tensor, k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:  # fmt: skip
        stored = (self.k_buffer, cache_k, k_scale), (self.v_buffer, cache_v, v_scale)
        for buffer, new, scale in stored:
            if new.dtype != self.dtype and scale is not None:
                new.div_(scale)
            buffer[layer.layer_id].view(_BYTES[self.dtype])[loc_info.loc] = new.to(self.dtype).view(_BYTES[self.dtype])


class _TorchNative(_AttentionBackend):
    """Dense attention request by request."""

    def __init__(self, runner: Any) -> None:
        self.pool, self.table = runner.token_to_kv_pool, runner.req_to_token_pool.req_to_token

    def init_forward_metadata(self, forward_batch: Any) -> None:
        pass

    def forward_extend(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> Tensor:
        if save_kv_cache and k is not None and v is not None:
            self.pool.set_kv_buffer(layer, _KVWriteLoc.for_batch(forward_batch), k, v)
        out = torch.empty_like(q)
        starts = [0, *forward_batch.extend_seq_lens.cumsum(0).tolist()]
        for i, (low, high) in enumerate(pairwise(starts)):
            slots = self.table[forward_batch.req_pool_indices[i], : int(forward_batch.seq_lens[i])].long()
            keys, values = (x[layer.layer_id][slots].transpose(0, 1) for x in (self.pool.k_buffer, self.pool.v_buffer))
            length = len(slots)
            mask = torch.ones(high - low, length, dtype=torch.bool).tril(length - (high - low))
            queries = q[low:high].view(-1, layer.tp_q_head_num, layer.qk_head_dim).transpose(0, 1)
            part = torch.nn.functional.scaled_dot_product_attention(
                queries[None], keys[None], values[None], attn_mask=mask, scale=layer.scaling, enable_gqa=True
            )
            out[low:high] = part[0].transpose(0, 1).flatten(1)
        return out


def _install_stand_ins() -> None:
    """Put the modules that the plug-in imports where Python looks for them."""
    choices, backends = ["triton", "torch_native", "fa3"], {"torch_native": _TorchNative}
    contents: dict[str, dict[str, Any]] = {
        "arg_groups.choices": {"ATTENTION_BACKEND_CHOICES": choices, "add_attention_backend_choices": choices.extend},
        "layers.attention.attention_registry": {
            "ATTENTION_BACKENDS": backends,
            "register_attention_backend": lambda name: lambda build: backends.setdefault(name, build),
        },
        "layers.attention.base_attn_backend": {"AttentionBackend": _AttentionBackend},
        "mem_cache.memory_pool": {"KVWriteLoc": _KVWriteLoc, "MHATokenToKVPool": _Pool},
        "runtime_context": {"get_parallel": lambda: SimpleNamespace(**PARALLEL), "get_exec": make_exec},
    }
    for path, names in contents.items():
        parts = f"sglang.srt.{path}".split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), ModuleType(parts[end - 1]))
        vars(sys.modules[".".join(parts)]).update(names)


if REAL:
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
    from sglang.srt.runtime_context import get_parallel

    get_parallel().override_permanently(**PARALLEL)  # the launcher's part
else:
    _install_stand_ins()
    AttentionType, ForwardMode = _AttentionType, _ForwardMode


def make_runner(slots: int = 4096, requests: int = 8, context: int = CONTEXT, kv_dtype: torch.dtype = torch.float32) -> Any:
    """What a ``ModelRunner`` offers when it builds its attention backends."""
    if REAL:
        pool = MHATokenToKVPool(
            size=slots, page_size=1, dtype=kv_dtype, head_num=KV_HEADS, head_dim=DIM, layer_num=LAYERS, device="cpu",
            enable_memory_saver=False,
        )  # fmt: skip
        table: Any = ReqToTokenPool(size=requests, max_context_len=context, device="cpu", enable_memory_saver=False)
    else:
        pool = _Pool(slots + 1, kv_dtype)
        table = SimpleNamespace(req_to_token=torch.zeros(requests + 1, context, dtype=torch.int32))
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer.fill_(torch.nan)  # what nobody wrote must not be read
    return SimpleNamespace(
        device="cpu", dtype=torch.float32, kv_cache_dtype=kv_dtype, use_mla_backend=False, token_to_kv_pool=pool,
        req_to_token_pool=table,
        kv_index_translator=SimpleNamespace(is_translating=False), decode_attention_backend_str="torch_native",
        prefill_attention_backend_str="stem",
        model_config=SimpleNamespace(
            head_dim=DIM, num_attention_layers=LAYERS, num_attention_heads=HEADS_OF_ALL_RANKS, context_len=context
        ),
    )  # fmt: skip


def make_layer(layer_id: int = 0, **fields: Any) -> Any:
    """A ``RadixAttention``; ``fields`` replace its attributes."""
    if REAL:
        layer: Any = RadixAttention(HEADS, DIM, DIM**-0.5, KV_HEADS, layer_id)
    else:
        layer = SimpleNamespace(
            tp_q_head_num=HEADS, tp_k_head_num=KV_HEADS, tp_v_head_num=KV_HEADS, head_dim=DIM, qk_head_dim=DIM, v_head_dim=DIM,
            scaling=DIM**-0.5, layer_id=layer_id, logit_cap=0.0, sliding_window_size=-1, is_cross_attention=False,
            use_irope=False, k_scale=None, v_scale=None, attn_type=AttentionType.DECODER, pos_encoding_mode="NONE",
            logit_capping_method="tanh", xai_temperature_len=-1,
        )  # fmt: skip
    for name, value in fields.items():
        setattr(layer, name, value)
    return layer


def make_batch(mode: str, slots: list[Tensor], new: list[int], whole: list[int] | None, table: Tensor) -> Any:
    """The ``ForwardBatch`` that ``ForwardBatch.init_new`` makes of requests.

    Args:
        mode: Name of a ``ForwardMode``.
        slots: Cache slots of every request's tokens so far, those of this batch included.
        new: How many of them are of this batch.
        whole: Length of every request's prompt, as ``ScheduleBatch.prepare_for_extend`` writes it; None where it is left out.
        table: ``req_to_token``, which is filled in here as the scheduler does.
    """
    lengths = [len(part) for part in slots]
    for i, part in enumerate(slots):
        table[i + 1, : len(part)] = part
    fields: dict[str, Any] = {
        "forward_mode": ForwardMode[mode],
        "batch_size": len(slots),
        "input_ids": torch.zeros(sum(new), dtype=torch.int64),
        "req_pool_indices": torch.arange(1, len(slots) + 1),
        "seq_lens": torch.tensor(lengths),
        "out_cache_loc": torch.cat([part[len(part) - count :] for part, count in zip(slots, new, strict=True)]),
        "seq_lens_sum": sum(lengths),
        "orig_seq_lens": None if whole is None else torch.tensor(whole, dtype=torch.int32),
        "seq_lens_cpu": torch.tensor(lengths),
        "encoder_lens": None,
        "multi_item_delimiter_indices": None,
        "extend_seq_lens": torch.tensor(new, dtype=torch.int32),
        "extend_prefix_lens": torch.tensor([a - b for a, b in zip(lengths, new, strict=True)], dtype=torch.int32),
        "extend_seq_lens_cpu": list(new),
        "extend_prefix_lens_cpu": [a - b for a, b in zip(lengths, new, strict=True)],
        "extend_num_tokens": sum(new),
    }
    return ForwardBatch(**fields) if REAL else SimpleNamespace(**fields)
