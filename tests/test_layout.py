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
FRONT = f"{PACKAGE}.cli"  # above everything
USERS = (f"{PACKAGE}.grounding", f"{PACKAGE}.integrations", "benchmarks")


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
    if user is not None:
        allowed = {PACKAGE, *(f"{PACKAGE}.{name}" for name in public)}
        faults = {name for name in ours - allowed if not inside(name, user)}
    elif inside(module, ERRORS):
        faults = ours
    elif inside(module, KERNELS):
        faults = {name for name in ours if not inside(name, KERNELS, ERRORS)}
    elif module == FRONT:
        faults = set()
    else:
        faults = {name for name in ours if inside(name, FRONT, *USERS)}
    if inside(module, PACKAGE):
        faults |= {name for name in names if inside(name, "benchmarks", "tests")}
    return sorted(faults)


def public_names() -> set[str]:
    import attbalance_ext

    return set(attbalance_ext.__all__)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def native_files(*suffixes: str) -> list[Path]:
    return sorted(path for suffix in suffixes for path in (ROOT / "csrc").rglob(f"*{suffix}"))


def included(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), flags=re.MULTILINE)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", python_files(PACKAGE, "benchmarks"), ids=relative)
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
        ("attbalance_ext.grounding.train", "from attbalance_ext import AttBalanceLoss", False),
        ("attbalance_ext.grounding.train", "from .models import transvg", False),
        ("attbalance_ext.grounding.train", "from ..loss import AttBalanceLoss", True),
        ("attbalance_ext.grounding.train", "from attbalance_ext.kernels import ops", True),
        ("attbalance_ext.grounding.train", "from attbalance_ext import kernels", True),
        ("benchmarks.suites.op", "from ..timing import measure", False),
        ("benchmarks.suites.op", "from attbalance_ext.kernels.attention_terms import reference", True),
    ],
)
def test_layer_rule_itself(module: str, source: str, is_fault: bool) -> None:
    assert bool(layer_faults(source, module, False, {"AttBalanceLoss"})) is is_fault


def test_only_ops_touches_the_operator_registry() -> None:
    registry = re.compile(r"torch\.ops\b|torch\.library\b|load_library")
    users = {relative(path) for path in python_files(PACKAGE) if registry.search(path.read_text())}
    assert users == {f"{PACKAGE}/kernels/ops.py"}


@pytest.mark.parametrize("path", native_files(".h", ".cuh"), ids=relative)
def test_headers_are_guarded(path: Path) -> None:
    assert "#pragma once" in path.read_text()


@pytest.mark.parametrize("path", native_files(".h", ".cuh", ".cpp", ".cu"), ids=relative)
def test_native_code_uses_only_the_stable_abi(path: Path) -> None:
    """What is outside these folders ties the binary to one PyTorch version."""
    stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    foreign = ("torch/", "ATen/", "c10/", "caffe2/", "pybind11/", "Python.h")
    faults = [name for name in included(path) if name.startswith(foreign) and not name.startswith(stable)]
    assert not faults, f"{relative(path)} includes {faults}"


@pytest.mark.parametrize("path", native_files("kernels.cuh"), ids=relative)
def test_kernel_bodies_include_no_torch(path: Path) -> None:
    """The kernel bodies are also compiled for the host, where there is no torch."""
    assert not [name for name in included(path) if name.startswith(("torch/", "ATen/", "c10/"))]


def test_native_code_defines_no_schema() -> None:
    """Schemas live in kernels/ops.py; defining one twice aborts the process."""
    define = re.compile(r"\bSTABLE_TORCH_LIBRARY\s*\(|\bSTABLE_TORCH_LIBRARY_FRAGMENT\s*\(|\bm\.def\s*\(")
    files = native_files(".h", ".cuh", ".cpp", ".cu")
    assert files
    assert not [relative(path) for path in files if define.search(path.read_text())]


def test_shipped_binaries_are_portable_and_exact() -> None:
    """No instruction set of the building machine, no fast-math, in anything that decides compiler flags."""
    text = "\n".join((ROOT / name).read_text() for name in ("CMakeLists.txt", "setup.py"))
    assert not re.findall(r"-march=native|-mtune=native|-ffast-math|--use_fast_math|-Ofast", text)
