"""Why a backend cannot run, with what to do about it."""

from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """One line each; as text "reason: remedy"."""

    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.remedy}"


def build(**environment: str) -> str:
    """The command that builds the native libraries on this machine, with these environment variables."""
    variables = "".join(f"{name}={value} " for name, value in environment.items())
    return (
        f"{variables}pip install --no-build-isolation --no-deps --force-reinstall --no-binary attbalance_ext "
        f"attbalance_ext (in a checkout: {variables}make setup)"
    )
