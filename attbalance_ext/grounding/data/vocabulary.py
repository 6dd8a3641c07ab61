"""Words and their numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import lexicon

PAD, UNKNOWN = 0, 1


class Vocabulary:
    """Word-level: ``words`` is a plain list to be stored, a word's number its position + 2.

    Number 0 pads, 1 stands for every word that is not in the list.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self._numbers = {word: number for number, word in enumerate(self.words, start=2)}
        if len(self._numbers) != len(self.words):
            raise ValueError("words: some word is listed twice")

    @classmethod
    def builtin(cls) -> Vocabulary:
        """Every word the built-in grammar can say, in any flavour and split."""
        return cls(lexicon.words())

    @classmethod
    def build(cls, sentences: Iterable[str]) -> Vocabulary:
        """The words of ``sentences``, sorted."""
        return cls(sorted({word for sentence in sentences for word in tokenize(sentence)}))

    def __len__(self) -> int:
        """How many numbers there are, padding and unknown included: the size of an embedding."""
        return len(self.words) + 2

    def numbers(self, sentence: str) -> list[int]:
        """The numbers of a sentence's words."""
        return [self._numbers.get(word, UNKNOWN) for word in tokenize(sentence)]

    def encode(self, sentences: Sequence[str], max_length: int | None = None) -> tuple[Tensor, Tensor]:
        """Number the words of B sentences.

        Returns ids (B, T) int64 and padding (B, T) bool, True = ignore. T is the longest sentence's length, at
        least 1, or ``max_length``: longer sentences lose their end.
        """
        rows = [self.numbers(sentence)[:max_length] for sentence in sentences]
        length = max_length or max([1, *map(len, rows)])
        ids = torch.full((len(rows), length), PAD, dtype=torch.int64)
        for row, numbers in zip(ids, rows, strict=True):
            row[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        return ids, ids == PAD

    def decode(self, ids: Iterable[int]) -> str:
        """The words of one row of ids, padding left out."""
        return " ".join("<unk>" if number == UNKNOWN else self.words[number - 2] for number in ids if number != PAD)


def tokenize(sentence: str) -> list[str]:
    """Lower-case words; punctuation at their ends is dropped."""
    words = (word.strip(".,;:!?\"'()") for word in sentence.lower().split())
    return [word for word in words if word]
