"""Runs one case of a suite: gate, memory, interleaved timing, rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from attbalance_ext import BackendUnavailable
from benchmarks import cuda, gate
from benchmarks.environment import environment
from benchmarks.floor import Floor
from benchmarks.memory import kept_bytes
from benchmarks.results import Row
from benchmarks.task import MODES, Bytes, Case, Provider, Suite, Task
from benchmarks.timing import Clock, Contender, CpuClock, interleave

FLOOR, FRESH_FLOOR = "floor", "floor-fresh"
_FLOOR_TITLES = {
    FLOOR: "moving the bytes alone",
    FRESH_FLOOR: "moving the bytes alone, gradients in fresh memory",
}


def run_case(
    suite: Suite,
    case: Case,
    providers: Iterable[Provider],
    *,
    run: str,
    modes: Sequence[str] = MODES,
    rounds: int = 50,
    clock: Clock | None = None,
    allocator: str = "system",
    device: torch.device | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> list[Row]:
    """Check, measure and time every provider on one case; rows in the order of `providers`, the floors last.

    A provider that the gate rejects, or that cannot run here, gets rows that say so and no time.
    """
    clock = clock or CpuClock()
    device = device or torch.device("cpu")
    inputs = suite.inputs(case, device)
    gradients = suite.gradients(inputs)
    truth = suite.truth(inputs)
    size = suite.bytes(case)
    on_gpu = device.type == "cuda"
    floor = None if on_gpu else Floor(*suite.floor(inputs), clock)
    bandwidth = cuda.copy_bandwidth() if on_gpu else 0

    entrants: list[tuple[Provider, Task | None, str, float | None, int | None]] = []
    for provider in providers:
        say(f"checking {provider.name}")
        try:
            task = provider.task(suite.name, inputs)
        except BackendUnavailable as reason:
            entrants.append((provider, None, f"unavailable: {reason}", None, None))
            continue
        if task is None:
            continue
        verdict = gate.check(task, truth, gradients, suite.tolerance(case))
        if verdict.passed:
            kept = kept_bytes(task) if "forward" in task.modes else None  # a replayed pass keeps nothing anew
            entrants.append((provider, task, "ok", verdict.error, kept))
        else:
            entrants.append((provider, None, f"failed: {verdict}", verdict.error, None))

    contenders: dict[str, Contender] = {}
    for mode in modes:
        contenders |= {
            _key(provider.name, mode): _contender(task, mode, gradients)
            for provider, task, *_ in entrants
            if task is not None and mode in task.modes
        }
        if floor is not None:
            contenders[_key(FLOOR, mode)] = _floor_contender(floor.read, floor.write, mode)
            contenders[_key(FRESH_FLOOR, mode)] = _floor_contender(floor.read, floor.write_fresh, mode)
    say("timing")
    timings = interleave(contenders, clock, rounds=rounds)

    where = environment(device, clock.cache, allocator)

    def row(name: str, title: str, mode: str, status: str, error: float | None, kept: int | None, **gpu: Any) -> Row:
        moved, formula = _moved(size, mode)
        return Row(
            run=run,
            suite=suite.name,
            case=case.describe(),
            provider=name,
            title=title,
            mode=mode,
            status=status,
            error=error,
            timing=timings.get(_key(name, mode)),
            floor=1e3 * moved / bandwidth if on_gpu else timings[_key(FLOOR, mode)].median,
            bytes=moved,
            formula=formula,
            kept=kept,
            environment=where,
            **gpu,
        )

    def gpu_columns(task: Task | None, mode: str) -> dict[str, Any]:
        if task is None or not on_gpu:
            return {}
        contender = _contender(task, mode, gradients)
        return {
            "peak": cuda.peak_bytes(task, gradients) if "forward" in task.modes else None,
            "launches": cuda.launches(contender()),
            "host": cuda.host_milliseconds(contender),
        }

    return [
        *(
            row(provider.name, provider.title, mode, status, error, kept, **gpu_columns(task, mode))
            for provider, task, status, error, kept in entrants
            for mode in modes
            if task is None or mode in task.modes
        ),
        *(
            row(name, title, mode, "ok", None, None)
            for name, title in _FLOOR_TITLES.items()
            for mode in modes
            if floor is not None
        ),
    ]


def _key(name: str, mode: str) -> str:
    return f"{name} {mode}"


def _contender(task: Task, mode: str, gradients: Sequence[Tensor]) -> Contender:
    def both() -> object:
        return task.backward(task.forward(), gradients)

    def backward() -> Callable[[], object]:
        outputs = task.forward()  # a fresh graph for every sample: freeing it is part of a backward pass
        return lambda: task.backward(outputs, gradients)

    if mode == "backward":
        return backward
    return (lambda: task.forward) if mode == "forward" else (lambda: both)


def _floor_contender(read: Callable[[], Any], write: Callable[[], Any], mode: str) -> Contender:
    def both() -> object:
        read()
        return write()

    moves: dict[str, Callable[[], object]] = {"forward": read, "backward": write, "both": both}
    return lambda: moves[mode]


def _moved(size: Bytes, mode: str) -> tuple[int, str]:
    return {
        "forward": (size.read, size.read_formula),
        "backward": (size.write, size.write_formula),
        "both": (size.read + size.write, f"{size.read_formula}; {size.write_formula}"),
    }[mode]
