"""On a GPU: policies that rank by mass keep what they keep on the CPU, in bounded memory."""

import pytest
import torch

from stem_attention import StemConfig
from stem_attention.evaluation.layers import LayerProbe
from stem_attention.evaluation.prefill import AttentionCall
from stem_attention.policies import Oracle, XAttentionTopK
from stem_attention.policies.oracle import block_mass
from stem_attention.testing import structured_qkv

from .common import at_most_extra_bytes, differing_rate, on_gpu, random_qkv

pytestmark = on_gpu

CONFIG = StemConfig(dense_below=0)


@pytest.mark.parametrize("policy", [Oracle(CONFIG), XAttentionTopK(CONFIG)], ids=lambda policy: policy.name)
def test_masses_rank_blocks_as_in_fp64(policy):
    q, k, v = structured_qkv(1, 8192, 8192, 4, 2, 64, torch.bfloat16, "cuda")
    selection = policy(q, k, v)
    selection.validate()
    assert differing_rate(selection, policy(q.double(), k.double(), v.double())) < 1e-3


def test_a_row_of_a_128k_prompt_takes_a_few_hundred_megabytes():
    q, k, _ = random_qkv(1, 128, 131072, 32, 8, 128)
    with at_most_extra_bytes(1 << 29):
        mass = block_mass(q, k, 128**-0.5, 128, 1023)
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]))


def test_the_oracle_recalls_more_of_a_layer_than_stem():
    q, k, v = (x.transpose(1, 2) for x in structured_qkv(1, 32768, 32768, 14, 2, 64, torch.bfloat16, "cuda"))
    recall = []
    for what in (CONFIG, Oracle(CONFIG)):
        probe = LayerProbe(what)
        probe(AttentionCall(0, q, k, v, None, 0.0))
        recall.append(torch.tensor(probe.recall[0]))
        assert bool((torch.tensor(probe.recall_last[0]) > 0.999).all())
    assert bool((recall[1] >= recall[0] - 1e-6).all())
