"""Dense attention for short prompts: torch's own, queries aligned to the end of the keys."""

import pytest
import torch

from stem_attention.backends.dense import dense_attention
from stem_attention.testing import LAYOUTS, exact_attention, make_qkv, structured_qkv, worst_row_error


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 50), (17, 50), (50, 50), (129, 129), (100, 129)])
def test_dense_attention_equals_causal_attention_in_fp64(q_len, kv_len, layout):
    q, k, v = structured_qkv(2, q_len, kv_len, 6, 2, 16, dtype=torch.float64, layout=layout)
    causal = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    out = dense_attention(q, k, v, 0.3)
    assert out.shape == q.shape
    assert worst_row_error(out, exact_attention(q, k, v, causal, 0.3)[0]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dense_attention_keeps_the_dtype(dtype):
    q, k, v = make_qkv(1, 20, 30, 2, 1, 16, dtype=dtype)
    assert dense_attention(q, k, v, 0.25).dtype == dtype
