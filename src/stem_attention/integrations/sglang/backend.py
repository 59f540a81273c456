"""Stem as one of SGLang's attention backends. What it does not do, the dense backend that it wraps does."""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor

from stem_attention.backends import Explanation, run
from stem_attention.call import Call
from stem_attention.integrations.serving.counters import COUNTERS
from stem_attention.integrations.serving.settings import Settings
from stem_attention.integrations.sglang.layers import layer_obstacle, unknown_arguments
from stem_attention.integrations.sglang.step import Step, batch_obstacle, plan
from stem_attention.policies import Policy

logger = logging.getLogger(__name__)

_KEEP_ALL_BELOW = 1 << 30  # longer than any prompt: a call keeps every block


class StemAttentionBackend(AttentionBackend):  # type: ignore[misc]
    """Prefill with Stem over token-granular pages."""

    def __init__(self, runner: Any, dense: Any, settings: Settings, chosen: Explanation, heads: slice) -> None:
        """Wrap a dense backend.

        Args:
            runner: SGLang's ``ModelRunner``; :func:`..layers.check_model` has passed.
            dense: A backend built for it.
            settings: What is asked for.
            chosen: The backend of Stem that runs.
            heads: The query heads of the model that this rank has.
        """
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
        self._context_len: int = runner.model_config.context_len
        self._policies: dict[int, Policy | None] = {}
        self._batch: Any = None
        self._step: Step | None = None
        self._logged = 1

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan a batch, before its layers."""
        self.dense.init_forward_metadata(forward_batch)
        self._plan(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Do the part of :meth:`init_forward_metadata` that no CUDA graph holds: all of ours."""
        self.dense.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        self._plan(forward_batch)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Do the part that a CUDA graph holds: nothing of ours."""
        self.dense.init_forward_metadata_in_graph(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Prepare the dense backend, which alone is ever captured: decode and speculative verification."""
        self.dense.init_cuda_graph_state(max_bs, max_num_tokens)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Answer as the dense backend does."""
        value: int = self.dense.get_cuda_graph_seq_len_fill_value()
        return value

    def support_triton(self) -> bool:
        """Answer as the dense backend does."""
        return bool(self.dense.support_triton())

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **extra: Any
    ) -> Any:
        """Let the dense backend decode."""
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
        """Compute attention of a prefill batch, ``(tokens, q_heads * head_dim)``."""
        if forward_batch is not self._batch:  # never the lengths of another batch, whoever skipped the call above
            self._plan(forward_batch)
        step, policy = self._step, self._policy(layer)
        if step is None or policy is None or unknown_arguments(extra):
            return self.dense.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **extra)
        pool = self.token_to_kv_pool
        if save_kv_cache and k is not None and v is not None:
            pool.set_kv_buffer(layer, KVWriteLoc.for_batch(forward_batch), k, v)
        # A slot is a page of one token: (slots, heads, dim) needs no copy to become a paged cache.
        keys, values = (x.unsqueeze(1) for x in (pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)))
        queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = torch.zeros_like(queries)  # rows behind the last request only pad the batch
        for rows, dense_below in ((step.sparse, 0), (step.dense, _KEEP_ALL_BELOW)):
            if rows is not None:
                call = Call(
                    queries[rows.tokens], keys, values, policy, layer.scaling, batch=rows.batch, dense_below=dense_below,
                    backend=self.settings.backend,
                )  # fmt: skip
                out[rows.tokens] = run(call)[0]
        return out.flatten(1)

    def _policy(self, layer: Any) -> Policy | None:
        """Look up what a layer runs; None where the dense backend must run it."""
        index = layer.layer_id
        if index not in self._policies:
            reason = layer_obstacle(layer, self.settings.dense_layers, self._context_len)
            self._policies[index] = self.settings.policy.for_layer(index, self._heads) if reason is None else None
        return self._policies[index]

    def _plan(self, batch: Any) -> None:
        self._batch, self._step = batch, None
        if batch.forward_mode.is_decode_or_idle():
            return
        obstacle = batch_obstacle(batch)
        if obstacle is not None:
            COUNTERS.dense_rows[obstacle] += batch.batch_size
            return
        self._step = step = plan(batch, self.req_to_token, self.settings.min_query_len, self.dense_below)
        if step is None:
            COUNTERS.dense_rows["short prompts and chunks"] += batch.batch_size
            return
        taken = [row for row, reason in zip(step.rows, step.reasons, strict=True) if reason is None]
        COUNTERS.count_sparse(taken, self.settings.policy)
        COUNTERS.dense_rows.update(reason for reason in step.reasons if reason is not None)
        if COUNTERS.sparse_rows >= self._logged:
            logger.info("Stem: %s", COUNTERS)
            self._logged = 2 * COUNTERS.sparse_rows
