"""The cases there are: a finite list of values for each field, the simplest first."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

Case = dict[str, Any]


@dataclass(frozen=True)
class Space:
    """fields: the values of each field, the simplest first. A value that stands there twice is drawn twice as often."""

    fields: Mapping[str, Sequence[Any]]

    def draw(self, generator: random.Random) -> Case:
        return {name: generator.choice(values) for name, values in self.fields.items()}

    def strategy(self) -> st.SearchStrategy[Case]:
        return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in self.fields.items()})

    def simpler(self, case: Case) -> Iterator[Case]:
        """The same case with one field simpler: as simple as can be, half as far, one less."""
        for name, values in self.fields.items():
            place = values.index(case[name])
            for other in dict.fromkeys((0, place // 2, place - 1)):
                if 0 <= other < place:
                    yield case | {name: values[other]}
