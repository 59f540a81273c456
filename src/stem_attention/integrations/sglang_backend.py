"""Stem as one of SGLang's attention backends. What it does not do, the dense backend that it wraps does."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor

from stem_attention.api import dense_limit
from stem_attention.integrations.serving_counters import Counters
from stem_attention.integrations.serving_rows import SparseRows
from stem_attention.integrations.serving_settings import Settings
from stem_attention.integrations.sglang_layers import layer_obstacle, rank_config
from stem_attention.integrations.sglang_step import KEEP_ALL_BELOW, Step, batch_obstacle, plan
from stem_attention.varlen import stem_attention_varlen

logger = logging.getLogger(__name__)

COUNTERS = Counters()
"""What this process has done so far, once for every batch."""


class StemAttentionBackend(AttentionBackend):  # type: ignore[misc]
    """Prefill with Stem over token-granular pages."""

    def __init__(self, runner: Any, dense: Any, settings: Settings) -> None:
        """Wrap ``dense``, a backend built for the same ``runner``; :func:`..sglang_layers.check_model` has passed."""
        super().__init__()
        self.dense = dense
        self.settings = settings
        self.config = rank_config(settings.config, runner.model_config)
        # Neither dense rows nor counters need the factors, and looking thousands of numbers up would cost every batch.
        self.counted = replace(settings.config, head_factors=None)
        self.keep_all = replace(self.counted, dense_below=KEEP_ALL_BELOW)
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.kv_index_translator = runner.kv_index_translator
        self.needs_cpu_seq_lens = dense.needs_cpu_seq_lens
        self.extend_dummy_seqs_capped_by_req_pool = dense.extend_dummy_seqs_capped_by_req_pool
        self.dense_limit = dense_limit(
            device=runner.device, dtype=runner.dtype, head_dim=runner.model_config.head_dim, config=settings.config,
            backend=settings.backend,
        )  # fmt: skip
        self._batch: Any = None
        self._step: Step | None = None
        self._logged = 1

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Called once a batch, before its layers."""
        self.dense.init_forward_metadata(forward_batch)
        self._plan(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """The part of :meth:`init_forward_metadata` that no CUDA graph holds: all of ours."""
        self.dense.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        self._plan(forward_batch)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """The part that a CUDA graph holds: nothing of ours."""
        self.dense.init_forward_metadata_in_graph(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Only the dense backend is ever captured: decode and speculative verification."""
        self.dense.init_cuda_graph_state(max_bs, max_num_tokens)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """As the dense backend says."""
        value: int = self.dense.get_cuda_graph_seq_len_fill_value()
        return value

    def support_triton(self) -> bool:
        """As the dense backend says."""
        return bool(self.dense.support_triton())

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **extra: Any
    ) -> Any:
        """Decode is dense."""
        return self.dense.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **extra)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **extra: Any,
    ) -> Any:
        """Attention of a prefill batch, ``(tokens, q_heads * head_dim)``."""
        if forward_batch is not self._batch:  # never the lengths of another batch, whoever skipped the call above
            self._plan(forward_batch)
        step = self._step
        if step is None or layer_obstacle(layer, self.settings.config.dense_layers, extra) is not None:
            return self.dense.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **extra)
        pool = self.token_to_kv_pool
        if save_kv_cache and k is not None and v is not None:
            pool.set_kv_buffer(layer, KVWriteLoc.for_batch(forward_batch), k, v)
        # A slot is a page of one token: (slots, heads, dim) needs no copy to become a paged cache.
        keys, values = (x.unsqueeze(1) for x in (pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)))
        queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = torch.zeros_like(queries)  # rows behind the last request only pad the batch
        for rows, config in ((step.sparse, self.config.for_layer(layer.layer_id)), (step.dense, self.keep_all)):
            if rows is not None:
                out[rows.tokens] = stem_attention_varlen(
                    queries[rows.tokens], keys, values, *_borders(rows), page_table=rows.pages, prompt_lens=rows.prompt_lens,
                    config=config, scale=layer.scaling, backend=self.settings.backend,
                )  # fmt: skip
        return out.flatten(1)

    def _plan(self, batch: Any) -> None:
        self._batch, self._step = batch, None
        if batch.forward_mode.is_decode_or_idle():
            return
        obstacle = batch_obstacle(batch)
        if obstacle is not None:
            COUNTERS.dense_rows[obstacle] += batch.batch_size
            return
        self._step = step = plan(batch, self.req_to_token, self.settings.min_query_len, self.dense_limit)
        if step is None:
            COUNTERS.dense_rows["short prompts and chunks"] += batch.batch_size
            return
        COUNTERS.count_sparse(
            [row for row, reason in zip(step.rows, step.reasons, strict=True) if reason is None], self.counted
        )
        COUNTERS.dense_rows.update(reason for reason in step.reasons if reason is not None)
        if COUNTERS.sparse_rows >= self._logged:
            logger.info("Stem: %s", COUNTERS)
            self._logged = 2 * COUNTERS.sparse_rows


def _borders(rows: SparseRows) -> tuple[Tensor, Tensor, int, int]:
    cu_q, cu_k = (torch.tensor(starts, dtype=torch.int32) for starts in (rows.q_starts, rows.k_starts))
    return cu_q, cu_k, int(cu_q.diff().max()), int(cu_k.diff().max())
