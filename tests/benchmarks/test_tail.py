"""Suite `tail`: everyone who takes part computes the objective, whoever computes another is caught."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attbalance_ext import AttBalanceConfig, AttBalanceLoss, spearman_rho
from benchmarks import gate
from benchmarks.boxes import box_iou
from benchmarks.differentiable import differentiable
from benchmarks.providers import compiled, ours, today
from benchmarks.suites.tail import TailCase, TailInputs, TailSuite
from benchmarks.task import Task

SUITE = TailSuite()
CPU = torch.device("cpu")


def verdict(task: Task, inputs: TailInputs, case: TailCase) -> gate.Verdict:
    return gate.check(task.results(), SUITE.truth(inputs)[""], SUITE.tolerance(case))


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton", "cuda"])
@pytest.mark.parametrize("batch", [8, 70])
def test_backends_pass_the_gate(backend: str, batch: int) -> None:
    case = TailCase(layers=3, batch=batch)
    inputs = SUITE.inputs(case, CPU)
    assert verdict(ours.tail(backend)(inputs), inputs, case).passed


@pytest.mark.parametrize("batch", [8, 512, 4096])
def test_todays_way_passes_the_gate(batch: int) -> None:
    case = TailCase(batch=batch)
    inputs = SUITE.inputs(case, CPU)
    assert verdict(today.tail(inputs), inputs, case).passed


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_compiled_reference_passes_the_gate(mode: str) -> None:
    torch.compiler.reset()
    case = TailCase(layers=2, batch=8)
    inputs = SUITE.inputs(case, CPU)
    assert verdict(compiled.tail(mode)(inputs), inputs, case).passed


@pytest.mark.parametrize(
    ("config", "detached"),
    [(AttBalanceConfig(weight_mrc=1.001), None), (AttBalanceConfig(rho="off"), None), (AttBalanceConfig(), "mrc")],
)
def test_another_objective_is_caught(config: AttBalanceConfig, detached: str | None) -> None:
    case = TailCase(layers=3, batch=8)
    inputs = SUITE.inputs(case, CPU)
    criterion = AttBalanceLoss(config, backend="reference")

    def forward() -> list[Tensor]:
        terms = inputs.terms
        if detached == "mrc":  # the right value, with a gradient of 0
            terms = terms._replace(mrc=terms.mrc.detach() + 0 * terms.mrc)
        return [criterion(terms, inputs.predicted, inputs.target).loss]

    found = verdict(differentiable(forward, inputs.leaves, inputs.gradients), inputs, case)
    assert not found.passed
    assert found.error > 1e-4


def test_ranks_are_the_same_in_both_precisions() -> None:
    """rho is discontinuous: inputs on which float32 ranks otherwise would hold nobody to one truth."""
    inputs = SUITE.inputs(TailCase(batch=4096), CPU)
    narrow, _ = box_iou(inputs.predicted.detach(), inputs.target)
    wide, _ = box_iou(inputs.predicted.detach().double(), inputs.target.double())
    ranks = spearman_rho(narrow[None].double(), wide)
    assert ranks.item() == pytest.approx(1, abs=1e-12)
    assert 0.1 < wide.mean() < 0.9


def test_byte_formula_counts_the_tensors_it_names() -> None:
    case = TailCase(layers=6, batch=64)
    inputs, size = SUITE.inputs(case, CPU), SUITE.bytes(case)
    terms = inputs.terms
    read = [terms.in_box, terms.rac, terms.mrc, terms.valid, inputs.predicted, inputs.target]
    assert size.read == sum(tensor.nbytes for tensor in read)
    assert size.write == sum(tensor.nbytes for tensor in inputs.leaves.values())
    assert eval(size.read_formula.split("=")[1], {"L": 6, "B": 64}) == size.read
    assert eval(size.write_formula.split("=")[1], {"L": 6, "B": 64}) == size.write
