"""Additions to any of vLLM's attention backends: builders that plan a step's rows, implementations that follow the plan.

The host's metadata stays as it is, for the layers that stay dense and for everything else that reads it; a plan is attached to
it in steps that have sparse rows. The host's implementation runs the other rows of such a step on metadata of their own.
"""

from __future__ import annotations

import atexit
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)

from stem_attention.backends import run
from stem_attention.call import Call, PackedBatch, to_device
from stem_attention.integrations.serving.counters import COUNTERS
from stem_attention.integrations.serving.rows import Index, Row, SparseRows, row_index, token_index
from stem_attention.integrations.serving.settings import read_settings
from stem_attention.integrations.vllm.layers import LayerTraits, check_engine, layer_policy, layer_reasons, start_line
from stem_attention.integrations.vllm.plugin import NAME
from stem_attention.integrations.vllm.runner import PromptLens, prompt_lengths, watch_runners
from stem_attention.policies import Policy

# vLLM shows what loggers below its own say.
logger = init_logger("vllm.stem_attention")

_LOG_SECONDS = 60.0
_PLAN = "stem_plan"
_PAGE = 64
"""Tokens of a page that the fastest kernels read at full speed."""


@dataclass(frozen=True)
class DenseRows:
    """The other rows of a step: where their tokens are, and the host's metadata for them alone."""

    tokens: Index
    metadata: Any


@dataclass(frozen=True)
class Plan:
    """How the layers that Stem serves compute a step."""

    sparse: SparseRows
    dense: DenseRows | None


class StemBuilder(AttentionMetadataBuilder):
    """Goes before a metadata builder of the host."""

    # Copies of the metadata for another block table would carry a plan for the first.
    supports_update_block_table: bool = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device, **kw: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kw)
        check_engine(vllm_config)
        self._settings = settings = read_settings(vllm_config.additional_config)
        self._prompt_lens: PromptLens | None = prompt_lengths()
        self._dense_below: int | None = None
        self._capturing = False
        reasons = layer_reasons(vllm_config, settings)
        layers = vllm_config.compilation_config.static_forward_context
        served = {name: layers[name].impl for name in layer_names if reasons.get(name, "not ours") is None}
        if not served:
            return
        for name, impl in served.items():
            impl.policy, impl.stem_backend = layer_policy(name, impl, vllm_config, settings.policy), settings.backend
        chosen = settings.explain(device, vllm_config.model_config.dtype, impl.head_size)
        self._dense_below = chosen.dense_below
        _announce(start_line(reasons, settings, chosen, self._prompt_lens is not None))

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """Allow graphs of steps in which all rows have the few tokens of an answer: those never hold a sparse row."""
        host: AttentionCGSupport = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        return min(host, AttentionCGSupport.UNIFORM_BATCH, key=lambda support: support.value)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """Build the host's metadata for a step made up by the host: nothing to plan or count."""
        self._capturing = True
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)
        finally:
            self._capturing = False

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False, **kw: Any
    ) -> Any:
        """Build the host's metadata, with a plan where rows take Stem. ``fast_build`` is asked for drafts, which stay dense."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **kw)
        if self._dense_below is None or self._capturing or fast_build:
            return metadata
        settings, obstacle = self._settings, _step_obstacle(common_attn_metadata)
        if obstacle is not None or common_attn_metadata.max_query_len < settings.min_query_len:
            _count_dense(common_attn_metadata, obstacle)  # nearly every step of a server that answers: no row is looked at
            return metadata
        rows = _rows(common_attn_metadata, self._prompt_lens)
        reasons = [row.dense_reason(settings.min_query_len, self._dense_below) for row in rows]
        sparse = [i for i, reason in enumerate(reasons) if reason is None]
        dense = [i for i, reason in enumerate(reasons) if reason is not None and rows[i].q_len > 0]
        COUNTERS.dense_rows.update(str(reasons[i]) for i in dense)
        if sparse:
            COUNTERS.count_sparse([rows[i] for i in sparse], settings.policy)
            taken = SparseRows.of(rows, sparse, common_attn_metadata.block_table_tensor)
            setattr(metadata, _PLAN, Plan(taken, self._dense(common_attn_metadata, rows, dense)))
            _log_counters_now_and_then()
        return metadata

    def _dense(self, common: CommonAttentionMetadata, rows: Sequence[Row], chosen: Sequence[int]) -> DenseRows | None:
        if not chosen:
            return None
        tokens = token_index(rows, chosen, common.block_table_tensor.device)
        # A fast build writes nothing into the buffers that the metadata of the whole step may share with it.
        metadata = super().build(0, _only(common, rows, chosen, tokens), True)
        return DenseRows(tokens, metadata)


class StemImpl(AttentionImpl):
    """Goes before an attention implementation of the host."""

    head_size: int
    scale: float
    policy: Policy | None = None
    stem_backend: str = "auto"

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **other: Any,
    ) -> None:
        extra = other if sinks is None else {"sinks": sinks, **other}
        super().__init__(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap, attn_type,
            kv_sharing_target_layer_name, **extra,
        )  # fmt: skip
        watch_runners()  # now: a runner that builds layers has been loaded, and has not yet built its metadata builders
        meant = tuple(sorted(name for name, value in other.items() if value not in (None, False)))
        self.traits = LayerTraits(
            alibi_slopes is not None, sliding_window, logits_soft_cap, attn_type, sinks is not None, meant
        )

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Refuse: results of sparse rows are not quantised on the way out."""
        return False

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any, output: Tensor,
        output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute attention of a step into ``output``; arguments are those of the host."""
        plan: Plan | None = getattr(attn_metadata, _PLAN, None)
        host = super().forward
        if plan is None or self.policy is None:
            whole: Tensor = host(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale=output_scale,
                output_block_scale=output_block_scale,
            )  # fmt: skip
            return whole
        if plan.dense is not None:
            tokens = plan.dense.tokens
            part = output[tokens]
            host(layer, query[tokens], key[tokens], value[tokens], kv_cache, plan.dense.metadata, part)
            if isinstance(tokens, Tensor):  # indices gave a copy, a slice a view
                output[tokens] = part
        tokens = plan.sparse.tokens
        k, v, batch = self.keys_and_values(layer, kv_cache, plan.sparse.batch)
        call = Call(query[tokens], k, v, self.policy, self.scale, batch=batch, dense_below=0, backend=self.stem_backend)
        output[tokens] = run(call)[0]
        return output

    def keys_and_values(self, layer: Any, kv_cache: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, PackedBatch]:
        """Return keys, values and the batch as a :class:`stem_attention.call.Call` has them.

        The cache is ``(pages, kv_heads, page_size, 2 * head_dim)`` with any strides, keys before values in the last dimension.
        """
        cache = kv_cache.transpose(1, 2)
        return cache[..., : self.head_size], cache[..., self.head_size :], batch


class StemBackend(AttentionBackend):
    """Goes before an attention backend of the host."""

    impl_cls: ClassVar[type]
    builder_cls: ClassVar[type]

    @staticmethod
    def get_name() -> str:
        """Return the name that vLLM has a place for."""
        return NAME

    @classmethod
    def get_impl_cls(cls) -> type:
        """Return what computes."""
        return cls.impl_cls

    @classmethod
    def get_builder_cls(cls) -> type:
        """Return what plans."""
        return cls.builder_cls

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Ask for pages of 64 tokens where the user has not said ``--block-size``; those that the host supports still run."""
        host: int = super().get_preferred_block_size(default_block_size)
        return max(host, _PAGE)

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Refuse adaptive verification, where only the device knows which tokens are whose."""
        return False


def _step_obstacle(common: CommonAttentionMetadata) -> str | None:
    """Tell why Stem can take no row of a step, or None."""
    if common.causal is not True:
        return "not causal"
    return "no request" if common.is_prefilling is None or common.seq_lens_cpu_upper_bound is None else None


def _count_dense(common: CommonAttentionMetadata, obstacle: str | None) -> None:
    """Count the rows of a step that has no sparse one, without looking at each."""
    rows = int((common.query_start_loc_cpu[: common.num_reqs + 1].diff() > 0).sum())
    prefilling = 0 if obstacle is not None else int(common.is_prefilling.sum())
    COUNTERS.dense_rows += Counter({obstacle or "decode": rows - prefilling, "short chunk": prefilling})


def _rows(common: CommonAttentionMetadata, prompt_lens: PromptLens | None) -> list[Row]:
    """Read the rows of a step from what the host holds on the CPU: nothing here waits for the device."""
    starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
    prefilling, keys = common.is_prefilling.tolist(), common.seq_lens_cpu_upper_bound.tolist()
    images = common.mm_req_doc_ranges or {}
    lengths = [] if prompt_lens is None else prompt_lens(common)
    lengths += [0] * (common.num_reqs - len(lengths))
    rows = []
    for i, (start, end) in enumerate(pairwise(starts)):
        is_prompt = i < len(prefilling) and prefilling[i]  # rows behind the last request only pad the step
        obstacle = "decode" if not is_prompt else "image tokens" if images.get(i) else None
        rows.append(Row(end - start, keys[i] if i < len(keys) else 0, lengths[i], obstacle))
    return rows


def _only(
    common: CommonAttentionMetadata, rows: Sequence[Row], chosen: Sequence[int], tokens: Index
) -> CommonAttentionMetadata:
    """Describe to the host a step that has just the chosen rows."""
    device, index = common.block_table_tensor.device, row_index(chosen, common.block_table_tensor.device)
    host_index = index if isinstance(index, slice) else torch.tensor(chosen)
    starts = [0]
    for i in chosen:
        starts.append(starts[-1] + rows[i].q_len)
    kept = common.seq_lens_cpu_upper_bound[host_index]
    return CommonAttentionMetadata(
        query_start_loc=to_device(starts, torch.int32, device),
        query_start_loc_cpu=torch.tensor(starts, dtype=torch.int32),
        seq_lens=common.seq_lens[index],
        num_reqs=len(chosen),
        num_actual_tokens=starts[-1],
        max_query_len=max(rows[i].q_len for i in chosen),
        max_seq_len=int(kept.max()),
        block_table_tensor=common.block_table_tensor[index],
        slot_mapping=common.slot_mapping[tokens],
        causal=common.causal,
        positions=None if common.positions is None else common.positions[tokens],
        is_prefilling=common.is_prefilling[host_index],
        seq_lens_cpu_upper_bound=kept,
        mm_req_doc_ranges=common.mm_req_doc_ranges
        and {place: common.mm_req_doc_ranges[i] for place, i in enumerate(chosen) if i in common.mm_req_doc_ranges},
    )


_said: set[str] = set()
_logged = [0.0]


def _announce(line: str) -> None:
    """Say it once in a process; builders are built more than once."""
    if not _said:
        atexit.register(lambda: logger.info("Stem so far: %s", COUNTERS))
    if line not in _said:
        _said.add(line)
        logger.info("%s", line)


def _log_counters_now_and_then() -> None:
    now = time.monotonic()
    if now - _logged[0] >= _LOG_SECONDS:
        _logged[0] = now
        logger.info("Stem so far: %s", COUNTERS)
