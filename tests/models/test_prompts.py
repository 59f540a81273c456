"""The planted prompt: its length, what it hides, and that it repeats."""

import hashlib
from itertools import islice

import pytest
from tests.toys import byte_tokenizer

from stem_attention.models.prompts import (
    KINDS,
    chat_ids,
    file_sentences,
    haystack_sentences,
    make_riddle,
    planted_prompt,
)


@pytest.mark.parametrize("tokens", [500, 1000, 5000])
def test_fills_the_length_and_never_exceeds_it(tokenizer, tokens):
    length = len(planted_prompt(tokenizer, tokens, seed=1).ids)
    assert tokens - 250 < length <= tokens


@pytest.mark.parametrize(
    ("haystack", "digest"),
    [
        (None, "02677ca973dbc52eb745b9c7d43edfb3c583880b15998142c3931598c472a026"),
        (
            "".join(f"Sentence {n} of the text is\nnot the last. " for n in range(300)),
            "e8085eb9e658a01a508c27fd3a2ad28a42641dd351c52eba0cc54ab6c04fc160",
        ),
    ],
    ids=["made up", "text"],
)
def test_prompts_are_those_of_the_results_on_record(tokenizer, haystack, digest):
    found = hashlib.sha256()
    for kind in KINDS:
        for seed in range(3):
            settings = {"seed": f"0 {kind}-{seed}", "depth": seed / 2, "kind": kind, "count": 4, "haystack": haystack}
            found.update(repr(planted_prompt(tokenizer, 12000, **settings)).encode())
    assert found.hexdigest() == digest, "records under benchmarks/results/eval come from other prompts than these"


def test_sentences_hardly_repeat_and_are_whole():
    sentences = list(islice(haystack_sentences(0), 500))
    assert len(set(sentences)) > 475
    assert all(sentence[0].isupper() or sentence[0] == '"' for sentence in sentences)
    assert not any("{" in sentence for sentence in sentences)


def test_chat_template_wraps_the_message_when_there_is_one(tokenizer):
    assert tokenizer.decode(chat_ids(tokenizer, "hello", "so")) == "hello\nso"
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<reply>"
    try:
        assert tokenizer.decode(chat_ids(tokenizer, "hello", "so")) == "<user>hello<reply>so"
        assert tokenizer.decode(chat_ids(tokenizer, "hello", use_template=False)) == "hello"
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_plants_each_fact_once_where_it_says(tokenizer, kind):
    prompt = planted_prompt(tokenizer, 4000, kind=kind, depth=0.25, count=4)
    text = tokenizer.decode(prompt.ids)
    assert text.endswith(prompt.answer_prefix)
    assert text.count("One of the special magic numbers") == (1 if kind == "single" else 4)
    assert len(prompt.answers) == len(set(prompt.answers)) == (4 if kind in ("multivalue", "multiquery") else 1)
    assert prompt.places == (0.25, 0.5, 0.75, 0.0)[: len(prompt.answers)]
    for number, place in zip(prompt.answers, prompt.places, strict=True):
        assert text.count(number) == 1
        assert abs(text.index(number) / len(text) - place) < 0.2


def test_multikey_asks_for_one_of_different_names():
    riddle = make_riddle("multikey", 0, 0.5, 4)
    names = [name for name, _, _ in riddle.facts]
    question, prefix = riddle.question
    assert len(set(names)) == 4
    assert [name for name in names if name in question] == [names[0]]
    assert (question[:7], prefix[-3:]) == ("What is", " is")


def test_multivalue_has_one_name_and_multiquery_asks_for_all():
    assert len({name for name, _, _ in make_riddle("multivalue", 0, 0.5, 4).facts}) == 1
    riddle = make_riddle("multiquery", 0, 0.5, 4)
    question, prefix = riddle.question
    assert all(name in question and name in prefix for name, _, _ in riddle.facts)
    assert prefix.endswith(" are")


def test_sentences_of_a_text_go_round_from_where_the_seed_says():
    text = "One is\nfirst. Two follows! Is three? Four"
    found = list(islice(file_sentences(text, 0), 8))
    assert set(found) == {"One is first.", "Two follows!", "Is three?", "Four"}
    assert found[:4] == found[4:]
    assert len({next(file_sentences(text, seed)) for seed in range(20)}) > 1
    with pytest.raises(ValueError, match="haystack"):
        next(file_sentences(" ", 0))


def test_too_few_tokens_or_a_bad_depth_or_kind_is_refused(tokenizer):
    wrongs = {"tokens: expected at least": {"tokens": 50}, "depth": {"depth": 1.5}, "kind: expected one": {"kind": "x"}}
    for says, wrong in wrongs.items():
        with pytest.raises(ValueError, match=says):
            planted_prompt(tokenizer, **{"tokens": 2000, **wrong})


@pytest.mark.parametrize("template", ["{% for", "{{ raise_exception('not like this') }}"])
def test_a_chat_template_that_fails_names_itself_and_the_way_out(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=r"chat template: expected .*--no-chat-template, or use_template=False"):
        chat_ids(tokenizer, "hello")
    assert len(chat_ids(tokenizer, "hello", use_template=False)) == 5
