"""The environment report: what is there, the self-check, and what to do about each problem."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from attbalance_ext import AttentionTerms, available_backends, info
from attbalance_ext.kernels import ops
from attbalance_ext.kernels.build_info import build_info
from attbalance_ext.kernels.problem import Problem


def test_environment_names_what_matters() -> None:
    found = info.environment()
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert {"attbalance_ext", "triton", "platform", "cpu threads", "gpu"} <= set(found)
    assert all(isinstance(value, str) and value for value in found.values())


def test_missing_package_is_said() -> None:
    assert info._version("no-such-package-anywhere") == "not installed"


# --- self-check ------------------------------------------------------------------------------------------------------


def test_self_check_passes_on_every_backend_that_can_run() -> None:
    checks = {check.backend: check for check in info.self_check()}
    assert set(checks) == {name for name, reasons in available_backends().items() if not reasons}
    assert {"reference", "cpu"} <= set(checks)
    for check in checks.values():
        assert check.passed
        assert 0 < check.error <= 2e-5  # 0 would mean that float32 was compared with itself


def wrong_on_cpu(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    right = info.attention_terms

    def wrong(*args: object, backend: str, **kwargs: object) -> AttentionTerms:
        terms = right(*args, backend=backend, **kwargs)
        return terms._replace(rac=terms.rac * factor) if backend == "cpu" else terms

    monkeypatch.setattr(info, "attention_terms", wrong)


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_self_check_sees_a_wrong_backend(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    wrong_on_cpu(monkeypatch, factor)
    checks = {check.backend: check.passed for check in info.self_check()}
    assert checks["reference"]
    assert not checks["cpu"]


def test_self_check_looks_at_every_term_and_gradient() -> None:
    """in_box, rac, mrc, loss; then the gradients by two queries, two keys and the predicted boxes."""
    shapes = [tuple(value.shape) for value in info._run("reference", torch.float64)]
    assert shapes == [(2, 3)] * 3 + [()] + [(3, 64)] * 2 + [(3, 100, 64)] * 2 + [(3, 4)]


def test_self_check_sees_one_gradient_that_is_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    right = info._run

    def last_is_nan(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        values = right(backend, dtype)
        return [*values[:-1], values[-1] * float("nan")] if backend == "cpu" else values

    monkeypatch.setattr(info, "_run", last_is_nan)
    assert {check.backend: check.passed for check in info.self_check()}["cpu"] is False


def test_self_check_goes_on_after_a_backend_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = info._run

    def fails(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        if backend == "reference" and dtype == torch.float32:
            raise RuntimeError("no\nmemory")
        return right(backend, dtype)

    monkeypatch.setattr(info, "_run", fails)
    found = info.report()
    assert {check.backend: check.passed for check in found.checks} | {"reference": False, "cpu": True} == {
        check.backend: check.passed for check in found.checks
    }
    (finding,) = (finding for finding in found.findings if finding.fault)
    assert finding.reason == "fails: RuntimeError: no memory"
    assert "NaN" not in found.as_json()


# --- libraries -------------------------------------------------------------------------------------------------------


def test_a_library_knows_how_it_was_built() -> None:
    built = build_info(ops.CPU_LIBRARY)
    assert built["version"] == metadata.version("attbalance_ext")
    assert built["abi"] == "2.10"
    assert re.fullmatch(r"\d+\.\d+\.\d+", built["pytorch"])
    assert re.fullmatch(r"\w+ [\d.]+", built["compiler"])
    assert "cuda" not in built


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'\x7fELF..attbalance_ext build {"version": "1.0", "cuda": ""}\0..', {"version": "1.0"}),
        (b"\x7fELF..attbalance_ext build {\0..", {}),
        (b"\x7fELF..attbalance_ext build {", {}),
        (b"\x7fELF", {}),
        (b"", {}),
        (None, {}),
    ],
)
def test_what_a_library_says_of_itself(content: bytes | None, found: dict[str, str], tmp_path: Path) -> None:
    library = tmp_path / "lib.so"
    if content is not None:
        library.write_bytes(content)
    assert build_info(library) == found


def test_every_library_is_listed() -> None:
    cpu, cuda = info.libraries()
    assert (cpu.name, cuda.name) == ("libattbalance_cpu.so", "libattbalance_cuda.so")
    assert cpu.loaded
    assert cpu.size == ops.CPU_LIBRARY.stat().st_size
    assert cuda.loaded == (not ops._cuda_problems)


# --- problems --------------------------------------------------------------------------------------------------------


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No self-check: it takes a second where Triton is interpreted."""
    monkeypatch.setattr(info, "self_check", list)


def findings_about(what: str, *require: str) -> list[info.Finding]:
    return [finding for finding in info.report(require).findings if finding.about == what]


def test_what_is_missing_is_said_once_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ops, "_cpu_problems", ops._load(tmp_path / "libattbalance_cpu.so"))
    found = info.report()
    assert found.passed
    lines = found.as_text().splitlines()
    where = lines.index("  cpu        cannot run here: libattbalance_cpu.so was not built")
    assert lines[where + 1].startswith("             -> with PyTorch, CMake and a C++ compiler installed, pip install")
    assert '"auto" takes reference for tensors on cpu' in lines


@pytest.mark.usefixtures("unchecked")
def test_a_broken_library_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "libattbalance_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(ops, "_cpu_problems", ops._load(broken))
    monkeypatch.setattr(ops, "CPU_LIBRARY", broken)
    assert not info.libraries()[0].loaded
    (finding,) = findings_about("cpu")
    assert "does not load with PyTorch" in finding.reason
    assert finding.remedy.startswith("pip install --no-build-isolation")


@pytest.mark.usefixtures("unchecked")
def test_a_library_of_another_version_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = tmp_path / "libattbalance_cuda.so"
    built = {"version": "0.0.1", "pytorch": "2.10.0", "abi": "2.10", "compiler": "GNU 12.2.0"}
    old.write_bytes(b"attbalance_ext build " + json.dumps(built).encode() + b"\0")
    monkeypatch.setattr(ops, "CUDA_LIBRARY", old)
    (finding,) = findings_about("libattbalance_cuda.so")
    assert finding.reason == f"was built for attbalance_ext 0.0.1, this is {metadata.version('attbalance_ext')}"
    assert not finding.fault


@pytest.mark.usefixtures("unchecked")
def test_a_backend_that_is_required_and_cannot_run_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_cpu_problems", [Problem("it is broken", "mend it")])
    assert findings_about("cpu") == [info.Finding("cpu", "it is broken", "mend it")]
    assert findings_about("cpu", "cpu") == [info.Finding("cpu", "it is broken", "mend it", fault=True)]
    assert findings_about("reference", "reference") == []


@pytest.mark.parametrize(
    ("named", "reason", "remedy"),
    [
        ("gpu", "ATTBALANCE_BACKEND=gpu names no backend", "unset it, or set it to one of auto, reference, cpu, "),
        ("cpu", "ATTBALANCE_BACKEND=cpu, which cannot run here: broken", "unset ATTBALANCE_BACKEND, or: mend it"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_backend_that_the_environment_names(
    monkeypatch: pytest.MonkeyPatch, named: str, reason: str, remedy: str
) -> None:
    monkeypatch.setenv("ATTBALANCE_BACKEND", named)
    monkeypatch.setattr(ops, "_cpu_problems", [Problem("broken", "mend it")])
    (finding,) = findings_about("ATTBALANCE_BACKEND")
    assert finding.fault
    assert finding.reason == reason
    assert finding.remedy.startswith(remedy)


@pytest.mark.parametrize("named", ["auto", "reference"])
@pytest.mark.usefixtures("unchecked")
def test_a_backend_that_the_environment_may_name(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setenv("ATTBALANCE_BACKEND", named)
    assert findings_about("ATTBALANCE_BACKEND") == []


@pytest.mark.usefixtures("unchecked")
def test_every_backend_that_cannot_run_has_a_remedy() -> None:
    found = info.report()
    for name, reasons in available_backends().items():
        about = [finding for finding in found.findings if finding.about == name]
        assert [f"{finding.reason}: {finding.remedy}" for finding in about] == reasons
        assert all(finding.remedy and "\n" not in finding.remedy for finding in about)


# --- the command -----------------------------------------------------------------------------------------------------


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--require", "cpu"]) == 0
    wrong_on_cpu(monkeypatch, 1.001)
    assert info.main([]) == 1
    said = capsys.readouterr().out
    assert re.search(r"cpu +\S+e-\d+  WRONG, .*: disagrees with the reference\n +-> report this", said)
    with pytest.raises(SystemExit, match="2"):
        info.main(["--require", "gpu"])


def test_json_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"passed", "environment", "libraries", "checks", "auto", "findings", "seconds"}
    assert found["environment"] == info.environment()
    assert found["auto"]["cpu"] == "cpu"
    assert {"name", "folder", "size", "built", "loaded"} == set(found["libraries"][0])
    for finding in found["findings"]:
        assert set(finding) == {"about", "reason", "remedy", "fault"}


def test_it_needs_the_library_alone(tmp_path: Path) -> None:
    for name in ("typer", "rich", "jinja2", "numpy", "scipy", "matplotlib", "PIL"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name={name!r})\n")
    done = subprocess.run(
        [sys.executable, "-m", "attbalance_ext.info", "--require", "cpu"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"reference +\S+e-\d+  ok", done.stdout)
