"""From sentences to numbers: words of a vocabulary, or any Hugging Face tokenizer. Both fit into a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.hub import address

from .vocabulary import PAD, UNKNOWN, Vocabulary

if TYPE_CHECKING:
    import tokenizers

_INSTALL = "Hugging Face tokenizers need transformers: pip install 'attbalance_ext[transformers]'"


class Tokenizer(Protocol):
    """Numbers for sentences."""

    def __len__(self) -> int:
        """How many numbers there are: the size of an embedding."""

    def encode(self, sentences: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        """Number B sentences.

        Returns ids (B, T) int64 and padding (B, T) bool, True = ignore. T is that of the longest sentence, at least 1
        and at most ``max_length``: longer sentences lose their end, but not a last special token.
        """

    def state(self) -> dict[str, Any]:
        """Plain types from which ``tokenizer_from_state`` makes the same tokenizer."""


class WordTokenizer:
    """Whole words of a vocabulary.

    ``special_tokens``: every sentence stands between [CLS] and [SEP], as BERT reads it. They have the two numbers
    behind the vocabulary's.
    """

    def __init__(self, vocabulary: Vocabulary, *, special_tokens: bool = False) -> None:
        self.vocabulary = vocabulary
        self.special_tokens = special_tokens

    def __len__(self) -> int:
        return len(self.vocabulary) + (2 if self.special_tokens else 0)

    def encode(self, sentences: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        first, last = len(self.vocabulary), len(self.vocabulary) + 1
        room = _room(max_length, 2 if self.special_tokens else 0)
        rows = [self.vocabulary.numbers(sentence)[:room] for sentence in sentences]
        if self.special_tokens:
            rows = [[first, *row, last] for row in rows]
        return _padded(rows, PAD, UNKNOWN)

    def state(self) -> dict[str, Any]:
        return {"kind": "words", "words": self.vocabulary.words, "special_tokens": self.special_tokens}


class HuggingFaceTokenizer:
    """A fast tokenizer of the ``tokenizers`` library, with its own special tokens.

    Its state is the text of its ``tokenizer.json``, so a run needs no other file, and reading it runs no code.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, pad: int) -> None:
        """``pad``: the number that fills rows up."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.pad = pad
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, name: str) -> HuggingFaceTokenizer:
        """Load by folder, hub id or ``id@revision``, without running any code that lies there.

        Raises:
            UserError: transformers is missing, there is no such tokenizer, or it has no fast version.
        """
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise UserError(_INSTALL) from None
        try:
            source, revision = address(str(name))
            loaded = AutoTokenizer.from_pretrained(source, revision=revision, use_fast=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"tokenizer {str(name)!r} cannot be loaded: {reason[0]}") from None
        if not loaded.is_fast:
            raise UserError(f"tokenizer {str(name)!r} has no fast version (tokenizer.json)")
        text = loaded.backend_tokenizer.to_str()
        return cls._from_text(text, loaded.pad_token_id or 0)

    @classmethod
    def _from_text(cls, text: str, pad: int) -> HuggingFaceTokenizer:
        try:
            import tokenizers
        except ImportError:
            raise UserError(_INSTALL) from None
        try:
            return cls(tokenizers.Tokenizer.from_str(text), pad)
        except Exception as error:  # the library raises nothing more special
            raise UserError(f"the tokenizer in the checkpoint cannot be read: {error}") from None

    def __len__(self) -> int:
        return max(*self._tokenizer.get_vocab(with_added_tokens=True).values(), self.pad) + 1

    def encode(self, sentences: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        _room(max_length, self._tokenizer.num_special_tokens_to_add(is_pair=False))
        self._tokenizer.enable_truncation(max_length)
        # One by one: batches would start threads, which do not survive a data loader's fork.
        rows = [self._tokenizer.encode(sentence).ids for sentence in sentences]
        self._tokenizer.no_truncation()
        return _padded(rows, self.pad, self.pad)

    def state(self) -> dict[str, Any]:
        return {"kind": "huggingface", "tokenizer": self._tokenizer.to_str(), "pad": self.pad}


def tokenizer_from_state(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer whose ``state`` this is; a ``UserError`` where it is none."""
    match state:
        case {"kind": "words", "words": list(words), "special_tokens": bool(special)}:
            return WordTokenizer(Vocabulary(words), special_tokens=special)
        case {"kind": "huggingface", "tokenizer": str(text), "pad": int(pad)}:
            return HuggingFaceTokenizer._from_text(text, pad)
    raise UserError("the checkpoint's tokenizer is of no kind that this version knows (words, huggingface)")


def _room(max_length: int, special: int) -> int:
    """How many words fit beside the special tokens."""
    if max_length < max(special, 1):
        raise UserError(f"max_length is {max_length}; with special tokens it must be at least {max(special, 1)}")
    return max_length - special


def _padded(rows: Sequence[Sequence[int]], pad: int, nothing: int) -> tuple[Tensor, Tensor]:
    """Rows filled up with ``pad``. A row of nothing is one ``nothing``, which is no padding: some token is needed to
    attend to."""
    rows = [row or [nothing] for row in rows]
    length = max([1, *map(len, rows)])
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    padding = torch.ones(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        padding[i, : len(row)] = False
    return ids, padding
