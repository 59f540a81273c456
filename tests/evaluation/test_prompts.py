"""The planted prompt: its length, what it hides, and that it repeats."""

from itertools import islice

import pytest

from stem_attention.evaluation.prompts import chat_ids, haystack_sentences, planted_prompt


@pytest.mark.parametrize("tokens", [500, 1000, 5000])
def test_fills_the_length_and_never_exceeds_it(tokenizer, tokens: int) -> None:
    length = len(planted_prompt(tokenizer, tokens, seed=1).ids)
    assert tokens - 250 < length <= tokens


def test_number_stands_once_in_the_text_and_not_in_the_question(tokenizer) -> None:
    prompt = planted_prompt(tokenizer, 3000, seed=2)
    text = tokenizer.decode(prompt.ids)
    assert text.count(prompt.answer) == 1
    assert text.endswith(prompt.answer_prefix)


@pytest.mark.parametrize(("depth", "low", "high"), [(0.0, 0.0, 0.15), (0.5, 0.4, 0.6), (1.0, 0.8, 1.0)])
def test_depth_says_where_the_number_stands(tokenizer, depth: float, low: float, high: float) -> None:
    prompt = planted_prompt(tokenizer, 3000, depth=depth)
    text = tokenizer.decode(prompt.ids)
    assert low <= text.index(prompt.answer) / len(text) <= high


def test_same_seed_same_prompt_other_seed_another(tokenizer) -> None:
    assert planted_prompt(tokenizer, 2000, seed=3) == planted_prompt(tokenizer, 2000, seed=3)
    assert planted_prompt(tokenizer, 2000, seed=3).answer != planted_prompt(tokenizer, 2000, seed=4).answer


def test_sentences_hardly_repeat_and_are_whole() -> None:
    sentences = list(islice(haystack_sentences(0), 500))
    assert len(set(sentences)) > 475
    assert all(sentence[0].isupper() or sentence[0] == '"' for sentence in sentences)
    assert not any("{" in sentence for sentence in sentences)


def test_too_few_tokens_or_a_bad_depth_is_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match="tokens: expected at least"):
        planted_prompt(tokenizer, 50)
    with pytest.raises(ValueError, match="depth"):
        planted_prompt(tokenizer, 2000, depth=1.5)


def test_chat_template_wraps_the_message_when_there_is_one(tokenizer) -> None:
    assert tokenizer.decode(chat_ids(tokenizer, "hello", "so")) == "hello\nso"
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<reply>"
    try:
        assert tokenizer.decode(chat_ids(tokenizer, "hello", "so")) == "<user>hello<reply>so"
        assert tokenizer.decode(chat_ids(tokenizer, "hello", use_template=False)) == "hello"
    finally:
        tokenizer.chat_template = None
