"""What the CUDA backends add, run on the CPU: sparse rows straight from a paged cache in each of vLLM's memory layouts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from stem_attention import StemConfig, stem_attention
from stem_attention.integrations.serving_rows import Row, SparseRows
from stem_attention.integrations.serving_settings import Settings
from stem_attention.integrations.vllm_flash import StemFlashBackend
from stem_attention.integrations.vllm_host import Plan
from stem_attention.integrations.vllm_triton import StemTritonBackend

BACKENDS = [StemFlashBackend, StemTritonBackend]
HEADS, KV_HEADS, DIM, PAGE = 4, 2, 32, 16


def paged(keys: torch.Tensor, values: torch.Tensor, pages: torch.Tensor, layout: str) -> torch.Tensor:
    """vLLM's cache ``(pages, kv_heads, page_size, 2 * dim)`` with one sequence in scrambled pages."""
    count = 2 * pages.numel()
    if layout == "NHD":
        cache = torch.full((count, PAGE, KV_HEADS, 2 * DIM), torch.nan).transpose(1, 2)
    else:
        cache = torch.full((count, KV_HEADS, PAGE, 2 * DIM), torch.nan)
    for position in range(keys.shape[0]):
        place = cache[pages[position // PAGE], :, position % PAGE]
        place[:, :DIM], place[:, DIM:] = keys[position], values[position]
    return cache


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chunk_is_read_from_scrambled_pages(backend: Any, layout: str) -> None:
    torch.manual_seed(0)
    q_len, kv_len, prompt_len = 150, 500, 700
    config = StemConfig(block_size=32, stride=8, dense_below=0, tail_blocks=1)
    query = torch.randn(7 + q_len + 5, HEADS, DIM)  # other rows' tokens before it, padding behind
    keys, values = torch.randn(2, kv_len, KV_HEADS, DIM)
    pages = torch.randperm(64)[:32]
    cache = paged(keys, values, pages, layout)
    rows = [Row(7, 300, 300, "decode"), Row(q_len, kv_len, prompt_len)]
    table = torch.stack([torch.zeros_like(pages), pages]).int()
    with set_current_vllm_config(VllmConfig()):
        impl = backend.get_impl_cls()(HEADS, DIM, DIM**-0.5, KV_HEADS, None, None, "auto")
    impl.settings = Settings(config)
    output = torch.zeros_like(query)
    step = SimpleNamespace(stem_plan=Plan(SparseRows.of(rows, [1], table), None))
    impl.forward(None, query, None, None, cache, step, output)
    expected = stem_attention(query[None, 7 : 7 + q_len], keys[None], values[None], config=config, prompt_len=prompt_len)
    assert torch.equal(output[7 : 7 + q_len], expected[0])
    assert not output[:7].any()
    assert not output[7 + q_len :].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_vllm_reads_off_the_backend(backend: Any) -> None:
    builder = backend.get_builder_cls()
    support = builder.get_cudagraph_support(VllmConfig(), None)
    assert support is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert not builder.supports_update_block_table
    assert backend.get_name() in AttentionBackendEnum.__members__
    assert not backend.forward_includes_kv_cache_update, "the cache holds the chunk before attention runs"
    assert not backend.is_sparse()
