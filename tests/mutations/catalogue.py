"""The lists: which edits there are, and the tests that have to fail for each."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LISTS = Path(__file__).parent / "lists"
BUILDS = ("cpu", "emulation")
"""What an edit in csrc/ may be compiled into: the C++ library, or the CUDA kernels for the host."""


class WrongEntry(Exception):
    """An entry that cannot be used; the message names it."""


@dataclass(frozen=True)
class Suite:
    """Tests that are run together: paths and node ids for pytest, and its ``-k``."""

    tests: tuple[str, ...]
    select: str = ""


@dataclass(frozen=True)
class Mutation:
    """One edit: ``text``, which is in ``file`` once, becomes ``replacement``."""

    name: str
    """Of its list and its own: cuda/no-mask."""
    file: str
    wrong: str
    """What is wrong with it, in a line."""
    text: str
    replacement: str
    suite: Suite

    def applied_to(self, source: str) -> str:
        """The edited file.

        Raises:
            WrongEntry: the text is not there, or there several times: the code has changed since.
        """
        found = source.count(self.text)
        if found != 1:
            raise WrongEntry(f"{self.name}: its text is {found} times in {self.file}, not once")
        return source.replace(self.text, self.replacement)

    def fingerprint(self, root: Path) -> str:
        """Another one where the entry, the edited file or a test file is another one."""
        digest = hashlib.sha256(repr(self).encode())
        for name in (self.file, *self.suite.tests):
            path = root / name.split("::")[0]
            for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
                digest.update(file.read_bytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class MutationList:
    """The edits of one area."""

    area: str
    builds: str | None
    """What edits in csrc/ are compiled into, one of ``BUILDS``; None: there are none."""
    mutations: tuple[Mutation, ...]


def load_lists(folder: Path = LISTS) -> list[MutationList]:
    """All lists, by name of their files.

    Raises:
        WrongEntry: an entry has not the fields it needs, or the name of another.
    """
    return [_list(path) for path in sorted(folder.glob("*.toml"))]


def _list(path: Path) -> MutationList:
    plain = tomllib.loads(path.read_text())
    builds = plain.get("builds")
    if builds not in (None, *BUILDS):
        raise WrongEntry(f"{path.name}: builds must be one of {', '.join(BUILDS)}, got {builds!r}")
    suites = {name: Suite(tuple(suite["tests"]), suite.get("select", "")) for name, suite in plain["suites"].items()}
    mutations = [_mutation(path.stem, entry, suites) for entry in plain["mutation"]]
    names = [mutation.name for mutation in mutations]
    if twice := {name for name in names if names.count(name) > 1}:
        raise WrongEntry(f"{path.name} has several of the name {', '.join(sorted(twice))}")
    unused = suites.keys() - {entry["suite"] for entry in plain["mutation"]}
    if unused:
        raise WrongEntry(f"{path.name}: no mutation uses the suites {', '.join(sorted(unused))}")
    return MutationList(plain["area"], builds, tuple(mutations))


def _mutation(stem: str, entry: dict[str, Any], suites: dict[str, Suite]) -> Mutation:
    needed = {"name", "file", "wrong", "text", "replacement", "suite"}
    if entry.keys() != needed:
        raise WrongEntry(f"{stem}/{entry.get('name')}: its fields must be {', '.join(sorted(needed))}")
    if entry["suite"] not in suites:
        raise WrongEntry(f"{stem}/{entry['name']}: there is no suite {entry['suite']!r}")
    return Mutation(
        name=f"{stem}/{entry['name']}",
        file=entry["file"],
        wrong=entry["wrong"],
        text=entry["text"],
        replacement=entry["replacement"],
        suite=suites[entry["suite"]],
    )
