"""Suite `step`: all ways take the same step, wrong ones are caught, parts are measured apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attbalance_ext import AttBalanceLoss, AttentionTap, attention_terms
from benchmarks import gate
from benchmarks.providers import PROVIDERS, on_device
from benchmarks.providers import step as ways
from benchmarks.runner import run_case
from benchmarks.suites.step import StepCase, StepInputs, StepSuite
from benchmarks.task import Provider
from benchmarks.timing import CpuClock

SUITE = StepSuite()
CPU = torch.device("cpu")
PROVIDER = {provider.name: provider for provider in PROVIDERS["step"]}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["transvg-tiny", "vltvg-tiny", "qrnet-tiny"])
def test_all_ways_pass_the_gate_and_are_timed(model: str, precision: str) -> None:
    case = StepCase(model, batch=4, size=32, precision=precision)
    rows = run_case(SUITE, case, on_device("step", "cpu"), run="now", rounds=1, clock=CpuClock(cold=False))
    assert [(row.provider, row.status) for row in rows] == [(name, "ok") for name in PROVIDER]
    assert all(row.timing and row.mode == "step" for row in rows)
    assert {row.provider for row in rows if row.part} == {"teacher-update", "teacher-forward"}


@pytest.fixture
def inputs() -> StepInputs:
    return SUITE.inputs(StepCase("transvg-tiny", batch=4, size=32), CPU)


def wrong(fault: str) -> Provider:
    right = PROVIDER["ours"]

    def task(inputs: StepInputs):
        criterion = AttBalanceLoss(inputs.settings.loss)

        def loss(tap: AttentionTap) -> Tensor:
            with tap.recording():
                boxes = inputs.model(*inputs.batch)
            theirs = inputs.teacher.attention(*inputs.batch)
            attention = tap.attention()
            if fault == "keys without gradient":
                attention = replace(attention, key=[key.detach() for key in attention.key])
            terms = attention_terms(attention, inputs.region, teacher=theirs)
            if fault == "terms without gradient":
                terms = terms._replace(rac=terms.rac.detach(), mrc=terms.mrc.detach())
            elif fault == "MRC without gradient":
                terms = terms._replace(mrc=terms.mrc.detach())
            elif fault == "half of RAC":
                terms = terms._replace(rac=terms.rac / 2)
            return criterion(terms, boxes, inputs.boxes, box_ratio=inputs.box_ratio).loss

        def update() -> None:
            if fault != "teacher left as it is":
                inputs.teacher.update(inputs.model)

        return ways._task(inputs, inputs.model.make_tap, loss, update)

    return replace(right, task=task)


@pytest.mark.parametrize(
    ("fault", "shows"),
    [
        ("terms without gradient", "gradient norm"),
        ("MRC without gradient", "fusion's gradient"),
        ("keys without gradient", "fusion's gradient"),
        ("half of RAC", "loss"),
        ("teacher left as it is", "teacher's move"),
        ("none", None),
    ],
)
@pytest.mark.parametrize("model", ["transvg-tiny", "vltvg-tiny", "qrnet-tiny"])
def test_a_wrong_step_is_caught(model: str, fault: str, shows: str | None) -> None:
    inputs = SUITE.inputs(StepCase(model, batch=8, size=32), CPU)
    task = wrong(fault).task(inputs)
    assert task is not None
    verdict = gate.check(task.results(), SUITE.truth(inputs)["complete"], SUITE.tolerance(inputs.case))
    if shows is None:
        assert verdict.passed
    else:
        assert not verdict.passed
        worst = task.results()[shows]
        assert gate.relative_error(worst, SUITE.truth(inputs)["complete"][shows]) > SUITE.tolerance(inputs.case)


def test_the_gate_leaves_weights_as_they_are(inputs: StepInputs) -> None:
    before = {name: tensor.clone() for name, tensor in inputs.teacher.state_dict().items()}
    weights = [parameter.detach().clone() for parameter in inputs.model.parameters()]
    for provider in PROVIDERS["step"]:
        task = provider.task(inputs)
        assert task is not None
        task.results()
    assert all(torch.equal(before[name], tensor) for name, tensor in inputs.teacher.state_dict().items())
    assert all(torch.equal(old, new) for old, new in zip(weights, inputs.model.parameters(), strict=True))


def test_a_timed_step_trains_student_and_teacher(inputs: StepInputs) -> None:
    for name in ("today", "ours"):
        student, teacher = inputs.fusion_weights()
        task = PROVIDER[name].task(inputs)
        assert task is not None
        task.calls["step"]()()
        student_after, teacher_after = inputs.fusion_weights()
        assert not torch.equal(student, student_after)
        momentum = inputs.settings.momentum
        torch.testing.assert_close(teacher_after, momentum * teacher + (1 - momentum) * student)


def test_only_the_watcher_of_a_step_is_on_its_model(inputs: StepInputs) -> None:
    def hooks(model: torch.nn.Module) -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    teachers_own = hooks(inputs.teacher.module)
    found = {}
    for name in ("today", "ours", "plain", "today", "teacher-forward"):
        task = PROVIDER[name].task(inputs)
        assert task is not None
        task.calls["step"]()
        found[name] = (hooks(inputs.model), hooks(inputs.teacher.module) - teachers_own)
    layers = len(inputs.model.supervised)
    ours = 2 * layers  # one before a layer and one after it
    assert found == {"today": (layers, layers), "ours": (ours, 0), "plain": (0, 0), "teacher-forward": (0, 0)}


def test_full_size_models_have_their_papers_canvas() -> None:
    assert StepCase("transvg-r50").describe() == {
        "model": "transvg-r50",
        "B": 2,
        "pixels": 640,
        "precision": "fp32",
    }
    assert (StepCase("qrnet-tiny").samples, StepCase("qrnet-tiny").canvas) == (64, 64)
