"""Stem as one of SGLang's attention backends. What it does not do, the dense backend that it wraps does."""

import logging
from operator import attrgetter
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor

from stem_attention.backends import Explanation, run
from stem_attention.call import Call
from stem_attention.integrations.serving.counters import COUNTERS
from stem_attention.integrations.serving.report import report_now_and_then
from stem_attention.integrations.serving.rows import SparseRows
from stem_attention.integrations.serving.settings import Settings
from stem_attention.integrations.sglang.layers import FP8_CACHES, layer_obstacle
from stem_attention.integrations.sglang.step import plan
from stem_attention.policies import Policy

logger = logging.getLogger(__name__)


class StemAttentionBackend(AttentionBackend):  # type: ignore[misc]
    """Prefill with Stem over token-granular pages."""

    # Nothing of ours: answers, and what a CUDA graph holds, of decode and speculative verification.
    forward_decode = property(attrgetter("dense.forward_decode"))
    init_forward_metadata_in_graph = property(attrgetter("dense.init_forward_metadata_in_graph"))
    init_cuda_graph_state = property(attrgetter("dense.init_cuda_graph_state"))
    get_cuda_graph_seq_len_fill_value = property(attrgetter("dense.get_cuda_graph_seq_len_fill_value"))
    support_triton = property(attrgetter("dense.support_triton"))

    def __init__(self, runner: Any, dense: Any, settings: Settings, chosen: Explanation, heads: slice) -> None:
        """Wrap a backend built for a ``ModelRunner`` that :func:`..layers.check_model` let pass; ``heads`` are this rank's."""
        super().__init__()
        self.dense = dense
        self.settings = settings
        self.dense_below: int = chosen.dense_below or 0
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.kv_index_translator = runner.kv_index_translator
        self.needs_cpu_seq_lens = dense.needs_cpu_seq_lens
        self.extend_dummy_seqs_capped_by_req_pool = dense.extend_dummy_seqs_capped_by_req_pool
        self._heads = heads
        self._is_fp8 = runner.kv_cache_dtype in FP8_CACHES
        self._one = torch.ones((), device=runner.device)
        self._context_len: int = runner.model_config.context_len
        self._policies: dict[int, Policy | None] = {}
        self._batch: Any = None
        self._parts: list[tuple[SparseRows, int]] = []

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan a batch, before its layers."""
        self.dense.init_forward_metadata(forward_batch)
        self._plan(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Do the part of :meth:`init_forward_metadata` that no CUDA graph holds: all of ours."""
        self.dense.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        self._plan(forward_batch)

    def forward_extend(
        self, q: Tensor, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **extra: Any
    ) -> Any:
        """Compute attention of a prefill batch, ``(tokens, q_heads * v_head_dim)``."""
        if forward_batch is not self._batch:  # never the lengths of another batch, whoever skipped the call above
            self._plan(forward_batch)
        policy = self._policy(layer)
        # Nothing else that attention would have to heed.
        is_plain = all(value is None or value is False for name, value in extra.items() if name != "sinks")
        if not self._parts or policy is None or not is_plain:
            return self.dense.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **extra)
        pool, scales = self.token_to_kv_pool, self._scales(layer)
        if save_kv_cache and k is not None and v is not None:
            if scales[0] is None:
                pool.set_kv_buffer(layer, KVWriteLoc.for_batch(forward_batch), k, v)
            else:  # SGLang divides what it is given in place
                pool.set_kv_buffer(layer, KVWriteLoc.for_batch(forward_batch), k.clone(), v.clone(), *scales)
        # A slot is a page of one token: (slots, heads, dim) needs no copy to become a paged cache.
        keys, values = (x.unsqueeze(1) for x in (pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)))
        queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = queries.new_zeros((*queries.shape[:2], layer.v_head_dim))  # rows behind the last request only pad the batch
        given: dict[str, Any] = {
            "backend": self.settings.backend,
            "sinks": extra.get("sinks"),
            "softcap": layer.logit_cap or None,
            "k_scale": scales[0],
            "v_scale": scales[1],
        }
        for rows, limit in self._parts:
            mine = queries[rows.tokens]
            kept = COUNTERS.count_layer(rows, mine.shape[1]) if limit == 0 else None  # the others are not sparse
            lengths: dict[str, Any] = {"batch": rows.batch, "dense_below": limit, "kept": kept}
            call = Call(mine, keys, values, policy, layer.scaling, **lengths, **given)
            out[rows.tokens] = run(call)[0]
        return out.flatten(1)

    def _scales(self, layer: Any) -> tuple[Tensor | None, Tensor | None]:
        """Return what a layer's keys and values in an fp8 pool are multiplied by; None where no pool is fp8."""
        if not self._is_fp8:
            return None, None
        unscaled = layer.k_scale is None or layer.v_scale is None
        return (self._one, self._one) if unscaled else (layer.k_scale, layer.v_scale)

    def _policy(self, layer: Any) -> Policy | None:
        """Look up what a layer runs; None where the dense backend must run it."""
        index = layer.layer_id
        if index not in self._policies:
            reason = layer_obstacle(layer, self.settings.dense_layers, self._context_len)
            self._policies[index] = self.settings.policy.for_layer(index, self._heads) if reason is None else None
        return self._policies[index]

    def _plan(self, batch: Any) -> None:
        self._batch, self._parts = batch, []
        if not batch.forward_mode.is_decode_or_idle():
            report_now_and_then(logger)
            self._parts = plan(batch, self.req_to_token, self.settings, self.dense_below)
