"""What tests under `torch.compile` share: a compiler without a past, and what it did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._dynamo.utils import counters


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before counts inside, and nothing compiled inside stays."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """How many forward graphs were compiled, none of them broken."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def assert_same_curve(actual: list[float], expected: list[float], bound: float = 1e-5) -> None:
    """Equal losses step by step, of a run that trains."""
    assert len(set(expected)) == len(expected)
    assert actual == pytest.approx(expected, rel=bound)
