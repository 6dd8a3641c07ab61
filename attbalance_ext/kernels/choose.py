"""Which backend runs a call, and why the others do not."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from attbalance_ext.errors import BackendUnavailable
from attbalance_ext.kernels import ops
from attbalance_ext.kernels.problem import Problem


class Backend(NamedTuple):
    """What one backend can run."""

    devices: tuple[str, ...]  # device types of the tensors; empty: every one
    dtypes: tuple[torch.dtype, ...]  # of the arithmetic, not of the keys' storage
    problems: Callable[[], list[Problem]]  # why it cannot run in this process; [] when it can


_FLOAT32, _FLOAT32_64 = (torch.float32,), (torch.float32, torch.float64)
BACKENDS = {
    "reference": Backend((), _FLOAT32_64, list),
    "cpu": Backend(("cpu",), _FLOAT32_64, ops.cpu_library_problems),
    "triton": Backend(("cpu", "cuda") if ops.TRITON_IS_INTERPRETED else ("cuda",), _FLOAT32, ops.triton_problems),
    "cuda": Backend(("cuda",), _FLOAT32, ops.cuda_library_problems),
}
_FASTEST_FIRST = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
ENVIRONMENT = "ATTBALANCE_BACKEND"

_log = logging.getLogger("attbalance_ext")
_logged: set[str] = set()


def available_backends() -> dict[str, list[str]]:
    """Every backend's name with the reasons why it cannot run here, and remedies; an empty list means that it can.

    >>> available_backends()["reference"]
    []
    """
    return {name: [str(problem) for problem in backend.problems()] for name, backend in BACKENDS.items()}


def check_name(backend: str) -> None:
    """Raise ``ValueError`` unless ``backend`` is "auto" or a backend's name."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")


@torch.compiler.assume_constant_result
def choose(backend: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend that runs a call on tensors of this device type, with arithmetic in ``dtype``.

    "auto" means ``ATTBALANCE_BACKEND`` where that is set, else the fastest that can run here (a fall back is logged
    once).

    Raises:
        ValueError: unknown name. BackendUnavailable: an explicit choice that cannot run, with the reasons.
    """
    check_name(backend)
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT, "auto")
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"{ENVIRONMENT} must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    if backend != "auto":
        reasons = _why_not(backend, device_type, dtype)
        if reasons:
            raise BackendUnavailable(f"backend {backend!r} cannot run here: {'; '.join(reasons)}")
        return backend
    skipped: list[str] = []
    for candidate in _FASTEST_FIRST.get(device_type, ("reference",)):
        reasons = _why_not(candidate, device_type, dtype)
        if not reasons:
            if skipped:
                _log_once(f"using backend {candidate!r} for {device_type} tensors: {'; '.join(skipped)}")
            return candidate
        skipped.append(f"{candidate!r} cannot run ({'; '.join(reasons)})")
    raise AssertionError("the reference backend runs everywhere")


def preferred(device_type: str) -> str:
    """What "auto" takes for float32 tensors on this device type where ``ATTBALANCE_BACKEND`` is not set."""
    candidates = _FASTEST_FIRST.get(device_type, ("reference",))
    return next(name for name in candidates if not _why_not(name, device_type, torch.float32))


def _why_not(name: str, device_type: str, dtype: torch.dtype) -> list[str]:
    backend = BACKENDS[name]
    reasons = [str(problem) for problem in backend.problems()]
    if backend.devices and device_type not in backend.devices:
        reasons.append(f"the tensors are on {device_type}")
    if dtype not in backend.dtypes:
        able = [other for other in BACKENDS if dtype in BACKENDS[other].dtypes]
        reasons.append(f"{str(dtype).removeprefix('torch.')} runs on backends {' and '.join(able)}")
    return reasons


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        _log.warning(message)
