"""A small set of cases in which every pair of choices meets at least once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairwise(
    factors: Mapping[str, Sequence[Any]], allowed: Callable[[Case], bool] = lambda case: True, seed: int = 0
) -> list[Case]:
    """Greedy covering set: each case is the best of many random completions of a pair that is still missing.

    ``allowed`` rejects complete cases; a pair that no case can hold is an error, so that nothing drops out unseen.
    """
    generator = random.Random(seed)
    names = list(factors)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]}
    cases = []
    while missing:
        wanted = min(missing, key=repr)
        candidates = []
        for _ in range(200):
            case = {name: generator.choice(list(factors[name])) for name in names} | dict(wanted)
            if allowed(case):
                candidates.append(case)
        if not candidates:
            raise ValueError(f"no allowed case holds {wanted}")
        best = max(candidates, key=lambda case: len(missing & _pairs(case, names)))
        missing -= _pairs(best, names)
        cases.append(best)
    return cases


def _pairs(case: Case, names: Sequence[str]) -> set[Pair]:
    return {((a, case[a]), (b, case[b])) for a, b in itertools.combinations(names, 2)}


def case_id(case: Case) -> str:
    """A readable test name."""
    return "-".join(str(value) for value in case.values())
