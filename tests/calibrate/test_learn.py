"""Shares for every head: what is learnt from, how the shares are chosen, and the density they come to."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tests.toys import CONTEXT, toy

from stem_attention import Mass, UnsupportedError
from stem_attention.calibrate import learn as calibrate
from stem_attention.calibrate.curves import SHARES
from stem_attention.calibrate.learn import Curves, Lesson, allocate, learn, needle_lessons, text_lessons, tuned
from stem_attention.integrations.transformers import set_policy
from stem_attention.models.prefill import read
from stem_attention.models.texts import Text

POLICY = Mass(block_size=16, query_pool=4, key_pool=4, sink_blocks=1, local_blocks=1, tail_blocks=1)
TEXT = Text("words", " ".join(f"{word} {word * word % 97}" for word in range(400)))
HAYSTACK = "Nothing happened today. It rained a little. The cat slept. Somebody sang. "


def made_up(seed=0, layers=3, heads=4):
    """Curves as real ones are: density falls with the share, cost rises, at its own pace for each head."""
    generator = torch.Generator().manual_seed(seed)
    rise, fall = torch.rand(2, layers, heads, len(SHARES), generator=generator, dtype=torch.float64) ** 4 + 1e-3
    size = 10 ** (2 * torch.randn(layers, heads, 1, generator=generator, dtype=torch.float64))
    cost, fall = size * rise.cumsum(-1), fall.cumsum(-1)
    return Curves(cost / 4, cost * 3 / 4, 1 - 0.95 * fall / fall[..., -1:])


def picked(values, shares):
    """Of every head at its share."""
    index = torch.tensor(SHARES, dtype=torch.float64).sub(shares[..., None]).abs().argmin(-1, keepdim=True)
    return values.gather(-1, index)[..., 0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("density", [0.1, 0.3, 0.8])
def test_shares_keep_the_density_asked_for(seed, density):
    curves = made_up(seed, layers=8, heads=8)
    shares = allocate([(curves, 1.0)], density)
    assert shares.shape == (8, 8)
    assert set(shares.flatten().tolist()) <= set(SHARES)
    kept = float(picked(curves.density, shares).mean())
    assert kept <= density
    assert kept == pytest.approx(density, abs=0.015)  # a head's step from share to share, of 64 heads


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("density", [0.1, 0.3, 0.8])
def test_shares_are_the_best_there_are_of_weighted_costs(density, weight):
    """Against every combination of three heads: those that keep as little lose more."""
    first, second = made_up(3, layers=1, heads=3), made_up(4, layers=1, heads=3)
    kept, cost = (first.density + second.density) / 2, first.cost + weight * second.cost
    shares = allocate([(first, 1.0), (second, weight)], density)
    held, lost = (sum(torch.meshgrid(*values[0], indexing="ij")) for values in (kept, cost))
    assert picked(cost, shares).sum() == pytest.approx(lost[held <= picked(kept, shares).sum() + 1e-9].min())


def test_a_head_that_costs_nothing_gets_the_largest_share():
    curves = made_up(0)
    curves.slope[1, 2] = curves.bend[1, 2] = 0
    for density in (0.3, 0.9):
        shares = allocate([(curves, 1.0)], density)
        assert shares[1, 2] == SHARES[-1]
        assert float(shares.min()) < SHARES[-1]


def test_nothing_is_gained_by_dropping_blocks():
    slope, bend = torch.tensor([-5.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 1.0])
    assert torch.equal(Curves(slope, bend, bend).cost, torch.tensor([1.0, 1.0, 3.0]))


@pytest.mark.parametrize("density", [0.0, 0.04, 1.0, 1.5, float("nan")])
def test_a_density_out_of_reach_is_refused(density):
    says = f"density: expected a number between 0.050 and 1, got {density}; the largest shares keep the former: ask for more"
    with pytest.raises(ValueError, match=says):
        allocate([(made_up(), 1.0)], density)


@pytest.mark.parametrize("policy", [POLICY, replace(POLICY, sink_blocks=0, local_blocks=2, tail_blocks=0)])
def test_a_density_below_the_forced_blocks_is_refused_before_anything_is_read(policy):
    q = k = torch.zeros(1, 150, 1, 4)
    q, k = q + 1, k + torch.arange(150)[:, None, None]
    least = replace(policy, share=1e9)(q, k, k).density()
    assert 0.05 < least < 0.5
    long, short = Lesson([1] * 143, [1] * 7), Lesson([1] * 20, [])
    calibrate.check_density(least + 1e-6, [short, long], policy)
    with pytest.raises(ValueError, match=f"{least:.3f} and 1, .*always kept are {least:.3f} of 150 tokens: ask for more"):
        calibrate.check_density(least - 1e-6, [short, long], policy)


def test_a_density_that_only_the_smallest_shares_reach_is_no_division_by_zero():
    curves = made_up(0)
    curves.cost[..., 0], curves.density[..., 0] = 0, 1
    kept = float(picked(curves.density, allocate([(curves, 1.0)], 0.9999)).mean())
    assert float(curves.density[..., 1].mean()) < kept <= 0.9999


@pytest.mark.parametrize("count", [1, 2, 3])
def test_other_windows_share_no_token_with_those_learnt_from(tokenizer, count):
    text = Text("numbers", " ".join(str(number) for number in range(5000)))
    learnt = text_lessons(tokenizer, [text], 160, count)
    others = calibrate.other_windows(tokenizer, [text], 160, count)
    assert len(others) == max(1, count - 1)
    assert all(len(lesson.ids) == 160 and lesson.answer == [] for lesson in [*learnt, *others])
    whole = list(tokenizer(text.content, add_special_tokens=False).input_ids)
    spans = [next(i for i in range(len(whole)) if whole[i : i + 140] == lesson.ids[-140:]) for lesson in [*learnt, *others]]
    spans.sort()
    assert all(after - before >= 159 for before, after in pairwise(spans))


def test_the_loss_of_texts_is_what_sparse_attention_adds(model, lessons):
    whole, sparse = calibrate.loss_rises(model, lessons, [replace(POLICY, share=1e-6), replace(POLICY, share=100.0)])
    assert abs(whole) < 1e-5
    assert abs(sparse) > 1e-5


def test_needle_lessons_ask_for_a_number_among_others_from_start_to_end(tokenizer):
    lessons = needle_lessons(tokenizer, HAYSTACK, 1500, 4, "any")
    depths = []
    for lesson in lessons:
        prompt, answer = tokenizer.decode(lesson.ids), tokenizer.decode(lesson.answer)
        assert 1350 < len(lesson.ids) <= len(lesson.ids) + len(lesson.answer) <= 1500
        assert re.fullmatch(r" \d+", answer)
        assert prompt.count("One of the special magic numbers for") == 4
        fact = prompt.index(f"is:{answer}.")
        depths.append(fact / len(prompt))
        name = prompt[:fact].split("numbers for ")[-1].strip()
        assert name in prompt[-200:], "it is asked for"
        assert "cat slept" in prompt
    assert depths == sorted(depths)
    assert depths[0] < 0.35 < 0.65 < depths[3]


@pytest.fixture
def lessons(tokenizer):
    return text_lessons(tokenizer, [TEXT], 160, 2)


def test_learning_is_repeated_by_its_seed_and_tells_of_each_lesson(model, lessons):
    ticks = []
    curves = learn(model, lessons, POLICY, 3, lambda: ticks.append(1))
    assert len(ticks) == 2
    assert curves.cost.shape == curves.density.shape == (2, 4, len(SHARES))
    assert bool(curves.cost[..., -1].gt(0).all())
    assert bool((curves.density.diff(dim=-1) <= 0).all())
    assert 0 < float(curves.density.min()) < float(curves.density.max()) <= 1
    again = learn(model, lessons, POLICY, 3, lambda: None)
    assert torch.equal(curves.cost, again.cost)
    assert torch.equal(curves.density, again.density)
    assert not torch.equal(learn(model, lessons, POLICY, 4, lambda: None).cost, curves.cost)


def test_costs_add_up_and_densities_are_averaged_over_lessons(model, tokenizer):
    answers = needle_lessons(tokenizer, HAYSTACK, 700, 2, "any")
    both = learn(model, answers, POLICY, 0, lambda: None)
    first, second = (learn(model, part, POLICY, 0, lambda: None) for part in (answers[:1], answers[1:]))
    torch.testing.assert_close(both.density, (first.density + second.density) / 2)
    # Averages over the tokens that count. Of the second order the signs are drawn anew for the second lesson.
    n, m = (len(lesson.answer) for lesson in answers)
    torch.testing.assert_close(both.slope, (n * first.slope + m * second.slope) / (n + m), rtol=1e-3, atol=1e-9)
    assert bool((both.bend * (n + m) >= first.bend * n * (1 - 1e-6)).all())


@pytest.fixture
def told(model, lessons):
    """What the model says of every next token."""
    with torch.no_grad():
        return model(torch.tensor([lessons[0].ids])).logits[0].log_softmax(-1)


def test_the_first_order_is_of_the_answer_or_of_all_tokens_of_a_text(model, lessons, told):
    ids, generator = lessons[0].ids, torch.Generator().manual_seed(0)
    wanted = -told[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    for lesson, losses in ((Lesson(ids, []), wanted), (Lesson(ids[:150], ids[150:153]), wanted[149:152])):
        found = calibrate._losses(model, lesson, generator, drawn=False).detach()
        torch.testing.assert_close(found, losses, rtol=1e-4, atol=1e-4)


def test_the_second_order_has_random_signs_and_tokens_drawn_from_the_model(model, lessons, told):
    ids = lessons[0].ids
    seen = set()
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        answer = calibrate._losses(model, Lesson(ids[:150], ids[150:153]), generator, drawn=True).detach()
        own = -told[149:152].gather(1, torch.tensor(ids[150:153])[:, None])[:, 0]
        torch.testing.assert_close(answer.abs(), own, rtol=1e-4, atol=1e-4)
        seen.add(tuple(answer.sign().tolist()))
    assert len(seen) > 3
    drawn = calibrate._losses(model, Lesson(ids, []), torch.Generator().manual_seed(0), drawn=True).detach().abs()
    own = -told[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert not torch.allclose(drawn, own, atol=1e-2)
    # What the model draws it finds, on average, as likely as its entropy says.
    entropy = -(told.exp() * told).sum(-1)[:-1].mean()
    assert float(drawn.mean()) == pytest.approx(float(entropy), rel=0.1)


def test_long_texts_are_looked_at_in_part(model, lessons, monkeypatch):
    monkeypatch.setattr(calibrate, "_PREDICTED", 32)
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    learn(model, lessons, POLICY, 0, lambda: None)
    assert seen == [1] + [32] * 4  # a sparse prefill, then two passes for each of two lessons


def test_a_model_that_reads_in_both_directions_is_refused_before_anything_is_learnt(lessons):
    model = toy("bert", max_position_embeddings=CONTEXT)
    with pytest.raises(UnsupportedError, match=r"layers all run sparse; BertLMHeadModel runs some dense \(not causal\)"):
        learn(model, lessons, POLICY, 0, lambda: pytest.fail("a lesson was read"))


def test_layers_that_a_model_keeps_dense_count_as_sparse_ones(model, lessons):
    found = tuned(model, lessons, POLICY, 0.5, lambda: None)
    model.set_attn_implementation("stem")
    set_policy(model, dense_layers=1)
    assert tuned(model, lessons, POLICY, 0.5, lambda: None) == found


@pytest.mark.parametrize("density", [0.35, 0.5, 0.7])
def test_the_density_is_that_of_sparse_prefills(model, tokenizer, density):
    lessons = text_lessons(tokenizer, [TEXT], 480, 2)
    ticks = []
    policy = replace(POLICY, head_factors=((0.5, 1.0, 2.0, 1.5), (1.0, 0.7, 1.2, 3.0)))
    found, kept = tuned(model, lessons, policy, density, lambda: ticks.append(1))
    assert found == replace(policy, share=found.share)
    assert kept == pytest.approx(density, rel=0.02)
    assert kept == sum(read(model, lesson.ids, found, dense_below=0).density for lesson in lessons) / 2
    assert 1 <= len(ticks) <= 8


def test_the_nearest_try_is_taken_when_none_is_near(model, lessons):
    """Forced blocks alone keep more than a thousandth; nothing keeps more than everything."""
    found, kept = tuned(model, lessons, POLICY, 1e-3, lambda: None)
    assert kept == read(model, lessons[0].ids, replace(found, share=1e9), dense_below=0).density
    assert found.share > POLICY.share
