"""The layers point one way: public API -> kernels -> csrc; what uses the library uses its public names.

The rules read the source text, so that a forbidden import fails here even where it would run.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "attbalance_ext"

ERRORS = f"{PACKAGE}.errors"  # below everything: what both the kernels and the public API raise
KERNELS = f"{PACKAGE}.kernels"
FRONT = (f"{PACKAGE}.cli", f"{PACKAGE}.grounding.commands")  # the command line, above everything
GROUNDING = f"{PACKAGE}.grounding"
USERS = {  # and the other users that each may build on: whole training steps are timed with the trainer's own models
    GROUNDING: (),
    f"{PACKAGE}.integrations": (),
    "benchmarks": tuple(
        f"{GROUNDING}.{name}" for name in ("errors", "models", "optimization", "provenance", "settings")
    ),
    "examples": (f"{PACKAGE}.integrations",),
}

# What is outside the stable folders ties the binary to one PyTorch version. Kernel bodies (kernels.cuh) are
# also compiled for the host, where there is no torch at all.
STABLE_ABI = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
UNSTABLE = ("torch/", "ATen/", "c10/", "caffe2/", "pybind11/", "Python.h")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Every name that `source`, the text of `module`, imports; absolute: `from a import b` gives `a.b`."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*origin, alias.name]) for alias in node.names)


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def layer_faults(source: str, module: str, is_package: bool, public: set[str]) -> list[str]:
    """Imports in `source` that point up a layer, or from a user of the library past its public names."""
    names = set(imports(source, module, is_package))
    ours = {name for name in names if inside(name, PACKAGE)}
    user = next((user for user in USERS if inside(module, user)), None)
    if inside(module, *FRONT):
        faults = {name for name in ours if inside(name, KERNELS)}
    elif user is not None:
        allowed = {PACKAGE, *(f"{PACKAGE}.{name}" for name in public)}
        faults = {name for name in ours - allowed if not inside(name, user, *USERS[user])}
    elif inside(module, ERRORS):
        faults = ours
    elif inside(module, KERNELS):
        faults = {name for name in ours if not inside(name, KERNELS, ERRORS)}
    else:
        faults = {name for name in ours if inside(name, *FRONT, *USERS)}
    if inside(module, PACKAGE):
        faults |= {name for name in names if inside(name, "benchmarks", "tests")}
    return sorted(faults)


def public_names() -> set[str]:
    import attbalance_ext

    return set(attbalance_ext.__all__)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def native_files() -> list[Path]:
    return sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cuh", ".cpp", ".cu"})


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", python_files(PACKAGE, "benchmarks", "examples"), ids=relative)
def test_imports_point_down(path: Path) -> None:
    faults = layer_faults(path.read_text(), module_name(path), path.name == "__init__.py", public_names())
    assert not faults, f"{relative(path)} imports {faults}"


@pytest.mark.parametrize(
    ("module", "source", "is_fault"),
    [
        ("attbalance_ext.kernels.choose", "from attbalance_ext.errors import BackendUnavailable", False),
        ("attbalance_ext.kernels.choose", "from ..errors import BackendUnavailable", False),
        ("attbalance_ext.kernels.choose", "from . import ops", False),
        ("attbalance_ext.kernels.choose", "from ..terms import attention_terms", True),
        ("attbalance_ext.kernels.choose", "import attbalance_ext", True),
        ("attbalance_ext.kernels.choose", "def f():\n    from attbalance_ext import loss", True),
        ("attbalance_ext.errors", "from .terms import attention_terms", True),
        ("attbalance_ext.terms", "from .kernels import ops", False),
        ("attbalance_ext.terms", "from .grounding import train", True),
        ("attbalance_ext.terms", "import attbalance_ext.cli", True),
        ("attbalance_ext.terms", "import benchmarks", True),
        ("attbalance_ext.cli", "from .grounding import train", False),
        ("attbalance_ext.cli", "from .info import environment", False),
        ("attbalance_ext.cli", "from .kernels import ops", True),
        ("attbalance_ext.grounding.train", "from attbalance_ext import AttBalanceLoss", False),
        ("attbalance_ext.grounding.train", "from .models import transvg", False),
        ("attbalance_ext.grounding.train", "from ..loss import AttBalanceLoss", True),
        ("attbalance_ext.grounding.train", "from attbalance_ext.kernels import ops", True),
        ("attbalance_ext.grounding.train", "from attbalance_ext import kernels", True),
        ("attbalance_ext.integrations.transformers", "from attbalance_ext import AttBalanceLoss", False),
        ("attbalance_ext.integrations.transformers", "from attbalance_ext.recorder import Record", True),
        ("attbalance_ext.tap", "from attbalance_ext.integrations import transformers", True),
        ("benchmarks.suites.op", "from ..timing import measure", False),
        ("benchmarks.suites.step", "from attbalance_ext.grounding.models import build_model", False),
        ("benchmarks.suites.step", "from attbalance_ext.grounding.train import Trainer", True),
        ("attbalance_ext.grounding.train", "from attbalance_ext.integrations import transformers", True),
        ("benchmarks.suites.op", "from attbalance_ext.kernels.attention_terms import reference", True),
        ("examples.detr", "from attbalance_ext.integrations.transformers import TransformersTap", False),
        ("examples.detr", "from attbalance_ext.tap import AttentionTap", True),
    ],
)
def test_layer_rule_itself(module: str, source: str, is_fault: bool) -> None:
    assert bool(layer_faults(source, module, False, {"AttBalanceLoss"})) is is_fault


def test_only_ops_touches_the_operator_registry() -> None:
    registry = re.compile(r"torch\.ops\b|torch\.library\b|load_library")
    users = {relative(path) for path in python_files(PACKAGE) if registry.search(path.read_text())}
    assert users == {f"{PACKAGE}/kernels/ops.py"}


def header_faults(name: str, source: str) -> list[str]:
    """What `source`, the text of the native file `name`, may not do."""
    includes = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', source, flags=re.MULTILINE)
    stable = () if name == "kernels.cuh" else STABLE_ABI
    faults = [path for path in includes if path.startswith(UNSTABLE) and not path.startswith(stable)]
    if name.endswith((".h", ".cuh")) and "#pragma once" not in source:
        faults.append("no #pragma once")
    return faults


def test_native_code_uses_only_the_stable_abi() -> None:
    files = native_files()
    assert files
    faults = {relative(path): header_faults(path.name, path.read_text()) for path in files}
    assert not {path: found for path, found in faults.items() if found}


@pytest.mark.parametrize(
    ("name", "source", "is_fault"),
    [
        ("cpu.cpp", "#include <torch/csrc/stable/library.h>", False),
        ("cpu.cpp", "#include <torch/extension.h>", True),
        ("cpu.cpp", '# include "ATen/ATen.h"', True),
        ("simd.h", "#pragma once\n#include <cmath>", False),
        ("simd.h", "#include <cmath>", True),
        ("cuda.cu", "#include <torch/headeronly/util/Half.h>", False),
        ("kernels.cuh", "#pragma once\n#include <torch/headeronly/util/Half.h>", True),
    ],
)
def test_header_rule_itself(name: str, source: str, is_fault: bool) -> None:
    assert bool(header_faults(name, source)) is is_fault


def test_native_code_defines_no_schema() -> None:
    """Schemas live in kernels/ops.py; defining one twice aborts the process."""
    define = re.compile(r"\bSTABLE_TORCH_LIBRARY\s*\(|\bSTABLE_TORCH_LIBRARY_FRAGMENT\s*\(|\bm\.def\s*\(")
    files = native_files()
    assert files
    assert not [relative(path) for path in files if define.search(path.read_text())]


def test_shipped_binaries_are_portable_and_exact() -> None:
    """No instruction set of the building machine, no fast-math, in anything that decides compiler flags."""
    text = "\n".join((ROOT / name).read_text() for name in ("CMakeLists.txt", "setup.py"))
    assert not re.findall(r"-march=native|-mtune=native|-ffast-math|--use_fast_math|-Ofast", text)
