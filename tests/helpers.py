"""What the tests of both ops share: the backends, the error measure, poisoned memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from attbalance_ext.kernels import choose

# The backends that run on any machine, "cuda" on the emulated device (see conftest.py). A library that was not built is
# a failure of the tests, not a reason to skip.
BACKENDS = ("reference", "cpu", "cuda")
NATIVE = ("cpu", "cuda")
DOUBLE = ("reference", "cpu")  # those that take float64
needs_triton = pytest.mark.skipif("cpu" not in choose.BACKENDS["triton"].devices, reason="Triton is not interpreted")

# What a relative error may be. Low precision holds for gradients only: terms are always float32 or float64.
BOUND = {torch.float32: 2e-5, torch.float64: 1e-9, torch.bfloat16: 4e-3, torch.float16: 1e-3}

# Of a result's natural size (what its sum would be without cancellation): what rounding of the scores, which are up to
# 50, leaves behind when the sum itself cancels.
FLOOR = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-6, torch.float16: 2e-6}


def excess(
    actual: Tensor, truth: Tensor, natural: Tensor, noise: Tensor | float = 0, dims: tuple[int, ...] = ()
) -> float:
    """The largest error as a multiple of what is allowed for the dtype of ``actual``; at most 1 passes.

    The norm runs over ``dims`` (none: every element by itself); ``natural`` and ``noise``, the error of the truth
    itself, have the remaining shape. NaN where the truth has none, or the other way round, is infinitely wrong.
    """
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if not truth.numel():
        return 0.0
    actual, dtype = actual.double(), actual.dtype
    if not torch.equal(actual.isnan(), truth.isnan()):
        return float("inf")
    error, size = (actual - truth).nan_to_num(0, float("inf"), float("inf")), truth.nan_to_num()
    if dims:
        error, size = error.norm(dim=dims), size.norm(dim=dims)
    # Below its normal numbers a format has absolute precision only; float16 gradients get there.
    spacing = torch.finfo(dtype).tiny * torch.finfo(dtype).eps * math.sqrt(truth.numel() / error.numel())
    allowed = BOUND[dtype] * size.abs() + FLOOR[dtype] * natural.nan_to_num() + noise + spacing
    ratio = torch.where(error == 0, 0, error.abs() / allowed)
    return ratio.max().item()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN until they are written, so that an output that a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with this many intra-op threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, dtype and every bit, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
