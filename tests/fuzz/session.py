"""One long run: draw, judge, shrink and save what fails, remember how far it got."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

from helpers import poisoned_memory

from tests.emulation import emulated_cuda
from tests.fuzz.kinds import BACKENDS, KINDS, draw, judge
from tests.fuzz.shrink import shrink
from tests.fuzz.space import Case

CORPUS = Path(__file__).parent / "corpus"
STATES = Path(__file__).parents[2] / "build" / "fuzz"
_SAVE_EVERY, _SAY_EVERY = 2.0, 15.0  # seconds


@dataclass
class State:
    """How far a run got. faults: how often each was seen, by what it is without its numbers."""

    backend: str
    seed: int
    done: int = 0
    seconds: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(".new")
        written.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(written, path)

    def __str__(self) -> str:
        rate = self.done / self.seconds if self.seconds else 0.0
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        return (
            f"{self.backend} and reference, seed {self.seed}: {self.done} cases ({kinds}), {rate:.0f} a second, "
            f"{sum(self.faults.values())} faults of {len(self.faults)} kinds"
        )


def state_path(backend: str, seed: int, states: Path = STATES) -> Path:
    return states / f"{backend}-{seed}.json"


def load(backend: str, seed: int, states: Path = STATES) -> State:
    """The state that was saved last, or a new one."""
    path = state_path(backend, seed, states)
    return State(**json.loads(path.read_text())) if path.exists() else State(backend, seed)


def device(backend: str) -> AbstractContextManager[object]:
    return emulated_cuda() if backend == "emulated-cuda" else nullcontext()


def run(
    state: State,
    *,
    cases: int | None = None,
    seconds: float | None = None,
    states: Path = STATES,
    corpus: Path = CORPUS,
    say: Callable[[str], None] = print,
) -> State:
    """Go on until `cases` are done in all, or `seconds` are over in this call.

    The first case of a new fault is shrunk and saved. Beside the state lies the number of the running case: where it is
    still there at the next start, the process was ended in that case.
    """
    backend = BACKENDS[state.backend]
    checked = ["reference", backend.name]
    path = state_path(state.backend, state.seed, states)
    state.save(path)
    running = path.with_suffix(".running")
    if running.exists():
        say(f"the last process was ended in case {running.read_text()}: --only {running.read_text()} runs it alone")
    start = last_saved = last_said = time.monotonic()
    before = state.seconds
    with device(state.backend), poisoned_memory(), running.open("w") as number_file:
        while cases is None or state.done < cases:
            now = time.monotonic()
            state.seconds = before + now - start
            if seconds is not None and now - start >= seconds:
                break
            if now - last_saved > _SAVE_EVERY:
                last_saved = now
                state.save(path)
            if now - last_said > _SAY_EVERY:
                last_said = now
                say(str(state))
            os.pwrite(number_file.fileno(), f"{state.done}".encode(), 0)
            kind, case = draw(state.seed, state.done, backend)
            wrong = judge(kind, case, checked)
            if wrong:
                _note(state, kind, case, wrong, checked, corpus, say)
            state.done += 1
            state.kinds[kind] = state.kinds.get(kind, 0) + 1
    running.unlink()
    state.seconds = before + time.monotonic() - start
    state.save(path)
    return state


def _note(
    state: State,
    kind: str,
    case: Case,
    wrong: list[str],
    checked: list[str],
    corpus: Path,
    say: Callable[[str], None],
) -> None:
    """Count the faults. Where none of them is known, shrink and save: one bug shows in many ways."""
    faults = sorted({signature(kind, fault) for fault in wrong})
    new = not any(fault in state.faults for fault in faults)
    for fault in faults:
        state.faults[fault] = state.faults.get(fault, 0) + 1
    if not new:
        return

    def fails(simpler: Case) -> bool:
        return faults[0] in {signature(kind, fault) for fault in judge(kind, simpler, checked)}

    smallest = shrink(case, KINDS[kind].space, fails)
    saved = save_case(corpus, kind, smallest, judge(kind, smallest, checked))
    say(f"case {state.done}: {faults[0]}; saved as {saved}")


def signature(kind: str, fault: str) -> str:
    """What a fault is, without its numbers."""
    return f"{kind} {re.sub(r'[0-9][0-9.e+, -]*', '#', fault)}"[:160]


def save_case(corpus: Path, kind: str, case: Case, found: list[str]) -> Path:
    """As a file that the tests replay on every backend."""
    corpus.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(json.dumps(case, sort_keys=True).encode()).hexdigest()[:10]
    path = corpus / f"{kind}-{name}.json"
    path.write_text(json.dumps({"kind": kind, "found": found, "case": case}, indent=1) + "\n")
    return path
