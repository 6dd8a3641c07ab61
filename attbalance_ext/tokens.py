"""Which tokens of a sequence are meant: one of them, a slice, or an index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, TypeGuard

import torch
from torch import Tensor

SeveralTokens: TypeAlias = slice | Sequence[int] | Tensor
"""A slice, a sequence of ints, an int64 tensor (N,), or a bool mask over all tokens (S,)."""


class Tokens:
    """One token of a sequence (an int), or several: a slice, ints, an int64 tensor, or a bool mask over all of them.

    An int, a slice, and an index that a slice can say are read as views. Any other index copies the tokens; it is kept
    on every device that it was used on, so the host never waits for it.

    Args:
        name: the argument's name, for messages.
        given: what is meant; negative numbers count from the end.
        one: whether an int is allowed.

    Raises:
        TypeError: ``given`` is none of these.
        ValueError: an index that names no token, or a token twice.
    """

    def __init__(self, name: str, given: int | SeveralTokens, *, one: bool = False) -> None:
        self.name = name
        self.several = not (one and isinstance(given, int) and not isinstance(given, bool))
        self._length: int | None = None  # of the sequence that a mask is made for
        self._numbers: tuple[int, ...] = ()  # those of an int or an index
        self._view: int | slice | None = None
        self._indices: dict[torch.device, Tensor] = {}
        if isinstance(given, slice):
            self._view = given
            return
        if isinstance(given, int) and not self.several:
            self._numbers, self._view = (given,), given
            return
        if isinstance(given, Tensor) and given.dtype == torch.bool and given.dim() == 1:
            self._length = len(given)
            given = given.nonzero()[:, 0]
        if isinstance(given, Tensor) and given.dtype == torch.int64 and given.dim() == 1:
            given = given.tolist()
        if not _is_ints(given):
            raise TypeError(
                f"{name} must be {'an int, ' * one}a slice, a sequence of ints, an int64 tensor (N,) or a bool one "
                f"(S,), got {_kind(given)}"
            )
        self._numbers = tuple(given)
        if not self._numbers:
            raise ValueError(f"{name} names no token")
        if len(set(self._numbers)) != len(self._numbers):
            raise ValueError(f"{name} names a token twice: {self._numbers}")
        self._view = _as_slice(self._numbers)

    def __repr__(self) -> str:
        return repr(self._numbers if self._view is None else self._view)

    @property
    def is_view(self) -> bool:
        """Whether :meth:`of` is a view, which saves nothing for a backward pass."""
        return self._view is not None

    @property
    def end(self) -> int | None:
        """One past the last token; None where that is counted from the end of the sequence, which may be any."""
        if self._length is not None:
            return self._length
        if self._numbers:
            return None if min(self._numbers) < 0 else max(self._numbers) + 1
        assert isinstance(self._view, slice)
        start, stop = self._view.start or 0, self._view.stop
        return None if stop is None or stop < 0 or start < 0 else stop

    def check(self, tokens: int, kind: str) -> None:
        """Raise ``ValueError`` unless a sequence of so many tokens, of this kind, has the ones that are meant."""
        if self._length is not None and self._length != tokens:
            raise ValueError(f"{self.name} is a mask over {self._length} tokens, the layer has {tokens} {kind} tokens")
        for number in self._numbers:
            if not -tokens <= number < tokens:
                raise ValueError(
                    f"{self.name} must index one of the layer's {tokens} {kind} tokens, got {number}{self._hint()}"
                )
        if len({number % tokens for number in self._numbers}) != len(self._numbers):  # -1 and the last one
            raise ValueError(f"{self.name} names one of the layer's {tokens} {kind} tokens twice: {self._numbers}")

    def _hint(self) -> str:
        if len(self._numbers) == 2 and self._numbers[0] < self._numbers[1]:
            return f"; for the tokens from {self._numbers[0]} on give slice{self._numbers}"
        return ""

    def number(self, tokens: int) -> int:
        """How many of a sequence's tokens are meant."""
        return len(range(tokens)[self._view]) if isinstance(self._view, slice) else len(self._numbers)

    def interval(self, tokens: int) -> tuple[int, int] | None:
        """First token and one past the last, where they are one run; else None."""
        if not isinstance(self._view, slice):
            return None
        start, stop, step = self._view.indices(tokens)
        return (start, stop) if step == 1 and start < stop else None

    def of(self, x: Tensor) -> Tensor:
        """The tokens of ``x`` (B, S, ...): (B, N, ...), or (B, ...) for one."""
        return x.index_select(1, self._index(x)) if self._view is None else x[:, self._view]

    def spread(self, values: Tensor, tokens: int) -> Tensor:
        """The reverse: ``values`` (B, N, ...), or (B, ...) for one, at their tokens of (B, S, ...), zeros elsewhere."""
        shape = (values.shape[0], tokens, *values.shape[1 + self.several :])
        everywhere = values.new_zeros(shape)
        if self._view is None:
            return everywhere.index_copy(1, self._index(everywhere), values)
        everywhere[:, self._view] = values
        return everywhere

    def put_on(self, device: torch.device) -> None:
        """Copy an index there, ahead of its use."""
        if self._view is None and device not in self._indices:
            self._indices[device] = torch.tensor(self._numbers, device=device)

    def _index(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.put_on(x.device)
        index = self._indices.get(x.device)
        if index is None:
            index = torch.tensor(self._numbers, device=x.device)
        return index.remainder(x.shape[1]) if min(self._numbers) < 0 else index


def _is_ints(given: object) -> TypeGuard[Sequence[int]]:
    return (
        isinstance(given, Sequence)
        and not isinstance(given, str)
        and all(isinstance(number, int) and not isinstance(number, bool) for number in given)
    )


def _kind(given: object) -> str:
    if isinstance(given, Tensor):
        return f"a {given.dtype} tensor of shape {tuple(given.shape)}"
    if isinstance(given, Sequence) and not isinstance(given, str):
        return f"{type(given).__name__} of {', '.join(sorted({type(number).__name__ for number in given}))}"
    return type(given).__name__


def _as_slice(numbers: tuple[int, ...]) -> slice | None:
    """The slice that names the same tokens in the same order of a sequence of any length, if there is one."""
    start, step = numbers[0], numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if start < 0 or step < 1 or numbers != tuple(range(start, start + step * len(numbers), step)):
        return None
    return slice(start, numbers[-1] + 1, step)
