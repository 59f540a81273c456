"""On a GPU: the blocks that are kept are those of the same scores in fp64."""

import math
from dataclasses import replace

import pytest
import torch

from stem_attention import StemConfig, explain, select_blocks
from stem_attention.policies import Stem
from stem_attention.policies.choose import choose as eager_choose
from stem_attention.testing import LAYOUTS, make_qkv, structured_qkv

from .common import SPARSE, differing_rate, on_gpu, random_qkv

pytestmark = on_gpu

PRESETS = {"default": StemConfig(), "paper": StemConfig.paper(), "angelslim": StemConfig.angelslim()}


def exact_selection(q, k, v, config, **options):
    return Stem(config)(q.double(), k.double(), v.double(), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_runs_on_the_fastest_kernel_of_the_card(dtype):
    hopper = torch.version.hip is None and torch.cuda.get_device_capability() == (9, 0)
    assert explain(device="cuda", dtype=dtype).chosen == ("hopper" if hopper else "triton")


@pytest.mark.parametrize("maker", [structured_qkv, make_qkv], ids=["structured", "flat"])
@pytest.mark.parametrize("preset", PRESETS)
def test_long_prompts_keep_the_blocks_of_fp64(preset, maker):
    q, k, v = maker(1, 32768, 32768, 8, 2, 128, torch.bfloat16, "cuda")
    selection = select_blocks(q, k, v, config=PRESETS[preset])
    selection.validate()
    assert selection.density() < 0.6
    assert differing_rate(selection, exact_selection(q, k, v, PRESETS[preset])) < 1e-4


@pytest.mark.parametrize("rows", [1, 100, 1024])
def test_scores_of_any_policy_are_chosen_from_like_the_eager_twin(rows):
    from stem_attention.backends.triton.choose import choose

    scores = torch.randn(2, 4, rows, rows + 5, device="cuda")
    scores[0] = scores[0].round()  # many ties
    scores[1, 1, rows // 2, 0], scores[1, 2, rows // 2, 1] = math.nan, -math.inf
    budgets = [min(5 + row + 1, max(8, 150 - row // 10)) for row in range(rows)]
    indices, counts = choose(scores, 5, budgets, 4, 4)
    assert torch.equal(indices.long(), eager_choose(scores, 5, budgets, 4, 4))
    assert torch.equal(counts.long(), torch.tensor(budgets, device="cuda").expand(2, 4, -1))


def test_scores_of_131072_tokens_are_as_good():
    q, k, v = random_qkv(1, 131072, 131072, 4, 1, 128)
    assert differing_rate(select_blocks(q, k, v), exact_selection(q, k, v, StemConfig())) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_size", [64, 128])
def test_every_head_dim_block_size_and_dtype(block_size, dim, dtype):
    q, k, v = structured_qkv(1, 5000, 5000, 4, 2, dim, dtype, "cuda")
    config = StemConfig(block_size=block_size)
    selection = select_blocks(q, k, v, config=config)
    selection.validate()
    assert differing_rate(selection, exact_selection(q, k, v, config)) < 1e-3  # one pair of thousands


@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_every_group_of_heads(group):
    q, k, v = structured_qkv(2, 3001, 4099, 2 * group, 2, 64, torch.bfloat16, "cuda")
    assert differing_rate(select_blocks(q, k, v), exact_selection(q, k, v, StemConfig())) < 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_nothing(layout):
    plain, strided = (make_qkv(2, 1500, 2100, 4, 2, 128, torch.bfloat16, "cuda", layout=name) for name in ("bshd", layout))
    assert torch.equal(select_blocks(*strided).indices, select_blocks(*plain).indices)


@pytest.mark.parametrize("kv_len", [1, 63, 64, 65, 129, 1000, 1009, 2048, 4099])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_length(preset, kv_len):
    for q_len in {1, (kv_len + 1) // 2, kv_len}:
        q, k, v = structured_qkv(1, q_len, kv_len, 2, 1, 64, torch.bfloat16, "cuda")
        selection = select_blocks(q, k, v, config=PRESETS[preset])
        selection.validate()
        assert differing_rate(selection, exact_selection(q, k, v, PRESETS[preset])) < 2e-3


@pytest.mark.parametrize("config", [StemConfig(), StemConfig.paper(forced="extra")], ids=["inside", "extra"])
def test_chunks_keep_what_one_call_keeps(config):
    q, k, v = structured_qkv(1, 20000, 20000, 4, 2, 128, torch.bfloat16, "cuda")
    whole = select_blocks(q, k, v, config=config).to_mask()
    low = 0
    for high in (4096, 12800, 13056, 20000):
        part = select_blocks(q[:, low:high], k[:, :high], v[:, :high], config=config, prompt_len=20000).to_mask()
        assert torch.equal(part, whole[:, :, low // 128 : -(-high // 128), : part.shape[3]])
        low = high


def test_equal_scores_keep_the_smaller_ids():
    q, k, v = (torch.ones(1, 8192, 2, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    assert differing_rate(select_blocks(q, k, v), exact_selection(q, k, v, StemConfig())) == 0


@pytest.mark.parametrize("forced", ["inside", "extra"])
def test_nan_in_a_value_is_kept_so_that_it_stays_visible(forced):
    q, k, v = make_qkv(1, 8192, 8192, 2, 1, 64, torch.bfloat16, "cuda")
    v[0, 20 * 128 + 5, 0, 3] = math.nan
    assert select_blocks(q, k, v, config=StemConfig(forced=forced)).to_mask()[:, :, 20:, 20].all()


def test_a_scale_and_no_value_term():
    q, k, v = structured_qkv(1, 6000, 6000, 4, 2, 128, torch.bfloat16, "cuda")
    config = replace(SPARSE, magnitude="none", stride=8)
    got = select_blocks(q, k, v, config=config, scale=0.31)
    assert differing_rate(got, exact_selection(q, k, v, config, scale=0.31)) < 1e-3
