"""Runs one case of a suite: gate, memory, interleaved timing, rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attbalance_ext import BackendUnavailable
from benchmarks import cuda, gate
from benchmarks.environment import environment
from benchmarks.floor import Floor
from benchmarks.memory import peak_bytes
from benchmarks.results import Row
from benchmarks.task import Case, Provider, Results, Suite, Task
from benchmarks.timing import Clock, Contender, CpuClock, interleave

FLOOR, FRESH_FLOOR = "floor", "floor-fresh"
_FLOOR_TITLES = {
    FLOOR: "moving the bytes alone",
    FRESH_FLOOR: "moving the bytes alone, gradients in fresh memory",
}


@dataclass(frozen=True)
class _Entrant:
    """A provider after the gate. task: None where it is not to be timed, for the reason in ``status``."""

    provider: Provider
    task: Task | None
    status: str
    error: float | None = None


def run_case(
    suite: Suite,
    case: Case,
    providers: Iterable[Provider],
    *,
    run: str,
    modes: Sequence[str] | None = None,
    rounds: int | None = None,
    clock: Clock | None = None,
    allocator: str = "system",
    device: torch.device | None = None,
    bandwidth: float | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> list[Row]:
    """Check, measure and time every provider on one case; rows in the order of `providers`, the floors last.

    A provider that the gate rejects, or that cannot run here, gets rows that say so and no time.
    """
    clock = clock or CpuClock()
    device = device or torch.device("cpu")
    modes = modes or suite.modes
    on_gpu = device.type == "cuda"
    torch.compiler.reset()  # a new shape would be compiled as a dynamic one; each case gets its own static compilation
    say("making inputs")
    inputs = suite.inputs(case, device)
    say("computing the truth")
    truth = suite.truth(inputs)
    size = suite.bytes(case)

    entrants = []
    for provider in providers:
        say(f"checking {provider.name}")
        entrant = _admit(provider, inputs, truth, suite.tolerance(case))
        if entrant is not None:
            entrants.append(entrant)
    memory = {}
    for entrant in entrants:  # after the last check: a step changes the weights that are checked
        say(f"memory of {entrant.provider.name}")
        memory[entrant.provider.name] = _memory(entrant.task, device)

    contenders: dict[str, Contender] = {}
    moved = None if on_gpu else suite.floor(inputs)
    floor = None if moved is None else Floor(*moved, clock)
    for mode in modes:
        contenders |= {
            _key(entrant.provider.name, mode): entrant.task.calls[mode]
            for entrant in entrants
            if entrant.task is not None and mode in entrant.task.calls
        }
        if floor is not None:
            contenders[_key(FLOOR, mode)] = _floor_contender(floor, floor.write, mode)
            contenders[_key(FRESH_FLOOR, mode)] = _floor_contender(floor, floor.write_fresh, mode)
    timings = interleave(contenders, clock, rounds=rounds or suite.rounds, warmup=suite.warmup, say=say)

    where = environment(device, clock, allocator)

    def row(name: str, title: str, mode: str, status: str, **more: Any) -> Row:
        count, formula = (None, "") if size is None else size.moved(mode)
        least = timings[_key(FLOOR, mode)].median if floor is not None else None
        if on_gpu and count is not None and bandwidth is not None:
            least = 1e3 * count / bandwidth
        return Row(
            run=run,
            suite=suite.name,
            case=case.describe(),
            provider=name,
            title=title,
            mode=mode,
            status=status,
            timing=timings.get(_key(name, mode)),
            floor=least,
            bytes=count,
            formula=formula,
            environment=where,
            bandwidth=bandwidth,
            **more,
        )

    return [
        *(
            row(
                entrant.provider.name,
                entrant.provider.title,
                mode,
                entrant.status,
                error=entrant.error,
                part=entrant.provider.part,
                **memory[entrant.provider.name],
                **(_gpu_columns(entrant.task.calls[mode]) if on_gpu and entrant.task is not None else {}),
            )
            for entrant in entrants
            for mode in modes
            if entrant.task is None or mode in entrant.task.calls
        ),
        *(
            row(name, title, mode, "ok", error=None, kept=None)
            for name, title in _FLOOR_TITLES.items()
            for mode in modes
            if floor is not None
        ),
    ]


def _admit(provider: Provider, inputs: Any, truth: Any, tolerance: float) -> _Entrant | None:
    """The provider's task, if it has one that agrees with the truth of its objective; None: no part in this case."""
    try:
        task = provider.task(inputs)
        if task is None:
            return None
        results: Results = task.results()
    except (BackendUnavailable, ModuleNotFoundError) as reason:
        return _Entrant(provider, None, f"unavailable: {reason}")
    verdict = gate.check(results, truth[provider.objective], provider.slack * tolerance)
    if not verdict.passed:
        return _Entrant(provider, None, f"failed: {verdict}", verdict.error)
    return _Entrant(provider, task, "ok", verdict.error)


def _memory(task: Task | None, device: torch.device) -> dict[str, int | None]:
    """Bytes kept between forward and backward pass, and bytes at the peak of both."""
    if task is None:
        return {"kept": None, "peak": None}
    whole = task.calls.get("both") or task.calls.get("step")
    peak = None
    if whole is not None and task.allocates:
        whole()()  # what a first call leaves behind (an optimizer's state) is not what a call needs
        peak = peak_bytes(whole(), device)
    return {"kept": None if task.kept is None else task.kept(), "peak": peak}


def _gpu_columns(contender: Contender) -> dict[str, Any]:
    return {"launches": cuda.launches(contender()), "host": cuda.host_milliseconds(contender)}


def _key(name: str, mode: str) -> str:
    return f"{name} {mode}"


def _floor_contender(floor: Floor, write: Callable[[], Any], mode: str) -> Contender:
    def both() -> object:
        floor.read()
        return write()

    moves: dict[str, Callable[[], object]] = {"forward": floor.read, "backward": write, "both": both}
    return lambda: moves[mode]
