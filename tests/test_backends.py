"""Which backend runs a call, and what is said where one cannot."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import same_bits
from helpers_attention import make_problem

from attbalance_ext import (
    AttBalanceLoss,
    AttentionTerms,
    BackendUnavailable,
    attention_terms,
    available_backends,
)
from attbalance_ext.kernels import choose, ops
from attbalance_ext.kernels.elf import is_cut_short
from attbalance_ext.kernels.problem import Problem


def terms(backend: str = "auto") -> AttentionTerms:
    problem = make_problem(tokens=401, width=40)
    return attention_terms(problem.student(), problem.region, teacher=problem.teacher, backend=backend)


@pytest.fixture
def no_cpu_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_cpu_problems", [Problem("libattbalance_cpu.so was not built", "install a compiler")])
    monkeypatch.setattr(choose, "_logged", set())


ON_CPU = ("reference", "cpu")


def ran_by(found: AttentionTerms) -> set[str]:
    """The backends whose bits these are."""
    return {name for name in ON_CPU if all(map(same_bits, found, terms(name)))}


def test_every_backend_is_listed_with_reasons() -> None:
    found = available_backends()
    assert list(found) == ["reference", "cpu", "triton", "cuda"]
    assert found["reference"] == []
    assert found["cpu"] == []
    for name in ("triton", "cuda"):
        assert all(isinstance(reason, str) and reason for reason in found[name])


def test_the_list_is_the_caller_s_own() -> None:
    available_backends()["cpu"].append("spoiled")
    assert available_backends()["cpu"] == []


def test_backends_can_be_told_apart() -> None:
    """Else the tests below prove nothing."""
    assert ran_by(terms("reference")) == {"reference"}
    assert ran_by(terms("cpu")) == {"cpu"}


def test_auto_takes_the_kernels() -> None:
    assert ran_by(terms()) == {"cpu"}


@pytest.mark.parametrize("name", ON_CPU)
def test_environment_sets_what_auto_means(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("ATTBALANCE_BACKEND", name)
    assert ran_by(terms()) == {name}
    other = next(backend for backend in ON_CPU if backend != name)
    assert ran_by(terms(other)) == {other}, "an explicit choice wins"


def test_environment_auto_is_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTBALANCE_BACKEND", "auto")
    assert ran_by(terms()) == {"cpu"}


def test_unknown_name_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTBALANCE_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"ATTBALANCE_BACKEND.*reference, cpu, triton, cuda.*'gpu'"):
        terms()


def test_unavailable_name_in_the_environment(monkeypatch: pytest.MonkeyPatch, no_cpu_library: None) -> None:
    monkeypatch.setenv("ATTBALANCE_BACKEND", "cpu")
    with pytest.raises(BackendUnavailable, match="was not built"):
        terms()


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"backend.*auto, reference, cpu, triton, cuda.*'gpu'"):
        terms("gpu")
    with pytest.raises(ValueError, match=r"backend.*auto, reference, cpu, triton, cuda.*'gpu'"):
        AttBalanceLoss(backend="gpu")


def test_explicit_choice_that_cannot_run(no_cpu_library: None) -> None:
    assert available_backends()["cpu"] == ["libattbalance_cpu.so was not built: install a compiler"]
    with pytest.raises(BackendUnavailable, match=r"'cpu' cannot run here: libattbalance_cpu.so was not built"):
        terms("cpu")
    boxes = torch.rand(3, 4)
    with pytest.raises(BackendUnavailable, match="was not built"):
        AttBalanceLoss(backend="cpu")(terms("reference"), boxes, boxes)


def test_cpu_kernels_refuse_other_devices() -> None:
    with pytest.raises(BackendUnavailable, match="'cpu' cannot run here: the tensors are on meta"):
        choose.choose("cpu", "meta", torch.float32)


def test_unavailable_backends_give_their_reasons() -> None:
    for name, reasons in available_backends().items():
        if reasons:
            with pytest.raises(BackendUnavailable) as caught:
                terms(name)
            assert all(reason in str(caught.value) for reason in reasons)


def test_auto_falls_back_and_logs_once(no_cpu_library: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="attbalance_ext"):
        found = [terms() for _ in range(3)]
    assert all(same_bits(each.rac, terms("reference").rac) for each in found)
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "'reference'" in message
    assert "libattbalance_cpu.so was not built" in message


def test_auto_does_not_log_when_nothing_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choose, "_logged", set())
    with caplog.at_level(logging.DEBUG, logger="attbalance_ext"):
        terms()
    assert not caplog.records


def test_library_that_does_not_load_is_a_reason(tmp_path) -> None:
    broken = tmp_path / "libattbalance_cpu.so"
    assert ops._load(broken)[0].reason == "libattbalance_cpu.so was not built"
    broken.write_bytes(b"not a library")
    (problem,) = ops._load(broken)
    assert problem.reason.startswith(f"libattbalance_cpu.so does not load with PyTorch {torch.__version__} (")
    assert "pip install --no-build-isolation" in problem.remedy


@pytest.mark.parametrize("kept", [64, 100, 4096, 0.3, 0.6, 0.9, -1])
def test_library_that_is_cut_short_is_a_reason(kept: float, tmp_path: Path) -> None:
    """To load it would end the process."""
    content = ops.CPU_LIBRARY.read_bytes()
    broken = tmp_path / "libattbalance_cpu.so"
    broken.write_bytes(content)
    assert not is_cut_short(broken)
    size = int(kept * len(content)) if 0 < kept < 1 else kept % len(content)
    broken.write_bytes(content[:size])
    (problem,) = ops._load(broken)
    assert problem.reason == f"libattbalance_cpu.so is cut short, at {size} bytes"
    assert "pip install --no-build-isolation" in problem.remedy


@pytest.mark.parametrize(
    "content", [b"", b"\x7fELF", b"\x7fELF\x02\x01" + bytes(57), b"\x7fELF\x02\x01" + bytes(58), b"MZ" + bytes(90)]
)
def test_the_loader_says_what_is_wrong_with_other_files(content: bytes, tmp_path: Path) -> None:
    broken = tmp_path / "libattbalance_cpu.so"
    broken.write_bytes(content)
    (problem,) = ops._load(broken)
    assert problem.reason.startswith("libattbalance_cpu.so does not load with PyTorch")


def test_float64_names_the_backends_that_have_it() -> None:
    assert choose.choose("cpu", "cpu", torch.float64) == "cpu"
    with pytest.raises(BackendUnavailable, match="float64 runs on backends reference and cpu"):
        choose.choose("cuda", "cuda", torch.float64)


@pytest.fixture
def cuda_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a device; nothing is run."""
    monkeypatch.setattr(ops, "_cuda_problems", [])
    monkeypatch.setattr(ops, "_device_problems", list)
    monkeypatch.setattr(ops, "_kernel_problems", list)
    monkeypatch.setattr(choose, "_logged", set())


def test_auto_takes_the_cuda_kernels(cuda_everywhere: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="attbalance_ext"):
        assert choose.choose("auto", "cuda", torch.float32) == "cuda"
    assert not caplog.records


def test_auto_runs_float64_on_the_reference_and_logs_once(
    cuda_everywhere: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="attbalance_ext"):
        assert {choose.choose("auto", "cuda", torch.float64) for _ in range(3)} == {"reference"}
    assert len(caplog.records) == 1
    assert "float64 runs on backends reference and cpu" in caplog.records[0].getMessage()


def test_cuda_kernels_refuse_other_devices(cuda_everywhere: None) -> None:
    with pytest.raises(BackendUnavailable, match="'cuda' cannot run here: the tensors are on cpu"):
        choose.choose("cuda", "cpu", torch.float32)


def test_cuda_library_without_code_for_the_device(cuda_everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then "auto" takes another backend, instead of failing at the first launch."""
    monkeypatch.setattr(ops, "_kernel_problems", lambda: [Problem("no kernel image is available", "build one")])
    assert available_backends()["cuda"] == ["no kernel image is available: build one"]
    assert choose.choose("auto", "cuda", torch.float32) != "cuda"


def test_cuda_without_a_device(cuda_everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_device_problems", lambda: [Problem("PyTorch finds no CUDA device", "nvidia-smi")])
    assert available_backends()["cuda"] == ["PyTorch finds no CUDA device: nvidia-smi"]


def test_cuda_library_that_was_not_built_says_what_builds_it(tmp_path) -> None:
    assert "the CUDA toolkit" in ops._load(tmp_path / "libattbalance_cuda.so", "the CUDA toolkit (nvcc)")[0].remedy


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        (b"no kernel image is available for execution on the device", "TORCH_CUDA_ARCH_LIST=8.7 pip install"),
        (b"CUDA driver version is insufficient for CUDA runtime version", "update the driver, or build with"),
    ],
)
def test_kernels_that_the_device_cannot_run(monkeypatch: pytest.MonkeyPatch, message: bytes, remedy: str) -> None:
    class Loaded:
        def __init__(self, path: str) -> None:
            self.attbalance_cuda_problem = lambda: message

    monkeypatch.setattr(ops.ctypes, "CDLL", Loaded)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 7))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Orin")
    (problem,) = ops._kernel_problems.__wrapped__()
    assert problem.reason == f"libattbalance_cuda.so on Orin (compute capability 8.7): {message.decode()}"
    assert problem.remedy.startswith(remedy)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA")
def test_a_cuda_library_beside_a_pytorch_without_cuda(tmp_path) -> None:
    library = tmp_path / "libattbalance_cuda.so"
    assert ops._load_cuda(library)[0].remedy.endswith("libattbalance_cuda.so was not built either")
    library.touch()
    assert ops._load_cuda(library)[0].remedy.endswith("libattbalance_cuda.so is here")


@pytest.fixture
def triton_version(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None], None]]:
    """Sets what seems to be installed."""

    def pretend(version: str | None) -> None:
        def found(name: str) -> str:
            if version is None:
                raise metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(ops.metadata, "version", found)
        ops._installed_triton_problems.cache_clear()

    yield pretend
    monkeypatch.undo()
    ops._installed_triton_problems.cache_clear()


def test_reasons_why_triton_cannot_run(
    triton_version: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "TRITON_IS_INTERPRETED", True)
    for version, reason in ((None, "pip install 'triton>=3.6'"), ("3.5.1", "3.5.1 is too old")):
        triton_version(version)
        assert reason in available_backends()["triton"][0]
    for version in ("3.6.0", "3.10.0", "4.0.0+git1234"):
        triton_version(version)
        assert available_backends()["triton"] == []
    monkeypatch.setattr(ops, "TRITON_IS_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [reason.partition(":")[0] for reason in available_backends()["triton"]] == ["PyTorch finds no CUDA device"]


@pytest.fixture
def bare_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """PATH has this folder alone; Triton's driver cannot be had, for there is no device."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path


def triton_compiler_problems() -> tuple[Problem, ...]:
    return ops._triton_compiler_problems.__wrapped__()


def test_triton_needs_a_c_compiler(bare_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = triton_compiler_problems()
    assert problem.reason.startswith("Triton cannot compile its launcher (")
    assert "apt install gcc" in problem.remedy
    (bare_path / "gcc").touch(0o755)
    assert not triton_compiler_problems()
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "apt install gcc" in triton_compiler_problems()[0].remedy


def test_triton_needs_python_s_headers(bare_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare_path / "gcc").touch(0o755)
    monkeypatch.setattr(ops.sysconfig, "get_path", lambda name, scheme: str(bare_path))
    assert "apt install python3-dev" in triton_compiler_problems()[0].remedy


def test_triton_needs_no_compiler_where_its_cache_has_the_launcher(
    bare_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = SimpleNamespace(driver=SimpleNamespace(active=SimpleNamespace(utils=None)))
    monkeypatch.setattr(ops.importlib, "import_module", lambda name: cached)
    assert not triton_compiler_problems()


def test_a_device_without_a_compiler_leaves_triton_out(bare_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "TRITON_IS_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "_installed_triton_problems", tuple)
    monkeypatch.setattr(ops, "_triton_compiler_problems", ops._triton_compiler_problems.__wrapped__)
    assert "cannot compile its launcher" in available_backends()["triton"][0]


def test_auto_takes_triton_where_nothing_was_compiled(cuda_everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_cuda_problems", [Problem("libattbalance_cuda.so was not built", "build it")])
    monkeypatch.setitem(choose.BACKENDS, "triton", choose.BACKENDS["triton"]._replace(problems=list))
    assert choose.choose("auto", "cuda", torch.float32) == "triton"
    assert choose.choose("auto", "cuda", torch.float64) == "reference"


def test_asking_what_is_available_imports_no_triton_kernel() -> None:
    """PyTorch itself may import Triton."""
    program = (
        "import sys, attbalance_ext; attbalance_ext.available_backends(); "
        "sys.exit('attbalance_ext.kernels.attention_terms.triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA")
def test_pytorch_without_cuda_is_a_reason() -> None:
    (reason,) = available_backends()["cuda"]
    assert reason.startswith(f"PyTorch {torch.__version__} was built without CUDA: ")
