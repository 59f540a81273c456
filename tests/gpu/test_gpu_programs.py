"""A program, what a call launched and later calls of its form launch again, computes what the first call computed."""

from __future__ import annotations

import weakref

import torch

from stem_attention import Mass, Stem, block_sparse_attention, select_blocks, stem_attention
from stem_attention.backends import backend_of, run
from stem_attention.call import Call, PackedBatch

from .common import Rule, no_synchronisation, on_gpu, random_qkv

pytestmark = on_gpu


def apart(q, k, v, policy, backend):
    """Without a program: the selection first, then attention over it."""
    selection = select_blocks(q, k, v, policy=policy, backend=backend)
    return block_sparse_attention(q, k, v, selection, backend=backend, return_lse=True)


def programs(q, k, v, policy, backend):
    return backend_of(Call(q, k, v, policy, 0.1, backend=backend))._programs


def test_later_calls_give_what_selection_and_attention_give_apart(backend, rule: Rule):
    policy = rule(8)
    for seed in range(4):
        for length in (700, 1300):
            q, k, v = random_qkv(1, length, length, 8, 2, 128, seed)
            out, lse = stem_attention(q, k, v, policy=policy, dense_below=0, backend=backend, return_lse=True)
            alone, alone_lse = apart(q, k, v, policy, backend)
            assert torch.equal(out, alone)
            assert torch.equal(lse, alone_lse)
    assert any(form[-4] == policy for form in programs(q, k, v, policy, backend))


def test_inputs_that_coincide_or_lie_otherwise_have_programs_of_their_own(backend):
    policy = Mass(share=7.0)
    q, k, v = random_qkv(1, 800, 800, 8, 2, 128)
    wide = torch.randn(1, 800, 2, 136, device="cuda", dtype=torch.bfloat16)
    odd = wide[..., 4:132]  # 8 bytes behind an aligned address
    for keys, values in ((k, v), (k, k), (v, v), (odd, v), (k, odd), (wide[..., :128], v), (k, v)) * 2:
        out = stem_attention(q, keys, values, policy=policy, dense_below=0, backend=backend)
        assert torch.equal(out, apart(q, keys, values, policy, backend)[0])


def test_a_step_is_planned_once_for_layers_with_caches_of_their_own(backend, rule: Rule):
    policy, lengths = rule(8), [(100, 900), (640, 640), (1, 70)]
    q = torch.randn(sum(a for a, _ in lengths), 8, 128, device="cuda", dtype=torch.bfloat16)
    pages = [-(-b // 64) for _, b in lengths]
    table = torch.zeros(3, max(pages), dtype=torch.int32, device="cuda")
    order = torch.randperm(sum(pages), device="cuda").to(torch.int32)
    for i, part in enumerate(order.split(pages)):
        table[i, : len(part)] = part
    q_lens, kv_lens = zip(*lengths, strict=True)
    step = PackedBatch.plan(q_lens, kv_lens, page_table=table, device=q.device)
    for layer in range(4):
        k, v = (torch.randn(sum(pages), 64, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        with no_synchronisation():
            out, _ = run(Call(q, k, v, policy, 128**-0.5, batch=step, dense_below=0, backend=backend))
        fresh = PackedBatch.plan(q_lens, kv_lens, page_table=table, device=q.device)
        again, _ = run(Call(q, k, v, policy, 128**-0.5, batch=fresh, dense_below=0, backend=backend))
        assert torch.equal(out, again), layer
    assert len(step.once("programs", dict)) == 1


def test_a_program_keeps_no_input_alive(backend):
    q, k, v = random_qkv(1, 900, 900, 8, 2, 128)
    stem_attention(q, k, v, policy=Stem(beta=0.3), dense_below=0, backend=backend)
    seen = [weakref.ref(x) for x in (q, k, v)]
    del q, k, v
    assert [ref() for ref in seen] == [None] * 3


def test_a_captured_call_leaves_no_program(backend):
    policy = Mass(share=5.5, head_factors=[[1.0, 2.0, 0.5, 1.0]])
    q, k, v = random_qkv(1, 600, 600, 4, 2, 128)
    expected = apart(q, k, v, policy, backend)[0]
    graph = torch.cuda.CUDAGraph()
    stem_attention(q, k, v, policy=Mass(share=5.5), dense_below=0, backend=backend)  # compiles
    before = len(programs(q, k, v, policy, backend))
    with torch.cuda.graph(graph):
        out = stem_attention(q, k, v, policy=policy, dense_below=0, backend=backend)
    assert len(programs(q, k, v, policy, backend)) == before
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def test_streams_do_not_share_programs(backend):
    policy, side = Mass(share=3.5, head_factors=[[1.0, 2.0]]), torch.cuda.Stream()
    q, k, v = random_qkv(1, 700, 700, 2, 1, 128)
    here = stem_attention(q, k, v, policy=policy, dense_below=0, backend=backend)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        there = stem_attention(q, k, v, policy=policy, dense_below=0, backend=backend)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(here, there)
    assert len({form[2] for form in programs(q, k, v, policy, backend) if policy in form}) == 2
