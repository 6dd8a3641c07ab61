"""From a case that fails to a simpler one that fails too."""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz.space import Case, Space


def shrink(case: Case, space: Space, fails: Callable[[Case], bool], attempts: int = 2000) -> Case:
    """Simplify field by field until no simpler neighbour fails, or the attempts are used up."""
    tried: list[Case] = []
    found = True
    while found:
        found = False
        for simpler in space.simpler(case):
            if len(tried) == attempts:
                return case
            if simpler in tried:
                continue
            tried.append(simpler)
            if fails(simpler):
                case, found = simpler, True
                break
    return case
