"""Texts to predict: files, or source code that every machine has; and windows of tokens cut from them."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from stem_attention.errors import UnsupportedError, bad_argument
from stem_attention.evaluation.measure import Case

STDLIB_MODULES = ("argparse", "difflib", "inspect", "optparse", "pdb", "tarfile", "turtle", "typing")
"""Long modules that have stayed single files since Python 3.10."""


@dataclass(frozen=True)
class Text:
    """A text and what it is called."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Of the content in UTF-8."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def stdlib_text() -> Text:
    """Python source: some long modules of the running interpreter's standard library, joined."""
    return Text("stdlib", "\n".join(_module_file(name).read_text(encoding="utf-8") for name in STDLIB_MODULES))


def _module_file(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UnsupportedError(f"this Python has no source file of its module {name}; give a text of your own")
    return Path(spec.origin)


def window_starts(available: int, size: int, count: int) -> list[int]:
    """Where ``count`` windows of ``size`` tokens start, spread from the first token to the last without overlap.

    Raises:
        ValueError: They do not fit into ``available`` tokens.
    """
    if size * count > available:
        fix = "give a longer text or ask for fewer tokens or windows"
        raise bad_argument("text", f"at least {size * count} tokens for {count} windows of {size}", available, fix)
    last = available - size
    return [round(index * last / max(1, count - 1)) for index in range(count)]


class TokenizedText:
    """A text as tokens, made once and cut into windows of any length."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: Text) -> None:
        self.text = text
        self._ids: list[int] = list(tokenizer(text.content, add_special_tokens=False).input_ids)
        # What the tokenizer puts before every text, if anything; models that expect it read badly without.
        opening = list(tokenizer("a").input_ids)[:1]
        self._opening = opening if opening == [tokenizer.bos_token_id] else []

    def starts(self, tokens: int, count: int) -> list[int]:
        """Where ``count`` windows of ``tokens`` tokens start.

        Raises:
            ValueError: The text is too short for them.
        """
        return window_starts(len(self._ids), tokens - len(self._opening), count)

    def window(self, start: int, tokens: int) -> list[int]:
        """``tokens`` tokens from ``start`` on, behind the tokenizer's opening token."""
        return [*self._opening, *self._ids[start : start + tokens - len(self._opening)]]


def tokenized(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text]) -> dict[str, TokenizedText]:
    """Texts by name.

    Raises:
        ValueError: Two share a name.
    """
    named = {text.name: TokenizedText(tokenizer, text) for text in texts}
    if len(named) < len(texts):
        raise bad_argument("text", "files of different names", "the same name twice", "rename one")
    return named


def window_cases(texts: dict[str, TokenizedText], lengths: Sequence[int], windows: int, prefills: int = 1) -> list[Case]:
    """A case for each of the ``windows`` windows of every length and text.

    Raises:
        ValueError: A text is too short.
    """
    return [
        Case(f"{name}-{tokens}-{start}", tokens, {"text": name, "start": start}, prefills)
        for tokens in lengths
        for name, text in texts.items()
        for start in text.starts(tokens, windows)
    ]
