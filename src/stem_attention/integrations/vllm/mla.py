"""vLLM's prefill of multi-head latent attention with Stem: ``--attention-config '{"mla_prefill_backend": "CUSTOM"}'``.

Before vLLM calls a prefill backend it turns the latent numbers of tokens into keys and values of every head: those of the
step's own tokens for one call, those of a prompt's earlier chunks for others, whose results it merges. A prompt that one step
reads whole needs the first alone: it is read sparsely. Everything else is the host's.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum

from stem_attention.backends import run
from stem_attention.call import Call
from stem_attention.errors import UnsupportedError
from stem_attention.integrations.serving.counters import COUNTERS
from stem_attention.integrations.serving.report import report_now_and_then
from stem_attention.integrations.serving.rows import Index, Row, SparseRows, index_rows, split
from stem_attention.integrations.vllm.host import announce, logger
from stem_attention.integrations.vllm.layers import engine_settings

EARLIER = "earlier chunks"

_HOST = MLAPrefillBackendEnum.CPU if current_platform.is_cpu() else MLAPrefillBackendEnum.FLASH_ATTN
_Host: Any = resolve_obj_by_qualname(_HOST.value)


@dataclass(frozen=True)
class _Plan:
    """Rows of a step that take Stem; of the others, if any, where their tokens are and the host's metadata for them alone."""

    sparse: SparseRows
    dense: tuple[Index, Any] | None


class StemMLAPrefill(_Host):
    """Goes before the host's prefill backend, and is nothing else unless ``mla_prefill_backend`` asks for Stem."""

    _prefill_metadata: Any
    _plan: _Plan | None = None
    _dense_below: int | None = None

    @staticmethod
    def get_name() -> str:
        """Return the name under which vLLM logs it: on a CPU, where it may stand for the host, that of the host."""
        return str(_Host.get_name()) if current_platform.is_cpu() else "STEM"

    def __init__(self, *args: Any, vllm_config: Any, **sizes: Any) -> None:
        super().__init__(*args, vllm_config=vllm_config, **sizes)
        if vllm_config.attention_config.mla_prefill_backend is not MLAPrefillBackendEnum.CUSTOM:
            return
        settings = self._settings = engine_settings(vllm_config)
        policy = settings.policy
        if settings.dense_layers > 0 or policy.for_layer(0) is not policy:
            what = "dense_layers" if settings.dense_layers > 0 else "a policy with numbers for every layer"
            raise UnsupportedError(f"vLLM does not tell an MLA prefill backend which layer calls: leave out {what}")
        model, dim = vllm_config.model_config, self.qk_nope_head_dim + self.qk_rope_head_dim
        chosen = settings.explain(current_platform.device_type, model.dtype, dim, self.v_head_dim)
        self._dense_below = chosen.dense_below
        limit = f"prompts of {chosen.dense_below} tokens and more that a step reads whole"
        announce(f"Stem is on in the MLA prefill: {limit} are read sparsely, by the {chosen.chosen} backend; {settings}")

    def prepare_metadata(self, prefill_metadata: Any) -> None:
        """Plan a step, once for all layers."""
        super().prepare_metadata(prefill_metadata)
        self._plan = None if self._dense_below is None else self._planned(prefill_metadata)

    def _planned(self, step: Any) -> _Plan | None:
        lengths, before = _lengths(step)
        rows = [Row(n, n + m, 0, EARLIER if m else None) for n, m in zip(lengths, before, strict=True)]
        sparse, dense = split(rows, self._settings.min_query_len, self._dense_below or 0)
        COUNTERS.dense_rows += Counter(dense.values())
        if not sparse:
            return None
        report_now_and_then(logger)
        COUNTERS.count_sparse([rows[i] for i in sparse])
        device = step.query_start_loc.device
        taken = SparseRows.of(rows, sparse, None, self._settings.policy, device)
        if not dense:
            return _Plan(taken, None)
        rest = [lengths[i] for i in dense]
        starts = torch.tensor([0, *rest], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
        part = replace(step, query_start_loc=starts, max_query_len=max(rest))
        if hasattr(step, "query_lens_cpu"):
            part.query_lens_cpu = step.query_lens_cpu[list(dense)]
        return _Plan(taken, (index_rows(rows, list(dense), device)[1], part))

    def run_prefill_new_tokens(
        self, q: Tensor, k: Tensor, v: Tensor, return_softmax_lse: bool, out: Tensor | None = None, **more: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute causal attention of the step's tokens among themselves; arguments and results are those of the host."""
        plan, host = self._plan, super().run_prefill_new_tokens
        if (
            plan is None
            or more.get("output_scale") is not None
            or q.dtype not in (torch.bfloat16, torch.float16, torch.float32)
        ):
            result: Tensor | tuple[Tensor, Tensor] = host(q, k, v, return_softmax_lse, out=out, **more)
            return result
        found = q.new_empty((*q.shape[:2], v.shape[2])) if out is None else out
        lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
        if plan.dense is not None:
            tokens, metadata = plan.dense
            whole, self._prefill_metadata = self._prefill_metadata, metadata
            try:
                part, part_lse = host(q[tokens], k[tokens], v[tokens], True)
            finally:
                self._prefill_metadata = whole
            found[tokens], lse[:, tokens] = part[..., : v.shape[2]], part_lse
        tokens, settings = plan.sparse.tokens, self._settings
        kept = COUNTERS.count_layer(plan.sparse, q.shape[1])
        form = (settings.policy, self.scale, 0, plan.sparse.batch, 0, return_softmax_lse, settings.backend)
        part, part_lse = run(Call(q[tokens], k[tokens], v[tokens], *form, kept=kept))
        found[tokens] = part
        if not return_softmax_lse:
            return found
        lse[:, tokens] = part_lse
        return found, lse


def _lengths(step: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that each prompt has in this step, and those that it had before.

    vLLM 0.26 keeps the former on the device alone: reading them waits for it, once a step with a prompt.
    """
    context, on_host = step.chunked_context, hasattr(step, "query_lens_cpu")
    lengths = (step.query_lens_cpu if on_host else step.query_start_loc.diff()).tolist()
    if context is None:
        return lengths, [0] * len(lengths)
    return lengths, context.context_lens_list if on_host else context.seq_lens.sum(0).tolist()
