"""On a GPU: the blocks that are kept are those of the same scores in fp64, or of the same masses on a CPU."""

import math
from dataclasses import replace

import pytest
import torch

from stem_attention import Mass, Stem, explain, select_blocks
from stem_attention.policies import Oracle, XAttentionTopK
from stem_attention.policies.oracle import block_mass
from stem_attention.policies.ranked import choose as eager_choose
from stem_attention.testing import make_qkv, structured_qkv

from .common import FACTORS, at_most_extra_bytes, differing_rate, on_gpu, random_qkv

pytestmark = on_gpu

PRESETS = {"default": Stem(), "paper": Stem.paper(), "angelslim": Stem.angelslim()}


def rate(policy, q, k, v, **options):
    """Blocks that differ from those that the policy's own code keeps in fp64, over those that are kept."""
    selection = select_blocks(q, k, v, policy=policy, **options)
    selection.validate()
    return differing_rate(selection, policy(q.double(), k.double(), v.double(), **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_runs_on_the_fastest_kernel_of_the_card(dtype):
    hopper = torch.version.hip is None and torch.cuda.get_device_capability() == (9, 0)
    assert explain(device="cuda", dtype=dtype).chosen == ("hopper" if hopper else "triton")


@pytest.mark.parametrize("maker", [structured_qkv, make_qkv], ids=["structured", "flat"])
@pytest.mark.parametrize("preset", PRESETS)
def test_long_prompts_keep_the_blocks_of_fp64(preset, maker):
    q, k, v = maker(1, 32768, 32768, 8, 2, 128, torch.bfloat16, "cuda")
    assert rate(PRESETS[preset], q, k, v) < 1e-4
    assert select_blocks(q, k, v, policy=PRESETS[preset]).density() < 0.6


def test_scores_of_131072_tokens_are_as_good():
    assert rate(Stem(), *random_qkv(1, 131072, 131072, 4, 1, 128)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_size", [64, 128])
def test_every_head_dim_block_size_and_dtype(block_size, dim, dtype):
    q, k, v = structured_qkv(1, 5000, 5000, 4, 2, dim, dtype, "cuda")
    assert rate(Stem(block_size=block_size), q, k, v) < 1e-3  # one pair of thousands


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("policy", "q_len", "kv_len", "heads", "dim", "prompt_len"),
    [
        (Mass(), 8192, 8192, (8, 2), 128, 8192),
        (Mass(), 3001, 7013, (4, 4), 64, 9000),
        (Mass(share=2.0), 4097, 4097, (7, 1), 80, 4097),
        (Mass(query_pool=8, key_pool=64), 4096, 4096, (4, 2), 256, 4096),
        (Mass(block_size=128, query_pool=64, key_pool=16), 4999, 4999, (4, 1), 96, 4999),
        (Mass(tail_blocks=0, sink_blocks=0), 2000, 2000, (2, 2), 128, 2000),
        (Mass(head_factors=(FACTORS,)), 3001, 7013, (8, 2), 128, 9000),
    ],
)
def test_by_mass_it_keeps_what_the_twin_keeps(policy, q_len, kv_len, heads, dim, prompt_len, dtype):
    q, k, v = structured_qkv(1, q_len, kv_len, *heads, dim, dtype, "cuda")
    got = select_blocks(q, k, v, policy=policy, prompt_len=prompt_len)
    got.validate()
    expected = select_blocks(q.cpu(), k.cpu(), v.cpu(), policy=policy, prompt_len=prompt_len, backend="torch")
    assert differing_rate(got, expected) <= 1e-3
    assert got.density() < 1


@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_every_group_of_heads(group):
    assert rate(Stem(), *structured_qkv(2, 3001, 4099, 2 * group, 2, 64, torch.bfloat16, "cuda")) < 1e-3


@pytest.mark.parametrize("kv_len", [1, 63, 64, 65, 129, 1000, 1009, 2048, 4099])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_length(preset, kv_len):
    for q_len in {1, (kv_len + 1) // 2, kv_len}:
        q, k, v = structured_qkv(1, q_len, kv_len, 2, 1, 64, torch.bfloat16, "cuda")
        assert rate(PRESETS[preset], q, k, v) < 2e-3


@pytest.mark.parametrize("policy", [Stem(), Stem.paper(forced="extra"), Mass(block_size=128)], ids=["inside", "extra", "mass"])
def test_chunks_keep_what_one_call_keeps(policy):
    q, k, v = structured_qkv(1, 20000, 20000, 4, 2, 128, torch.bfloat16, "cuda")
    whole = select_blocks(q, k, v, policy=policy).to_mask()
    low = 0
    for high in (4096, 12800, 13056, 20000):
        part = select_blocks(q[:, low:high], k[:, :high], v[:, :high], policy=policy, prompt_len=20000).to_mask()
        assert torch.equal(part, whole[:, :, low // 128 : -(-high // 128), : part.shape[3]])
        low = high


def test_a_scale_and_no_value_term():
    q, k, v = structured_qkv(1, 6000, 6000, 4, 2, 128, torch.bfloat16, "cuda")
    assert rate(replace(Stem(), magnitude="none", stride=8), q, k, v, scale=0.31) < 1e-3


@pytest.mark.parametrize("policy", [Oracle(), XAttentionTopK()], ids=lambda policy: policy.name)
def test_policies_that_rank_by_mass_keep_the_blocks_of_fp64(policy):
    assert rate(policy, *structured_qkv(1, 8192, 8192, 4, 2, 64, torch.bfloat16, "cuda")) < 1e-3


def test_a_row_of_the_oracle_takes_a_few_hundred_megabytes_at_128k():
    q, k, _ = random_qkv(1, 128, 131072, 32, 8, 128)
    with at_most_extra_bytes(1 << 29):
        mass = block_mass(q, k, 128**-0.5, 128, 1023)
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]))


@pytest.mark.parametrize(("columns", "rows", "first"), [(64, 64, 0), (1000, 200, 800), (4096, 40, 4056)])
def test_scores_of_any_kind_are_chosen_from_like_the_eager_twin(columns, rows, first):
    from tests.backends.triton.choosing import choose

    draw = torch.Generator("cuda").manual_seed(columns)
    scores = torch.randint(-40, 40, (2, 3, rows, columns), generator=draw, device="cuda").float()  # many ties
    scores[0, 0, 5, 2], scores[1, 2, rows // 2, 9] = math.nan, -math.inf
    budgets = [min(first + row + 1, 7 + columns // 8) for row in range(rows)]
    indices, counts = choose(scores, first, budgets, 2, 3)
    assert torch.equal(indices.long(), eager_choose(scores, first, budgets, 2, 3))
    assert torch.equal(counts.long(), torch.tensor(budgets, device="cuda").expand(2, 3, -1))
