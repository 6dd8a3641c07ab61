"""From the command line's options to the cases of a suite."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from benchmarks.task import Case, Suite


class NoSuchOption(ValueError):
    """A suite's cases have no such field."""


def cases(suite: Suite, given: Mapping[str, Sequence[Any]]) -> list[Case]:
    """Every combination of the given values; a field that is not given has the suite's values, or the case's own.

    given: values by field of the suite's case, none where the option was left out.
    """
    chosen = {name: values for name, values in given.items() if values}
    known = [field.name for field in fields(suite.case)]
    for name in chosen:
        if name not in known:
            raise NoSuchOption(f"--{name} does not apply to suite {suite.name}, whose cases have: {', '.join(known)}")
    grid = {**suite.defaults, **chosen}
    return [suite.case(**dict(zip(grid, values, strict=True))) for values in itertools.product(*grid.values())]
