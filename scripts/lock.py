"""Resolve pyproject.toml into exact versions with hashes. `make lock` runs it with the tools it needs.

    python scripts/lock.py [--upgrade] [--upgrade-package NAME]...

Writes four files of versions, each with the SHA-256 of every file that the index has of it:

    requirements/torch.txt   PyTorch
    requirements/cuda.txt    what PyTorch's build for CUDA asks for besides; its CPU build does not
    requirements/lock.txt    everything else that development and CI install
    requirements/tools.txt   what makes and audits these files (the group `tools`), for an environment of its own

What is pinned stays as it is while pyproject.toml allows it; options are handed on to uv. PyPI has one build of
PyTorch. The CPU builds of https://download.pytorch.org/whl/cpu/torch/ are of the same version and have other hashes:
requirements/torch-cpu.sha256 lists them, and they are accepted too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "requirements"
TORCH, CUDA, LOCK, TOOLS = (FOLDER / f"{name}.txt" for name in ("torch", "cuda", "lock", "tools"))
TORCH_CPU = FOLDER / "torch-cpu.sha256"
OLDEST = "3.10"
PYTHONS = {OLDEST: "3.10.0", "3.11": "3.11.5", "3.12": "3.12.0", "3.13": "3.13.0", "3.14": "3.14.0"}
ENVIRONMENTS = [
    {"python_version": python, "python_full_version": full, "sys_platform": "linux", "platform_machine": machine}
    for python, full in PYTHONS.items()
    for machine in ("x86_64", "aarch64")
]
MADE = "# Made from pyproject.toml by `make lock`; edit that one.\n"


class Pin(NamedTuple):
    """One version of one distribution, for the environments its marker names."""

    requirement: Requirement
    hashes: list[str]
    via: list[str]

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)

    @property
    def version(self) -> str:
        (specifier,) = self.requirement.specifier
        return specifier.version

    def text(self) -> str:
        lines = [str(self.requirement), *(f"    --hash=sha256:{value}" for value in self.hashes)]
        return " \\\n".join(lines) + f"\n    # via {', '.join(self.via)}\n"


def read(path: Path) -> list[Pin]:
    """The pins of one of the files, or of what uv wrote; none where there is no file."""
    text = path.read_text() if path.exists() else ""
    entries = re.findall(r"^[^\s#].*\n(?: .*\n)*", text, re.MULTILINE)
    return [_pin(entry) for entry in entries]


def _pin(entry: str) -> Pin:
    requirement = Requirement(entry.splitlines()[0].rstrip(" \\"))
    comments = " ".join(re.findall(r"^ *#(.*)", entry, re.MULTILINE))
    via = re.sub(r"^ *via|\(pyproject\.toml[^)]*\)|,", " ", comments).split()
    return Pin(requirement, re.findall(r"--hash=sha256:(\w+)", entry), via)


def shortened(pin: Pin) -> Pin:
    """uv writes out on which of the environments of pyproject.toml it is needed; what they share says nothing."""
    marker = pin.requirement.marker
    needed = [marker is None or marker.evaluate(environment) for environment in ENVIRONMENTS]
    if all(needed):
        pin.requirement.marker = None
    elif needed == [environment["python_version"] == OLDEST for environment in ENVIRONMENTS]:
        pin.requirement.marker = Marker('python_version < "3.11"')
    elif needed == [environment["python_version"] != OLDEST for environment in ENVIRONMENTS]:
        pin.requirement.marker = Marker('python_version >= "3.11"')
    return pin


def file_of(pin: Pin) -> Path:
    """Where a pin belongs. Nothing but PyTorch's build for CUDA asks for the CUDA libraries that are not ours."""
    if pin.name == "torch":
        return TORCH
    return CUDA if pin.name.startswith(("cuda-", "nvidia-")) and "attbalance-ext" not in pin.via else LOCK


def torch_cpu_hashes(version: str) -> list[str]:
    """The hashes of PyTorch's CPU builds, which must be of this version."""
    lines = [line.split() for line in TORCH_CPU.read_text().splitlines()]
    wrong = [name for _, name in lines if not name.startswith(f"torch-{version}+cpu-")]
    if wrong or not lines:
        sys.exit(
            f"{TORCH_CPU.relative_to(ROOT)} has {', '.join(wrong) or 'no hashes'}, the lock torch {version}. "
            "Put the hashes of its wheels there, from https://download.pytorch.org/whl/cpu/torch/"
        )
    return [value for value, _ in lines]


def resolve(known: Sequence[Pin], options: Sequence[str]) -> list[Pin]:
    """What uv finds, keeping the versions of ``known`` where it can; the hashes are the index's, read anew."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "pins.txt")
        output.write_text("".join(f"{pin.requirement}\n" for pin in known))
        command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", OLDEST, "--generate-hashes"]
        command += ["--only-binary", ":all:", "--no-header", "--output-file", str(output), *options]
        environment = {**os.environ, "UV_PYTHON_DOWNLOADS": "never"}
        subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
        return [shortened(pin) for pin in read(output)]


def write(path: Path, pins: Sequence[Pin]) -> None:
    path.write_text(MADE + "".join(pin.text() for pin in pins))
    print(f"{path.relative_to(ROOT)}: {len(pins)} pins")


def main(options: list[str]) -> None:
    known = [pin for path in (TORCH, CUDA, LOCK) for pin in read(path)]
    pins = resolve(known, ["pyproject.toml", "--all-extras", *options])
    for pin in pins:
        if pin.name == "torch":
            pin.hashes.extend(torch_cpu_hashes(pin.version))
    for path in (TORCH, CUDA, LOCK):
        write(path, [pin for pin in pins if file_of(pin) == path])
    write(TOOLS, resolve(read(TOOLS), ["--group", "tools", *options]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except subprocess.CalledProcessError as failure:  # uv has said why
        sys.exit(failure.returncode)
