"""Describe what measures of windows of texts have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stem_attention.models.load import check_full_attention
from stem_attention.models.texts import Text, tokenized
from stem_evals.measure import Case, Record


class Windows:
    """Cases that are windows of texts; subclasses say what to measure of one.

    Args:
        model: Loaded by :func:`stem_attention.models.load.load_model`.
        tokenizer: Its tokenizer.
        texts: What to read, no two of the same name.
        lengths: Tokens of a window; all lengths are run.
        windows: Windows of each length and text, spread through the text without overlap.

    Raises:
        ValueError: A text is too short, or two share a name.
        UnsupportedError: The measure looks into layers, and some attend to something else than all earlier tokens.
    """

    name: ClassVar[str]
    looks_into_layers: ClassVar[bool] = False
    settings: ClassVar[Record] = {}

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], lengths: Sequence[int],
        windows: int,
    ) -> None:  # fmt: skip
        if self.looks_into_layers:
            check_full_attention(model, self.name, max(lengths))
        self._model = model
        self._texts = tokenized(tokenizer, texts)
        self._cases = [
            Case(f"{name}-{tokens}-{start}", tokens, {"text": name, "start": start})
            for tokens in lengths
            for name, text in self._texts.items()
            for start in text.starts(tokens, windows)
        ]

    def cases(self) -> Sequence[Case]:
        return self._cases

    def ids(self, case: Case) -> list[int]:
        """The tokens of a case."""
        return self._texts[case.about["text"]].window(case.about["start"], case.tokens)
