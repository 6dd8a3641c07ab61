"""The native part of the build: which libraries to compile, and CMake to compile them. Metadata is in pyproject.toml.

ATTBALANCE_CPU, ATTBALANCE_CUDA = auto (default) | 1 | 0 say whether to build the C++ and the CUDA kernels. Where
something is missing, "auto" installs without them and says what; "1" makes that an error. Code that does not compile is
always an error. The CUDA kernels need nvcc, but no GPU and no CUDA build of PyTorch. FORCE_CUDA=1 is ATTBALANCE_CUDA=1.
TORCH_CUDA_ARCH_LIST names the GPUs ("8.0 9.0+PTX"), MAX_JOBS bounds the parallel compilations, CXX names the compiler,
CUDA_HOME the toolkit; CMAKE_ARGS is handed to CMake.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PACKAGE = "attbalance_ext.kernels.lib"


def tool(name: str) -> str | None:
    """The path of a build tool, from PATH or from beside this interpreter (`pip install cmake ninja`)."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def compiler() -> str | None:
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)[0]] if named else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def nvcc() -> str | None:
    """CUDA's compiler: of the toolkit that is named, else from PATH, else of the usual place."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return shutil.which("nvcc", path=f"{named}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def torch_directory() -> Path | None:
    """Where PyTorch is installed, without importing it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def missing_for_cpu() -> list[str]:
    """What the C++ kernels need and this machine does not have."""
    reasons = []
    if not sys.platform.startswith("linux"):
        reasons.append(f"a Linux system (this is {sys.platform})")
    torch = torch_directory()
    if torch is None:
        reasons.append("PyTorch >= 2.10 in the environment that builds (pip install --no-build-isolation)")
    elif not (torch / "include/torch/csrc/stable/library.h").exists():
        reasons.append("PyTorch >= 2.10 with its C++ headers")
    if compiler() is None:
        reasons.append(f"a C++ compiler ({os.environ.get('CXX') or 'g++ or clang++'})")
    if tool("cmake") is None:
        reasons.append("CMake (pip install cmake)")
    return reasons


def missing_for_cuda() -> list[str]:
    reasons = missing_for_cpu()
    if nvcc() is None:
        reasons.append("the CUDA toolkit's nvcc (in PATH, CUDA_HOME or /usr/local/cuda)")
    return reasons


class Library(NamedTuple):
    """One native library: a CMake target, which gives the file its name."""

    target: str
    contents: str
    switch: str  # the environment variable
    missing: Callable[[], list[str]]

    def wanted(self) -> bool:
        """Whether to build it; exits where it must be built and cannot be."""
        answer = os.environ.get(self.switch, "auto")
        if answer not in ("auto", "1", "0"):
            sys.exit(f"{self.switch} must be auto, 1 or 0, got {answer!r}")
        if answer == "0":
            print(f"attbalance_ext: {self.switch}=0, installing without the {self.contents}")
            return False
        reasons = self.missing()
        if not reasons:
            return True
        needs = f"attbalance_ext: the {self.contents} need {', '.join(reasons)}"
        if answer == "1":
            sys.exit(needs)
        print(f"{needs}\nattbalance_ext: installing without them", file=sys.stderr)
        return False


LIBRARIES = (
    Library("attbalance_cpu", "C++ kernels", "ATTBALANCE_CPU", missing_for_cpu),
    Library("attbalance_cuda", "CUDA kernels", "ATTBALANCE_CUDA", missing_for_cuda),
)


class CMakeBuild(build_ext):
    """Build the extensions as CMake targets, in one go. The libraries hold no Python and keep their plain names."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extensions(self) -> None:
        targets = self._targets()
        output = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent
        _remove_unless(targets, output)
        # One place whatever pip's temporary directories are, so that only what changed is compiled again; the options
        # of an earlier build are dropped.
        build = ROOT / "build" / "native"
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        torch = torch_directory()
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        configure = [
            tool("cmake"),
            f"-S{ROOT}",
            f"-B{build}",
            f"-DTORCH_INCLUDE_DIR={torch / 'include'}",
            f"-DTORCH_LIBRARY_DIR={torch / 'lib'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DCMAKE_CXX_COMPILER={compiler()}",
            f"-DATTBALANCE_VERSION={self.distribution.get_version()}",
        ]
        if "attbalance_cuda" in targets:
            architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
            configure += [f"-DCMAKE_CUDA_COMPILER={nvcc()}", f"-DATTBALANCE_CUDA_THREADS={jobs}"]
            configure += ["-DATTBALANCE_CUDA=ON", f"-DTORCH_CUDA_ARCH_LIST={architectures}"]
        if ninja := tool("ninja"):
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run(configure, check=True)
        subprocess.run([tool("cmake"), "--build", build, "--parallel", jobs, "--target", *targets], check=True)

    def copy_extensions_to_source(self) -> None:
        lib = ROOT / PACKAGE.replace(".", os.sep)
        lib.mkdir(exist_ok=True)  # git keeps no empty directory
        _remove_unless(self._targets(), lib)
        super().copy_extensions_to_source()

    def _targets(self) -> list[str]:
        return [Path(self.get_ext_filename(ext.name)).stem.removeprefix("lib") for ext in self.extensions]


def _remove_unless(targets: list[str], directory: Path) -> None:
    """Remove libraries that an earlier build left and this one was told to leave out."""
    for library in LIBRARIES:
        if library.target not in targets:
            (directory / f"lib{library.target}.so").unlink(missing_ok=True)


class PlatformWheel(bdist_wheel):
    """py3-none-PLATFORM: the libraries depend on the platform, not on the Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


if os.environ.get("FORCE_CUDA") == "1":
    os.environ.setdefault("ATTBALANCE_CUDA", "1")
setup(
    ext_modules=[Extension(f"{PACKAGE}.lib{library.target}", []) for library in LIBRARIES if library.wanted()],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
