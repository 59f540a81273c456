"""Texts: what they are called, and the windows cut from them."""

from itertools import pairwise

import pytest

from stem_attention.errors import UnsupportedError
from stem_attention.models import texts
from stem_attention.models.texts import Text, TokenizedText, stdlib_text, window_starts


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


def test_text_too_short_for_its_windows_is_refused():
    with pytest.raises(ValueError, match="text: expected at least 30 tokens for 3 windows of 10, got 29"):
        window_starts(29, 10, 3)


def test_every_window_opens_as_the_tokenizer_opens_a_text(tokenizer):
    class Opening:
        bos_token_id = 0

        def __call__(self, text: str, add_special_tokens: bool = True):
            ids = tokenizer(text).input_ids
            return type("Ids", (), {"input_ids": [0, *ids] if add_special_tokens else ids})

    plain = TokenizedText(tokenizer, Text("letters", "abcdefghij"))
    assert (tokenizer.decode(plain.window(3, 4)), plain.starts(5, 2)) == ("defg", [0, 5])
    text = TokenizedText(Opening(), Text("letters", "abcdefghij"))
    window = text.window(2, 5)
    assert window[0] == 0
    assert tokenizer.decode(window[1:]) == "cdef"
    assert text.starts(6, 2) == [0, 5]


def test_a_module_without_a_source_file_is_refused(monkeypatch):
    monkeypatch.setattr(texts, "STDLIB_MODULES", ("sys_no_such_module",))
    with pytest.raises(UnsupportedError, match="sys_no_such_module; give a text of your own"):
        stdlib_text()
