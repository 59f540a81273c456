"""What models read: the planted prompt, and windows of texts."""

import hashlib
from itertools import islice, pairwise

import pytest
from tests.toys import byte_tokenizer

from stem_attention.errors import UnsupportedError
from stem_attention.models import texts
from stem_attention.models.prompts import KINDS, chat_ids, file_sentences, planted_prompt
from stem_attention.models.texts import Text, TokenizedText, stdlib_text, window_starts


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
    assert found.hexdigest() == digest, "records under evidence/eval come from other prompts than these"


def test_chat_template_wraps_the_message_when_there_is_one():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(chat_ids(tokenizer, "hello", "so")) == "hello\nso"
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<reply>"
    assert tokenizer.decode(chat_ids(tokenizer, "hello", "so")) == "<user>hello<reply>so"
    assert tokenizer.decode(chat_ids(tokenizer, "hello", use_template=False)) == "hello"


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


def test_sentences_of_a_text_go_round_from_where_the_seed_says():
    text = "One is\nfirst. Two follows! Is three? Four"
    found = list(islice(file_sentences(text, 0), 8))
    assert set(found) == {"One is first.", "Two follows!", "Is three?", "Four"}
    assert found[:4] == found[4:]
    assert len({next(file_sentences(text, seed)) for seed in range(20)}) > 1
    with pytest.raises(ValueError, match="haystack"):
        next(file_sentences(" ", 0))


def test_standard_library_gives_a_long_text_that_repeats():
    text = stdlib_text()
    assert len(text.content) > 500_000
    assert text.sha256 == stdlib_text().sha256
    assert len(text.sha256) == 64


@pytest.mark.parametrize(("available", "size", "count"), [(100, 10, 1), (100, 10, 2), (100, 10, 10), (101, 25, 4), (7, 7, 1)])
def test_windows_reach_from_the_first_token_to_the_last_and_do_not_overlap(available, size, count):
    starts = window_starts(available, size, count)
    assert len(starts) == count
    assert starts[0] == 0
    assert count == 1 or starts[-1] + size == available
    assert all(later - earlier >= size for earlier, later in pairwise(starts))


def test_every_window_opens_as_the_tokenizer_opens_a_text(tokenizer):
    class Opening:
        bos_token_id = 0

        def __call__(self, text, add_special_tokens=True):
            ids = tokenizer(text).input_ids
            return type("Ids", (), {"input_ids": [0, *ids] if add_special_tokens else ids})

    plain = TokenizedText(tokenizer, Text("letters", "abcdefghij"))
    assert (tokenizer.decode(plain.window(3, 4)), plain.starts(5, 2)) == ("defg", [0, 5])
    text = TokenizedText(Opening(), Text("letters", "abcdefghij"))
    first, *window = text.window(2, 5)
    assert (first, tokenizer.decode(window)) == (0, "cdef")
    assert text.starts(6, 2) == [0, 5]


def test_a_module_without_a_source_file_is_refused(monkeypatch):
    monkeypatch.setattr(texts, "STDLIB_MODULES", ("sys_no_such_module",))
    with pytest.raises(UnsupportedError, match="sys_no_such_module; give a text of your own"):
        stdlib_text()
