"""Additions to any of vLLM's attention backends: builders that plan a step's rows, implementations that follow the plan.

The host's metadata stays as it is, for the layers that stay dense and for everything else that reads it; a plan is attached to
it in steps that have sparse rows. The host's implementation runs the other rows of such a step on metadata of their own.
"""

import atexit
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform
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
from stem_attention.integrations.serving.report import report, report_now_and_then
from stem_attention.integrations.serving.rows import Index, Row, SparseRows, first_reason, index_rows, split
from stem_attention.integrations.vllm.layers import engine_settings, layer_policy, layer_reasons, start_line
from stem_attention.integrations.vllm.plugin import NAME
from stem_attention.integrations.vllm.runner import PromptLens, prompt_lengths, watch_runners
from stem_attention.policies import Policy

# vLLM shows what loggers below its own say.
logger = init_logger("vllm.stem_attention")

FP8_CACHES = ("fp8", "fp8_e4m3")


@dataclass(frozen=True)
class Plan:
    """Rows of a step that take Stem; of the others, if any, where their tokens are and the host's metadata for them alone."""

    sparse: SparseRows
    dense: tuple[Index, Any] | None


class StemBuilder(AttentionMetadataBuilder):
    """Goes before a metadata builder of the host."""

    # Copies of the metadata for another block table would carry a plan for the first.
    supports_update_block_table: bool = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device, **kw: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kw)
        self._settings = settings = engine_settings(vllm_config)
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
        announce(start_line(reasons, settings, chosen, self._prompt_lens is not None))

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
        common, settings = common_attn_metadata, self._settings
        is_unknown = common.is_prefilling is None or common.seq_lens_cpu_upper_bound is None
        obstacle = "not causal" if common.causal is not True else "no request" if is_unknown else None
        if obstacle is not None or common.max_query_len < settings.min_query_len:
            # Nearly every step of a server that answers: rows are counted, and none is looked at.
            count = int((common.query_start_loc_cpu[: common.num_reqs + 1].diff() > 0).sum())
            prefilling = 0 if obstacle is not None else int(common.is_prefilling.sum())
            COUNTERS.dense_rows += Counter({obstacle or "decode": count - prefilling, "short chunk": prefilling})
            return metadata
        rows = _rows(common, self._prompt_lens)
        sparse, dense = split(rows, settings.min_query_len, self._dense_below)
        COUNTERS.dense_rows.update(dense.values())
        if sparse:
            report_now_and_then(logger)
            COUNTERS.count_sparse([rows[i] for i in sparse])
            taken = SparseRows.of(rows, sparse, common.block_table_tensor, settings.policy)
            metadata.stem_plan = Plan(taken, self._dense(common, rows, list(dense)))
        return metadata

    def _dense(self, common: CommonAttentionMetadata, rows: Sequence[Row], chosen: list[int]) -> tuple[Index, Any] | None:
        """Return where the tokens of the chosen rows are, and the host's metadata of a step that has just these rows."""
        if not chosen:
            return None
        device = common.block_table_tensor.device
        index, tokens = index_rows(rows, chosen, device)
        starts = list(accumulate((rows[i].q_len for i in chosen), initial=0))
        keys, images = common.seq_lens_cpu_upper_bound[chosen], common.mm_req_doc_ranges
        step = CommonAttentionMetadata(
            query_start_loc=to_device(starts, torch.int32, device), query_start_loc_cpu=torch.tensor(starts, dtype=torch.int32),
            seq_lens=common.seq_lens[index], num_reqs=len(chosen), num_actual_tokens=starts[-1],
            max_query_len=max(rows[i].q_len for i in chosen), max_seq_len=int(keys.max()),
            block_table_tensor=common.block_table_tensor[index], slot_mapping=common.slot_mapping[tokens], causal=common.causal,
            positions=None if common.positions is None else common.positions[tokens],
            is_prefilling=common.is_prefilling[chosen], seq_lens_cpu_upper_bound=keys,
            mm_req_doc_ranges=images and {place: images[i] for place, i in enumerate(chosen) if i in images},
        )  # fmt: skip
        # A fast build writes nothing into the buffers that the metadata of the whole step may share with it.
        return tokens, super().build(0, step, True)


class StemImpl(AttentionImpl):
    """Goes before an attention implementation of the host. Why Stem cannot compute its layer, ``stem_obstacle`` tells."""

    head_size: int
    scale: float
    policy: Policy | None = None
    stem_backend: str = "auto"
    stem_sinks: Tensor | None
    stem_softcap: float | None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        engine_settings(get_current_vllm_config())  # to be refused now, not after the minutes that weights take to load
        watch_runners()  # now: a runner that builds layers has been loaded, and has not yet built its metadata builders
        given = signature(super().__init__).bind(*args, **options).arguments
        self.stem_sinks, self.stem_softcap = given.get("sinks"), given.get("logits_soft_cap") or None
        other = sorted(given.keys() - signature(AttentionImpl.__init__).parameters.keys() - {"sinks"})
        meant = [name for name in other if isinstance(given[name], Tensor) or given[name] not in (None, False)]
        obstacles = {
            "not causal self-attention": given.get("attn_type", AttentionType.DECODER) != AttentionType.DECODER,
            "ALiBi": given.get("alibi_slopes") is not None,
            f"unknown options {', '.join(meant)}": bool(meant),
        }
        self.stem_obstacle = first_reason(obstacles)

    def reads_fp8(self, layer: Any) -> bool:
        """Tell whether a layer's cache is one of fp8 numbers that Stem reads: e4m3, scaled as a whole or by head."""
        return getattr(layer, "kv_cache_dtype", "auto") in FP8_CACHES

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Refuse: results of sparse rows are not quantised on the way out."""
        return False

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any, output: Tensor,
        output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute attention of a step into ``output``; arguments are those of the host."""
        plan: Plan | None = getattr(attn_metadata, "stem_plan", None)
        host: Callable[..., Tensor] = super().forward
        if plan is None or self.policy is None:
            return host(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        if plan.dense is not None:
            tokens, metadata = plan.dense
            part = output[tokens]
            host(layer, query[tokens], key[tokens], value[tokens], kv_cache, metadata, part)
            if isinstance(tokens, Tensor):  # indices gave a copy, a slice a view
                output[tokens] = part
        tokens = plan.sparse.tokens
        k, v, batch = self.keys_and_values(layer, kv_cache, plan.sparse.batch)
        part, queries = output[tokens], query[tokens]
        given: dict[str, Any] = {"out": part, "sinks": self.stem_sinks, "softcap": self.stem_softcap}
        if self.reads_fp8(layer):
            fp8 = current_platform.fp8_dtype()
            k, v, given["k_scale"], given["v_scale"] = k.view(fp8), v.view(fp8), layer._k_scale, layer._v_scale
            queries = _in_precision_of(part, queries, layer._q_scale)
        kept = COUNTERS.count_layer(plan.sparse, query.shape[1])
        run(Call(queries, k, v, self.policy, self.scale, 0, batch, 0, False, self.stem_backend, kept=kept, **given))
        if isinstance(tokens, Tensor):
            output[tokens] = part
        return output

    def keys_and_values(self, layer: Any, kv_cache: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, PackedBatch]:
        """Return keys, values and the batch as a :class:`stem_attention.call.Call` has them.

        The cache is ``(pages, kv_heads, page_size, 2 * head_dim)`` with any strides, keys before values in the last dimension.
        """
        cache = kv_cache.transpose(1, 2)
        return cache[..., : self.head_size], cache[..., self.head_size :], batch


class StemBackend(AttentionBackend):
    """Goes before an attention backend of the host, and our classes before those that it names."""

    @staticmethod
    def get_name() -> str:
        return NAME

    @classmethod
    def get_impl_cls(cls) -> type:
        return _before(StemImpl, super().get_impl_cls())

    @classmethod
    def get_builder_cls(cls) -> type:
        return _before(StemBuilder, super().get_builder_cls())

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Ask for pages of 64 tokens, which the fastest kernels read at full speed; the user's ``--block-size`` goes before."""
        host: int = super().get_preferred_block_size(default_block_size)
        return max(host, 64)

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Refuse adaptive verification, where only the device knows which tokens are whose."""
        return False


def _in_precision_of(out: Tensor, queries: Tensor, scale: Tensor) -> Tensor:
    """Undo what vLLM does to queries for hosts that multiply in fp8; ``scale`` is one number, or one for each kv head."""
    if queries.dtype == out.dtype:
        return queries
    by_head = queries.to(out.dtype).view(len(queries), scale.numel(), -1, queries.shape[2])
    return (by_head * scale.view(-1, 1, 1)).to(out.dtype).view(queries.shape)


@cache
def _before(ours: type, hosts: type) -> type:
    return type(ours.__name__, (ours, hosts), {})


def _rows(common: CommonAttentionMetadata, prompt_lens: PromptLens | None) -> list[Row]:
    """Read the rows of a step from what the host holds on the CPU: nothing here waits for the device."""
    starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
    prefilling, keys = iter(common.is_prefilling.tolist()), iter(common.seq_lens_cpu_upper_bound.tolist())
    whole = iter([] if prompt_lens is None else prompt_lens(common))
    images = common.mm_req_doc_ranges or {}
    rows = []
    for i, (start, end) in enumerate(pairwise(starts)):  # those behind the last request, of which nothing is said, only pad
        obstacle = "decode" if not next(prefilling, False) else "image tokens" if images.get(i) else None
        rows.append(Row(end - start, next(keys, 0), next(whole, 0), obstacle))
    return rows


_said: set[str] = set()


def announce(line: str) -> None:
    """Say it once in a process; builders are built more than once."""
    if not _said:
        atexit.register(report, logger)
    if line not in _said:
        _said.add(line)
        logger.info("%s", line)
