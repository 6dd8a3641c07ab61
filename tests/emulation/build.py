"""Compiles the emulation's modules where they are not up to date, and imports them."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

SOURCES = Path(__file__).parent
BUILDS = SOURCES.parent.parent / "build" / "emulation"

# Ways to build, by name: what CMake is told.
VARIANTS = {
    "plain": (),
    "sanitised": ("-DEMULATION_SANITIZE=address,undefined",),
    "ucontext": ("-DEMULATION_UCONTEXT=ON",),
}


# How to build where nothing else is asked for.
VARIANT = os.environ.get("ATTBALANCE_EMULATION_VARIANT", "plain")


@functools.cache
def load(module: str, variant: str = VARIANT) -> ModuleType:
    """The compiled module of this name; its operators are registered from then on.

    Raises:
        RuntimeError: it does not compile; the message is all that the compiler said.
    """
    path = build(module, variant)
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def build(module: str, variant: str = VARIANT) -> Path:
    """Bring the module up to date. Safe when several processes ask at once."""
    directory = BUILDS / f"{variant}-{sys.implementation.cache_tag}-torch-{torch.__version__}"
    compile_with_cmake(SOURCES, directory, (module,), *module_options(), *VARIANTS[variant])
    (path,) = directory.glob(f"{module}.*.so")
    return path


def compile_with_cmake(sources: Path, directory: Path, targets: tuple[str, ...], *options: str) -> None:
    """Bring the targets of a CMake project that needs PyTorch up to date. Safe when several processes ask at once.

    Raises:
        RuntimeError: something does not compile; the message is all that the compiler said.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory / "lock"):
        if not (directory / "build.ninja").exists():
            configure(sources, directory, *options)
        _run(_tool("cmake"), "--build", str(directory), "--target", *targets, "--parallel", "2")


def configure(sources: Path, directory: Path, *options: str) -> None:
    """Write what is to be compiled, and how, into the directory."""
    torch_directory = Path(torch.__file__).parent
    _run(
        _tool("cmake"),
        f"-S{sources}",
        f"-B{directory}",
        "-GNinja",
        f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
        f"-DTORCH_INCLUDE_DIR={torch_directory / 'include'}",
        f"-DTORCH_LIBRARY_DIR={torch_directory / 'lib'}",
        *options,
    )


def module_options() -> tuple[str, ...]:
    """What `configure` needs besides for the modules of the emulation."""
    import pybind11  # needed to compile only: the tests of an installed wheel have no compiler either

    return f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"


def _tool(name: str) -> str:
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise RuntimeError(f"the emulation needs {name}: pip install {name}")
    return path


def _run(*command: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a sanitiser's runtime
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
