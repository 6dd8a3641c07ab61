"""Makes the edits one by one and notes which the tests catch."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from .catalogue import Mutation, MutationList, Suite, WrongEntry
from .tree import IMPORTED, BuildFailed, TestRun, Tree

CAUGHT, SURVIVED, STALE, BROKEN = "caught", "SURVIVED", "STALE", "BROKEN"
"""Tests failed; none did; the text is not there (once); tests or build do not work, with the edit or without."""


@dataclass(frozen=True)
class Outcome:
    """What became of one edit."""

    verdict: str
    said: str
    seconds: float
    fingerprint: str


class Results:
    """Outcomes by the edits' names, in a file that is whole at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        plain = json.loads(path.read_text()) if path.exists() else {}
        self.outcomes = {name: Outcome(**outcome) for name, outcome in plain.items()}

    def add(self, name: str, outcome: Outcome) -> None:
        with self._lock:
            self.outcomes[name] = outcome
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.path.with_suffix(".unfinished")
            plain = {known: asdict(self.outcomes[known]) for known in sorted(self.outcomes)}
            unfinished.write_text(json.dumps(plain, indent=1))
            os.replace(unfinished, self.path)

    def forget(self, names: Iterable[str]) -> None:
        for name in names:
            self.outcomes.pop(name, None)

    def holds(self, mutation: Mutation, root: Path) -> bool:
        """Whether the edit was caught, and it, the edited file and the tests are still the same."""
        known = self.outcomes.get(mutation.name)
        if known is None or known.verdict != CAUGHT:
            return False
        return known.fingerprint == mutation.fingerprint(root)


def run(
    lists: Sequence[MutationList],
    *,
    source: Path,
    folder: Path,
    results: Results,
    jobs: int = 1,
    imported: Sequence[str] = IMPORTED,
    say: Callable[[str], None] = print,
) -> dict[str, Outcome]:
    """Try every edit that ``results`` does not hold as caught already; the outcomes of all of them, by name.

    ``folder`` gets a copy of the checkout ``source`` for each of ``jobs``, which take the lists in turn.
    ``imported``: see ``Tree``.
    """
    every = [mutation for one in lists for mutation in one.mutations]
    left = {mutation.name for mutation in every if not results.holds(mutation, source)}
    say(f"{len(every)} mutations, {len(every) - len(left)} of them caught before")
    trees: SimpleQueue[Tree] = SimpleQueue()
    for job in range(jobs):
        trees.put(Tree(source, folder / f"copy-{job}", imported))
    done = 0

    def note(tree: Tree, mutation: Mutation, verdict: str, said: str = "", seconds: float = 0.0) -> None:
        nonlocal done
        done += 1
        results.add(mutation.name, Outcome(verdict, said, round(seconds, 1), mutation.fingerprint(tree.folder)))
        say(f"[{done}/{len(left)}] {verdict:8} {seconds:5.1f} s  {mutation.name}: {said}")

    def work(one: MutationList) -> None:
        mutations = [mutation for mutation in one.mutations if mutation.name in left]
        if not mutations:
            return
        tree = trees.get()
        try:
            say(f"{one.area}: {len(mutations)} to try; their tests without an edit first")
            _try_all(one, mutations, tree, partial(note, tree))
        finally:
            tree.close()
            trees.put(tree)

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(work, one) for one in lists]:
            future.result()
    return {mutation.name: results.outcomes[mutation.name] for mutation in every}


def _try_all(one: MutationList, mutations: Sequence[Mutation], tree: Tree, note: Callable[..., None]) -> None:
    tree.update()
    if one.builds == "cpu":
        tree.build("cpu")
    else:
        tree.take_library()
    if one.builds == "emulation":
        tree.build("emulation")
    sound: dict[Suite, TestRun] = {}
    for mutation in mutations:
        if mutation.suite not in sound:  # before any edit: what is compiled is unedited, too
            sound[mutation.suite] = tree.test(mutation.suite)
    for mutation in mutations:
        unedited = sound[mutation.suite]
        if not (unedited.passed and unedited.collected):
            note(mutation, BROKEN, f"its tests fail without the edit: {unedited.said}")
            continue
        try:
            with tree.mutated(mutation):
                if mutation.file.startswith("csrc/"):
                    assert one.builds is not None
                    tree.build(one.builds)
                edited = tree.test(mutation.suite, limit=60 + round(10 * unedited.work))
        except WrongEntry as error:
            note(mutation, STALE, str(error))
        except BuildFailed as error:
            note(mutation, BROKEN, f"does not compile: {error}")
        else:
            verdict = SURVIVED if edited.passed else CAUGHT if edited.collected else BROKEN
            note(mutation, verdict, edited.said, edited.seconds)
