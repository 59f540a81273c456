"""On a GPU: a model of transformers in bf16."""

from typing import Any

import pytest
import torch

from stem_attention import StemConfig
from stem_attention.testing import relative_error

from .common import on_gpu

transformers = pytest.importorskip("transformers", reason="needs transformers")

pytestmark = on_gpu

KEEP_ALL = StemConfig(dense_below=0, ratio_short=1, ratio_long=1, decay=1, block_size=64)


def llama(attention: str, dtype: torch.dtype) -> Any:
    from stem_attention.integrations.transformers import register

    register()
    config = transformers.LlamaConfig(
        vocab_size=199, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, initializer_range=0.1, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.to("cuda", dtype).eval()


def prompts(rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, 199, (rows, length), generator=torch.Generator().manual_seed(3)).cuda()


def test_with_everything_kept_a_model_loses_no_more_than_on_sdpa():
    from stem_attention.integrations.transformers import LayerCall, configure

    ids = prompts(2, 700)
    calls: list[LayerCall] = []
    with torch.no_grad(), configure(KEEP_ALL, observer=calls.append):
        exact = llama("sdpa", torch.float64)(ids).logits
        host = llama("sdpa", torch.bfloat16)(ids).logits
        stem = llama("stem", torch.bfloat16)(ids).logits
    assert [call.sparse for call in calls] == [True, True]
    assert relative_error(stem, exact) <= 1.1 * relative_error(host, exact)


def test_a_padded_batch_generates_sparsely():
    from stem_attention.integrations.transformers import LayerCall, configure

    ids, mask = prompts(2, 3000), torch.ones(2, 3000, dtype=torch.long, device="cuda")
    mask[1, :700] = 0
    calls: list[LayerCall] = []
    with torch.no_grad(), configure(StemConfig(dense_below=0), observer=calls.append):
        out = llama("stem", torch.bfloat16).generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 3004)
    assert any(call.sparse for call in calls)
