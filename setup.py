"""The native part of the build: which libraries to compile, and CMake to compile them. Metadata is in pyproject.toml.

ATTBALANCE_CPU = auto (default) | 1 | 0 says whether to build the C++ kernels. Where something is missing, "auto"
installs without them, on the reference alone, and says what; "1" makes that an error. Code that does not compile is
always an error.
MAX_JOBS bounds the parallel compilations; CXX names the compiler, CMAKE_ARGS is handed to CMake.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CPU_LIBRARY = "attbalance_ext.kernels.lib.libattbalance_cpu"


def tool(name: str) -> str | None:
    """The path of a build tool, from PATH or from beside this interpreter (`pip install cmake ninja`)."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def compiler() -> str | None:
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)[0]] if named else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def torch_directory() -> Path | None:
    """Where PyTorch is installed, without importing it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def missing() -> list[str]:
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


def libraries() -> list[Extension]:
    wanted = os.environ.get("ATTBALANCE_CPU", "auto")
    if wanted not in ("auto", "1", "0"):
        sys.exit(f"ATTBALANCE_CPU must be auto, 1 or 0, got {wanted!r}")
    if wanted == "0":
        print("attbalance_ext: ATTBALANCE_CPU=0, installing without the C++ kernels (backend 'reference' only)")
        return []
    reasons = missing()
    if not reasons:
        return [Extension(CPU_LIBRARY, sources=[])]
    needs = f"attbalance_ext: the C++ kernels need {', '.join(reasons)}"
    if wanted == "1":
        sys.exit(needs)
    print(f"{needs}\nattbalance_ext: installing without them (backend 'reference' only)", file=sys.stderr)
    return []


class CMakeBuild(build_ext):
    """Build each extension as the CMake target of its name. The libraries hold no Python and keep their plain names."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / self.build_temp / "native"
        torch = torch_directory()
        configure = [
            tool("cmake"),
            f"-S{ROOT}",
            f"-B{build}",
            f"-DTORCH_INCLUDE_DIR={torch / 'include'}",
            f"-DTORCH_LIBRARY_DIR={torch / 'lib'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}",
            f"-DCMAKE_CXX_COMPILER={compiler()}",
        ]
        if ninja := tool("ninja"):
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        target = output.stem.removeprefix("lib")
        subprocess.run(configure, check=True)
        subprocess.run([tool("cmake"), "--build", str(build), "--target", target, "--parallel", jobs], check=True)

    def copy_extensions_to_source(self) -> None:
        (ROOT / CPU_LIBRARY.replace(".", os.sep)).parent.mkdir(exist_ok=True)  # git keeps no empty directory
        super().copy_extensions_to_source()


class PlatformWheel(bdist_wheel):
    """py3-none-PLATFORM: the libraries depend on the platform, not on the Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(ext_modules=libraries(), cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel})
