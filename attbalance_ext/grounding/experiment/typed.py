"""Tables of a TOML file as the fields of a dataclass: names and types checked, so that a slip is no silent setting."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from attbalance_ext.grounding.errors import UserError

NAMES = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    tuple: "a list",
    dict: "a table",
}
"""What TOML calls the types."""


def fitting(where: str, table: Mapping[str, Any], kind: type, **others: type) -> dict[str, Any]:
    """The values of ``table`` in the types of the dataclass ``kind``; ``others``: fields that are written otherwise.

    TOML has no tuples, and may have 1 where a field is 1.0: equal settings must look the same, for what a run computed
    is found by them.

    Raises:
        UserError: a name or a type that the dataclass does not have, or a number that is none.
    """
    hints = {**_hints(kind), **others}
    if unknown := set(table) - set(hints):
        raise UserError(f"{where}: unknown settings: {', '.join(sorted(unknown))}")
    return {name: _as(hints[name], value, f"{where}: {name}") for name, value in table.items()}


def _as(hint: Any, value: Any, what: str) -> Any:
    kinds = {get_origin(kind) or kind: kind for kind in (get_args(hint) if isinstance(hint, UnionType) else [hint])}
    if float in kinds and type(value) is int:
        value = float(value)
    if tuple in kinds and isinstance(value, list):
        return tuple(_as(get_args(kinds[tuple])[0], item, f"an item of {what}") for item in value)
    not_finite = isinstance(value, float) and not math.isfinite(value)
    if type(value) not in kinds or not_finite:  # not isinstance: True is an int
        raise UserError(f"{what} must be {' or '.join(NAMES[k] for k in kinds if k in NAMES)}, got {value!r}")
    return value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
