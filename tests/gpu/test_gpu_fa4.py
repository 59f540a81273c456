"""On a Hopper GPU with flash-attn-4: its kernel behind our selection; and FlexAttention under our mask, compiled."""

import pytest
import torch

from stem_attention import Mass, block_sparse_attention, explain, select_blocks, stem_attention
from stem_attention.backends import Request
from stem_attention.backends.fa4.lists import shared_lists
from stem_attention.call import Call
from stem_attention.policies import Dense
from stem_attention.testing import assert_accurate, random_selection, worst_row_error

from .common import on_gpu, random_qkv

pytestmark = on_gpu


@pytest.fixture
def _fa4():
    found = explain(device="cuda", dtype=torch.bfloat16, backend="fa4")
    if found.chosen is None:
        pytest.skip(found.reasons["fa4"])


@pytest.mark.usefixtures("_fa4")
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.float16), (96, torch.bfloat16), (128, torch.bfloat16)])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1024, 1024), (1000, 1000), (700, 1212), (1, 513), (300, 555)])
def test_its_attention_is_exact_over_the_selection(size, dim, dtype, q_len, kv_len):
    """Some of these do not begin at a block's border: they run portably."""
    q, k, v = random_qkv(2, q_len, kv_len, 6, 2, dim, dtype=dtype)
    selection = random_selection(2, 6, q_len, kv_len, size, density=0.3, device="cuda")
    out, lse = block_sparse_attention(q, k, v, selection, return_lse=True, backend="fa4")
    assert_accurate(out, None, q, k, v, selection)
    ours = block_sparse_attention(q, k, v, selection, return_lse=True, backend="triton")[1]
    assert (lse - ours).abs().max() < 1e-3
    assert_accurate(block_sparse_attention(q, k, v, selection, backend="fa4"), None, q, k, v, selection)


@pytest.mark.usefixtures("_fa4")
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("q_len", "kv_len"), [(2048, 2048), (1000, 1000), (512, 1024)])
def test_lists_that_256_queries_share_are_exact(q_len, kv_len, size):
    """Blackwell reads such lists, under a mask that answers for 32 keys. Hopper refuses that mask: this one answers for one."""
    from cutlass import Int32, cute
    from flash_attn.cute.utils import scalar_to_ssa

    from stem_attention.backends.fa4.attention import TILE, _attend

    @cute.jit
    def mask(batch, head, query, key, lengths, tensors):
        kept = scalar_to_ssa(Int32(tensors[0][batch[0], head[0], query[0] // size, key[0] // size]), Int32)
        return key <= (query + (lengths.seqlen_k - lengths.seqlen_q)) * kept + (kept - 1)

    q, k, v = random_qkv(2, q_len, kv_len, 4, 2, 128)
    selection = random_selection(2, 4, q_len, kv_len, size, density=0.3, device="cuda")
    fields, kept = shared_lists(selection, *TILE)
    call = Call(q, k, v, Dense(size), 128**-0.5, kv_len, None)
    out, _ = _attend(call, fields, mask_mod=mask, aux_tensors=[kept])
    assert_accurate(out, None, q, k, v, selection)


@pytest.mark.usefixtures("_fa4")
def test_a_whole_call_selects_and_attends():
    q, k, v = random_qkv(1, 3000, 3000, 8, 2, 128)
    out = stem_attention(q, k, v, policy=Mass(), dense_below=0, backend="fa4")
    selection = select_blocks(q, k, v, policy=Mass())
    assert worst_row_error(out, block_sparse_attention(q, k, v, selection, backend="triton")) < 2e-2


@pytest.mark.usefixtures("_fa4")
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.float16), (96, torch.bfloat16), (128, torch.bfloat16)])
def test_it_passes_the_trial_that_other_cards_ask_for(size, dim, dtype):
    from stem_attention.backends.fa4.trial import obstacle

    assert obstacle(Request(torch.device("cuda:0"), dtype, dim, size)) is None


@pytest.mark.parametrize(("q_len", "kv_len"), [(1024, 1024), (1000, 1000), (700, 1212), (300, 555)])
def test_compiled_flex_attention_under_the_mask_is_ours(q_len, kv_len):
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = random_qkv(1, q_len, kv_len, 4, 2, 64)
    selection = random_selection(1, 4, q_len, kv_len, 128, density=0.3, device="cuda")
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    mask = selection.to_block_mask()
    out = compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask, enable_gqa=True).transpose(1, 2)
    assert worst_row_error(out, block_sparse_attention(q, k, v, selection)) < 2e-2
