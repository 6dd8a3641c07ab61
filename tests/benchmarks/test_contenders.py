"""The contenders of suite `op` that need more than PyTorch: compiled, on Triton, composed from Liger-Kernel."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import gate
from benchmarks.providers import PROVIDERS, compiled, liger, ours
from benchmarks.runner import run_case
from benchmarks.suites.op import OpCase, OpInputs, OpSuite
from benchmarks.suites.tail import TailCase, TailSuite
from benchmarks.task import Case, Suite, Task
from benchmarks.timing import CpuClock

SUITE = OpSuite()
CASE = OpCase(layers=2, batch=3, tokens=16, width=32, teacher=True)


@pytest.fixture
def inputs() -> OpInputs:
    return SUITE.inputs(CASE, torch.device("cpu"))


def passes(task: Task, inputs: OpInputs) -> bool:
    return gate.check(task.results(), SUITE.truth(inputs)[""], SUITE.tolerance(CASE)).passed


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_gpu_backends_pass_the_gate(inputs: OpInputs, backend: str) -> None:
    assert passes(ours.op(backend)(inputs), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_compiled_reference_passes_the_gate(inputs: OpInputs, mode: str) -> None:
    torch.compiler.reset()
    assert passes(compiled.op(mode)(inputs), inputs)


class Scalar(float):
    """A number as compiled Triton hands it to a kernel; the interpreter hands over Python's own."""

    def to(self, dtype: object) -> Scalar:
        return self


def test_liger_composition_passes_the_gate(inputs: OpInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    kl_div = pytest.importorskip("liger_kernel.ops.kl_div", reason="Liger-Kernel is not installed")
    forward = kl_div.kldiv_forward_triton
    called = []

    def interpreted(log_p, log_t, log_target, reduction, eps):
        called.append(tuple(log_p.shape))
        return forward(log_p, log_t, log_target, reduction, Scalar(eps))

    monkeypatch.setattr(kl_div, "kldiv_forward_triton", interpreted)
    task = liger.op(inputs)
    assert task is not None
    assert passes(task, inputs)
    assert called == [(CASE.layers * CASE.batch, CASE.tokens)]


def test_liger_has_no_part_without_a_teacher() -> None:
    case = OpCase(layers=1, batch=2, tokens=16, width=16)
    assert liger.op(SUITE.inputs(case, torch.device("cpu"))) is None


@pytest.mark.parametrize(
    ("suite", "case", "name", "module"),
    [
        (SUITE, CASE, "liger", "liger_kernel.transformers"),
        (TailSuite(), TailCase(layers=1, batch=8), "today", "scipy.stats"),
    ],
)
def test_a_contender_whose_package_is_missing_says_so(
    suite: Suite, case: Case, name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    provider = next(provider for provider in PROVIDERS[suite.name] if provider.name == name)
    rows = run_case(suite, case, [provider], run="now", rounds=1, clock=CpuClock(cold=False))
    status = {row.status for row in rows if row.provider == name}
    assert len(status) == 1
    assert status.pop().startswith(f"unavailable: import of {module}")
