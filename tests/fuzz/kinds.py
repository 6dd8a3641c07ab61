"""The kinds of cases, and how one is drawn for a backend."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hypothesis import strategies as st

from tests.fuzz import loss, refusals, terms
from tests.fuzz.space import Case, Space


@dataclass(frozen=True)
class Kind:
    """sizes: fields whose product is the work; in_double: fields that make the arithmetic float64."""

    space: Space
    check: Callable[[Case, Sequence[str]], list[str]]
    share: float  # of the cases
    cost: Callable[[Case, int], int] = lambda case, row: 0
    sizes: tuple[str, ...] = ()
    in_double: tuple[str, ...] = ()


KINDS = {
    "terms": Kind(terms.SPACE, terms.check, 0.7, terms.cost, terms.SIZES, terms.IN_DOUBLE),
    "loss": Kind(loss.SPACE, loss.check, 0.25, loss.cost, loss.SIZES, loss.IN_DOUBLE),
    "refusals": Kind(refusals.SPACE, refusals.check, 0.05),
}


class Backend(NamedTuple):
    """name: as the library knows it. work: the largest cost of a case. row: what a row, which is one (layer, sample),
    costs at least: Triton's interpreter takes as long for a small program as for a large one."""

    name: str
    double: bool
    work: int
    row: int = 0


BACKENDS = {
    "cpu": Backend("cpu", double=True, work=10_000),
    "emulated-cuda": Backend("cuda", double=False, work=5_000),
    "triton": Backend("triton", double=False, work=2_000, row=500),
}


def fit(kind: Kind, case: Case, backend: Backend) -> Case:
    """The same case, small enough, and in a dtype that the backend takes."""
    case = dict(case)
    if not backend.double:
        case |= {name: "float32" for name in kind.in_double if case[name] == "float64"}
    generator = random.Random(str(sorted(case.items())))
    while kind.cost(case, backend.row) > backend.work:
        name = generator.choice(kind.sizes)
        values = kind.space.fields[name]
        case[name] = values[values.index(case[name]) // 2]
    return case


def draw(seed: int, number: int, backend: Backend) -> tuple[str, Case]:
    """Case `number` of a seed: its kind's name, and the case."""
    generator = random.Random(f"{seed} {number}")
    (name,) = generator.choices(list(KINDS), [kind.share for kind in KINDS.values()])
    return name, fit(KINDS[name], KINDS[name].space.draw(generator), backend)


def strategy(name: str, backend: Backend) -> st.SearchStrategy[Case]:
    """The same cases for Hypothesis."""
    return KINDS[name].space.strategy().map(lambda case: fit(KINDS[name], case, backend))


def judge(name: str, case: Case, backends: Sequence[str]) -> list[str]:
    """What is wrong with each backend; [] when nothing is. An exception of a right call is wrong too."""
    try:
        return KINDS[name].check(case, backends)
    except Exception as error:
        if len(backends) == 1:
            return [f"{backends[0]}: {type(error).__name__}: {error}"]
        return [fault for backend in backends for fault in judge(name, case, [backend])]
