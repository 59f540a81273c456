"""Texts to predict: files, or source code that every machine has; and windows of tokens cut from them."""

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stem_attention.errors import UnsupportedError, bad_argument
from stem_attention.models.load import Tokenizer

# Long modules that have stayed single files since Python 3.10.
STDLIB_MODULES = ("argparse", "difflib", "inspect", "optparse", "pdb", "tarfile", "turtle", "typing")


@dataclass(frozen=True)
class Text:
    """A text and what it is called."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Digest of the content in UTF-8."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def stdlib_text() -> Text:
    """Join some long modules of the running interpreter's standard library: source code that every machine has."""
    files = []
    for name in STDLIB_MODULES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise UnsupportedError(f"this Python has no source file of its module {name}; give a text of your own")
        files.append(Path(spec.origin).read_text(encoding="utf-8"))
    return Text("stdlib", "\n".join(files))


def window_starts(available: int, size: int, count: int) -> list[int]:
    """Place ``count`` windows of ``size`` tokens, spread from the first token to the last without overlap; their starts."""
    if size * count > available:
        fix = "give a longer text or ask for fewer tokens or windows"
        raise bad_argument("text", f"at least {size * count} tokens for {count} windows of {size}", available, fix)
    last = available - size
    return [round(index * last / max(1, count - 1)) for index in range(count)]


class TokenizedText:
    """A text as tokens, made once and cut into windows of any length."""

    def __init__(self, tokenizer: Tokenizer, text: Text) -> None:
        self.text = text
        self._ids: list[int] = list(tokenizer(text.content, add_special_tokens=False).input_ids)
        # What the tokenizer puts before every text, if anything; models that expect it read badly without.
        opening = list(tokenizer("a").input_ids)[:1]
        self._opening = opening if opening == [tokenizer.bos_token_id] else []

    def starts(self, tokens: int, count: int) -> list[int]:
        """Place ``count`` windows of ``tokens`` tokens; their starts. ValueError where the text is too short for them."""
        return window_starts(len(self._ids), tokens - len(self._opening), count)

    def window(self, start: int, tokens: int) -> list[int]:
        """Cut ``tokens`` tokens from ``start`` on, behind the tokenizer's opening token."""
        return [*self._opening, *self._ids[start : start + tokens - len(self._opening)]]


def tokenized(tokenizer: Tokenizer, texts: Sequence[Text]) -> dict[str, TokenizedText]:
    """Tokenize texts, by name; ValueError where two share one."""
    named = {text.name: TokenizedText(tokenizer, text) for text in texts}
    if len(named) < len(texts):
        raise bad_argument("text", "files of different names", "the same name twice", "rename one")
    return named
