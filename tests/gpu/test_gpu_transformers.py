"""On a GPU: a model of transformers in bf16."""

from typing import Any

import torch
from tests.integrations.tiny import hosts, left_padding, small_llama, tokens

from stem_attention.testing import relative_error

from .common import on_gpu

pytestmark = on_gpu


def llama(attention: str, dtype: torch.dtype) -> Any:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64, "initializer_range": 0.1}
    return small_llama(attention, **sizes).to("cuda", dtype)


def test_with_everything_kept_a_model_loses_no_more_than_on_sdpa():
    ids, calls = tokens(2, 700).cuda(), []
    with torch.no_grad(), hosts.use_policy("dense:block_size=64", dense_below=0, observer=calls.append):
        exact, host = (llama("sdpa", dtype)(ids).logits for dtype in (torch.float64, torch.bfloat16))
        stem = llama("stem", torch.bfloat16)(ids).logits
    assert [call.sparse for call in calls] == [True, True]
    assert relative_error(stem, exact) <= 1.1 * relative_error(host, exact)


def test_a_padded_batch_generates_sparsely():
    inputs, calls = {"inputs": tokens(2, 3000).cuda(), "attention_mask": left_padding([3000, 2300], 3000).cuda()}, []
    with torch.no_grad(), hosts.use_policy("mass", dense_below=0, observer=calls.append):
        out = llama("stem", torch.bfloat16).generate(**inputs, max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 3004)
    assert any(call.sparse for call in calls)
