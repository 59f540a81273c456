"""What the CUDA backends add, run on the CPU: sparse rows straight from a paged cache in each of vLLM's memory layouts."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from stem_attention import Stem, stem_attention
from stem_attention.integrations.serving.rows import Row, SparseRows
from stem_attention.integrations.vllm import plugin
from stem_attention.integrations.vllm.flash import StemFlashBackend
from stem_attention.integrations.vllm.host import Plan
from stem_attention.integrations.vllm.triton import StemTritonBackend

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
def test_a_chunk_is_read_from_scrambled_pages(backend, layout):
    torch.manual_seed(0)
    q_len, kv_len, prompt_len = 150, 500, 700
    policy = Stem(block_size=32, stride=8, tail_blocks=1)
    query = torch.randn(7 + q_len + 5, HEADS, DIM)  # other rows' tokens before it, padding behind
    keys, values = torch.randn(2, kv_len, KV_HEADS, DIM)
    pages = torch.randperm(64)[:32]
    cache = paged(keys, values, pages, layout)
    rows = [Row(7, 300, 300, "decode"), Row(q_len, kv_len, prompt_len)]
    table = torch.stack([torch.zeros_like(pages), pages]).int()
    with set_current_vllm_config(VllmConfig()):
        impl = backend.get_impl_cls()(HEADS, DIM, DIM**-0.5, KV_HEADS, None, None, "auto")
    impl.policy = policy
    output = torch.zeros_like(query)
    step = SimpleNamespace(stem_plan=Plan(SparseRows.of(rows, [1], table, policy), None))
    impl.forward(None, query, None, None, cache, step, output)
    own = query[None, 7 : 7 + q_len]
    expected = stem_attention(own, keys[None], values[None], policy=policy, dense_below=0, prompt_len=prompt_len)
    assert torch.equal(output[7 : 7 + q_len], expected[0])
    assert not output[:7].any()
    assert not output[7 + q_len :].any()


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_and_queries_of_fp8_are_read_with_their_scales(backend, by_head):
    torch.manual_seed(0)
    fp8, length, policy = torch.float8_e4m3fn, 300, Stem(block_size=32, stride=8, tail_blocks=1)
    scales = torch.tensor([0.01, 0.02] if by_head else 0.01)
    query, keys, values = (torch.randn(length, heads, DIM).mul(100).to(fp8) for heads in (HEADS, KV_HEADS, KV_HEADS))
    pages = torch.randperm(64)[:32]
    cache = paged(keys.float(), values.float(), pages, "NHD").nan_to_num().to(fp8).view(torch.uint8)
    with set_current_vllm_config(VllmConfig()):
        impl = backend.get_impl_cls()(HEADS, DIM, DIM**-0.5, KV_HEADS, None, None, "auto")
    impl.policy = policy
    layer = SimpleNamespace(kv_cache_dtype="fp8", _q_scale=scales, _k_scale=scales * 2, _v_scale=scales * 3)
    output = torch.zeros(length, HEADS, DIM, dtype=torch.bfloat16)
    rows = SparseRows.of([Row(length, length, length)], [0], pages[None].int(), policy)
    impl.forward(layer, query, None, None, cache, SimpleNamespace(stem_plan=Plan(rows, None)), output)
    per_query = scales.expand(KV_HEADS).repeat_interleave(HEADS // KV_HEADS)
    whole = (query, per_query), (keys, scales * 2), (values, scales * 3)
    q, k, v = ((x.float() * scale.view(-1, 1)).bfloat16()[None] for x, scale in whole)
    expected = stem_attention(q, k, v, policy=policy, dense_below=0)[0]
    torch.testing.assert_close(output, expected, atol=0.02, rtol=0.02)
    assert expected.float().std() > 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_vllm_reads_off_the_backend(backend):
    builder = backend.get_builder_cls()
    support = builder.get_cudagraph_support(VllmConfig(), None)
    assert support is AttentionCGSupport.UNIFORM_BATCH
    assert not builder.supports_update_block_table
    assert backend.get_name() == plugin.NAME
    assert backend.get_preferred_block_size(16) == 64, "pages that the kernels like, where the user has not chosen"
    assert backend.get_preferred_block_size(128) == 128
    assert backend.supports_block_size(16), "and the user may choose others"
    assert not backend.forward_includes_kv_cache_update, "the cache holds the chunk before attention runs"
    assert not backend.is_sparse()
    assert not backend.supports_device_cpu_query_lens_mismatch()


def test_another_plug_in_keeps_its_place_beside_ours():
    if plugin.NAME == "CUSTOM":
        pytest.skip("this vLLM has one place for all plug-ins")
    register_backend(AttentionBackendEnum.CUSTOM, "another.plugin.Backend")
    try:
        plugin.register()
        plugin.register()
        assert AttentionBackendEnum.CUSTOM.get_path() == "another.plugin.Backend"
        assert AttentionBackendEnum[plugin.NAME].get_path().endswith(".StemCPUBackend")
    finally:
        AttentionBackendEnum.CUSTOM.clear_override()


def test_our_name_is_known_to_a_process_that_reads_the_config_before_it_loads_plug_ins():
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).name)"
    member = pickle.dumps(plugin.own_backend())
    run = subprocess.run([sys.executable, "-c", code], input=member, capture_output=True, check=True, timeout=120)
    assert run.stdout.decode().split()[-1] == plugin.NAME
    assert copy.deepcopy(plugin.own_backend()) is plugin.own_backend()
