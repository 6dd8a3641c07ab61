"""The lock pins what pyproject.toml asks for, once in each environment, and every file by its hash."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.licences import PROJECT
from scripts.lock import CUDA, ENVIRONMENTS, LOCK, TOOLS, TORCH, TORCH_CPU, Pin, read, torch_cpu_hashes

OURS = read(TORCH) + read(CUDA) + read(LOCK)
ENVIRONMENT_IDS = [f"{each['python_version']}-{each['platform_machine']}" for each in ENVIRONMENTS]


def wanted() -> Iterator[str]:
    yield from PROJECT["build-system"]["requires"]
    yield from PROJECT["project"]["dependencies"]
    for requirements in PROJECT["project"]["optional-dependencies"].values():
        yield from requirements


def pinned(pins: list[Pin], environment: dict[str, str]) -> dict[str, str]:
    """Name to version, where ``environment`` is; a name twice is an error."""
    versions: dict[str, str] = {}
    for pin in pins:
        if pin.requirement.marker is None or pin.requirement.marker.evaluate(environment):
            assert pin.name not in versions, pin.name
            versions[pin.name] = pin.version
    return versions


def unmet(requirements: list[str], versions: dict[str, str], environment: dict[str, Any]) -> list[str]:
    """Those of ``requirements`` that ``versions`` do not fulfil, and that of them which extras ask for."""
    faults = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": "", **environment}):
            continue
        version = versions.get(canonicalize_name(requirement.name))
        if version is None or version not in requirement.specifier:
            faults.append(f"{text}: {version}")
    return faults


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=ENVIRONMENT_IDS)
def test_every_requirement_has_one_pin_that_fulfils_it(environment: dict[str, str]) -> None:
    assert unmet(list(wanted()), pinned(OURS, environment), environment) == []
    assert unmet(PROJECT["dependency-groups"]["tools"], pinned(read(TOOLS), environment), environment) == []


def test_what_is_installed_asks_for_nothing_that_is_not_pinned() -> None:
    """`make setup` installs the lock without looking at what its parts ask for."""
    here: dict[str, str] = {}
    versions, known = pinned(OURS, here), {pin.name for pin in OURS}
    missing = {}
    for name in versions:
        try:
            asked = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:
            continue
        needed = {
            canonicalize_name(each.name) for each in asked if not each.marker or each.marker.evaluate({"extra": ""})
        }
        if needed - known:
            missing[name] = needed - known
    assert missing == {}


def test_a_requirement_that_no_pin_fulfils_is_seen() -> None:
    environment = ENVIRONMENTS[0]
    versions = pinned(OURS, environment)
    assert unmet(["torch>=99"], versions, environment) == ["torch>=99: 2.13.0"]
    assert unmet(["no-such-thing"], versions, environment) == ["no-such-thing: None"]
    assert unmet(["no-such-thing; python_version >= '3.11'"], versions, environment) == []


def test_every_pin_has_the_hash_of_every_file() -> None:
    for pin in OURS + read(TOOLS):
        assert pin.hashes, pin.name
        assert all(len(value) == 64 and int(value, 16) for value in pin.hashes), pin.name
        assert len(set(pin.hashes)) == len(pin.hashes), pin.name


def test_a_lock_is_what_its_pins_print() -> None:
    for path in (TORCH, CUDA, LOCK, TOOLS):
        first, _, rest = path.read_text().partition("\n")
        assert first.startswith("# Made from pyproject.toml")
        assert rest == "".join(pin.text() for pin in read(path))


def test_pytorchs_builds_for_the_cpu_are_accepted_too() -> None:
    (torch,) = read(TORCH)
    assert set(torch_cpu_hashes(torch.version)) <= set(torch.hashes)


def test_hashes_of_another_pytorch_stop_the_lock() -> None:
    with pytest.raises(SystemExit, match=rf"{TORCH_CPU.name} has torch-.*the lock torch 99\.0"):
        torch_cpu_hashes("99.0")


def test_the_cuda_libraries_are_apart() -> None:
    assert {pin.name for pin in read(LOCK)}.isdisjoint(pin.name for pin in read(CUDA))
    assert {"nvidia-cublas", "nvidia-cudnn-cu13"} <= {pin.name for pin in read(CUDA)}
    assert "nvidia-cuda-nvdisasm" in {pin.name for pin in read(LOCK)}  # make check-cuda needs it on any machine
