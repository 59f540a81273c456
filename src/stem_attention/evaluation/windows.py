"""What measures of windows of texts have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stem_attention.evaluation.measure import Case
from stem_attention.evaluation.texts import Text, tokenized, window_cases


class Windows:
    """Cases that are windows of texts; subclasses say what to measure of one.

    Args:
        model: Loaded by :func:`stem_attention.evaluation.models.load_model`.
        tokenizer: Its tokenizer.
        texts: What to read, no two of the same name.
        lengths: Tokens of a window; all lengths are run.
        windows: Windows of each length and text, spread through the text without overlap.

    Raises:
        ValueError: A text is too short, or two share a name.
    """

    prefills: ClassVar[int] = 1
    """How many a case runs at most."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[Text],
        lengths: Sequence[int],
        windows: int,
    ) -> None:
        self._model = model
        self._texts = tokenized(tokenizer, texts)
        self._cases = window_cases(self._texts, lengths, windows, self.prefills)

    def cases(self) -> Sequence[Case]:
        return self._cases

    def ids(self, case: Case) -> list[int]:
        """The tokens of a case."""
        return self._texts[case.about["text"]].window(case.about["start"], case.tokens)
