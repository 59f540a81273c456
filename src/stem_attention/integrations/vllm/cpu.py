"""vLLM's CPU backend with Stem. Its cache holds keys and values in an order that depends on the processor."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, CPUAttentionMetadataBuilder

from stem_attention.blocks import block_count
from stem_attention.call import PackedBatch
from stem_attention.errors import UnsupportedError
from stem_attention.integrations.vllm.host import StemBackend, StemImpl
from stem_attention.integrations.vllm.plugin import own_backend

_DIGIT_BITS = 7  # numbers below 128 are exact in every dtype


class StemCPUImpl(StemImpl, CPUAttentionBackendImpl):
    """Unpacks the keys and values of sparse rows, then computes them."""

    orders: ClassVar[dict[tuple[Any, ...], tuple[Tensor, Tensor]]] = {}

    def reads_fp8(self, layer: Any) -> bool:
        """Refuse: where keys lie is found by storing numbers that fp8 does not hold."""
        return False

    def keys_and_values(self, layer: Any, kv_cache: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, PackedBatch]:
        """Return packed keys and values of all rows, ``(total_k, kv_heads, head_dim)``, and a batch without pages."""
        assert batch.page_table is not None
        kind = (getattr(layer, "isa", getattr(self, "isa", None)), kv_cache.dtype, *kv_cache.shape[2:])
        if kind not in self.orders:
            self.orders[kind] = self._probe(layer, kv_cache)
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        page_size = kv_cache.shape[2]
        for i in range(batch.sequences):
            length = batch.k_starts[i + 1] - batch.k_starts[i]
            raw = kv_cache[batch.page_table[i, : block_count(length, page_size)].long()].flatten(2)
            for places, into in zip(self.orders[kind], parts, strict=True):
                page = raw.index_select(2, places).view(*raw.shape[:2], page_size, self.head_size)
                into.append(page.transpose(1, 2).flatten(0, 1)[:length])
        return torch.cat(parts[0]), torch.cat(parts[1]), replace(batch, page_table=None)

    def _probe(self, layer: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Find where a page holds its keys and its values: ``(page_size * head_dim)`` places each, in the order of tokens.

        The host stores a page of numbered entries, digit by digit: see where they went.
        """
        _, heads, page_size, width = kv_cache.shape
        entries = page_size * self.head_size
        numbers = torch.arange(entries).view(page_size, 1, self.head_size).expand(-1, heads, -1)
        found = torch.zeros(2, entries, dtype=torch.long)
        for shift in range(0, entries.bit_length(), _DIGIT_BITS):
            digit = (numbers >> shift & (1 << _DIGIT_BITS) - 1).to(kv_cache.dtype).contiguous()
            page = torch.zeros(1, heads, page_size, width, dtype=kv_cache.dtype)
            self.do_kv_cache_update(layer, digit, digit, page, torch.arange(page_size))
            found += page[0, 0].flatten().long().view(2, entries) << shift
        order = found.argsort(1)
        if not torch.equal(found.gather(1, order), torch.arange(entries).expand(2, -1)):
            raise UnsupportedError("Stem cannot read how vLLM's CPU build lays out its KV cache on this processor")
        return order[0], order[1] + entries


class StemCPUBackend(StemBackend, CPUAttentionBackend):
    """Takes the place of vLLM's CPU backend, and is nothing else unless ``--attention-backend STEM`` asks for Stem."""

    @staticmethod
    def get_name() -> str:
        """Return the one name that vLLM's CPU platform knows."""
        return "CPU_ATTN"

    @classmethod
    def get_impl_cls(cls) -> type:
        return StemCPUImpl if _is_asked_for() else CPUAttentionBackendImpl

    @classmethod
    def get_builder_cls(cls) -> type:
        return super().get_builder_cls() if _is_asked_for() else CPUAttentionMetadataBuilder


def _is_asked_for() -> bool:
    return get_current_vllm_config().attention_config.backend is own_backend()
