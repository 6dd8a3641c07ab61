"""Suite `tap`: all ways agree on a whole stack, wrong ones are caught, nobody pays for another's hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from attbalance_ext import AttentionTap, attention_terms
from benchmarks import gate
from benchmarks.differentiable import run
from benchmarks.providers import PROVIDERS, tap
from benchmarks.results import Row
from benchmarks.runner import run_case
from benchmarks.suites.tap import TapCase, TapInputs, TapSuite
from benchmarks.task import Results, Task
from benchmarks.timing import CpuClock

SUITE = TapSuite()
CPU = torch.device("cpu")
PROVIDER = {provider.name: provider for provider in PROVIDERS["tap"]}


def tiny(**changes: object) -> TapCase:
    shapes = {"batch": 3, "layers": 2, "words": 5, "tokens": 16, "width": 32, "heads": 4, "hidden": 48}
    return TapCase(**{**shapes, **changes})  # type: ignore[arg-type]


def rows(case: TapCase, *names: str) -> dict[str, Row]:
    chosen = [PROVIDER[name] for name in names]
    return {row.provider: row for row in run_case(SUITE, case, chosen, run="now", rounds=2, clock=CpuClock(cold=False))}


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1}, {"precision": "bf16"}, {"tokens": 500}])
def test_all_ways_pass_the_gate_and_are_measured(teacher: bool, changes: dict[str, object]) -> None:
    found = rows(tiny(teacher=teacher, **changes), "plain", "today", "today-rewritten", "ours-reference", "ours-cpu")
    assert len(found) == 5
    for row in found.values():
        assert row.status == "ok"
        assert row.timing is not None
        assert row.peak is not None
        assert row.peak > 0


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_gpu_backends_pass_the_gate(backend: str) -> None:
    case = tiny(teacher=True)
    inputs = SUITE.inputs(case, CPU)
    assert gate.check(tap.ours(backend)(inputs).results(), SUITE.truth(inputs)["terms"], SUITE.tolerance(case)).passed


def spoilt(inputs: TapInputs, read: Callable[[AttentionTap], Sequence[Tensor]], visual: slice) -> Results:
    inputs.stack.eval()
    watcher = AttentionTap(inputs.stack.attention_layers(), query=0, visual=visual)
    with watcher.recording():
        output = inputs.stack(inputs.tokens, inputs.positions, inputs.padding)
    outputs = [output, *read(watcher)]
    watcher.remove()
    return run(lambda: outputs, inputs.leaves, inputs.gradients)


@pytest.mark.parametrize("fault", ["other tokens", "no gradient to the keys", "none"])
def test_a_wrong_reading_is_caught(fault: str) -> None:
    case = tiny(teacher=True)
    inputs = SUITE.inputs(case, CPU)
    visual = slice(case.words, -1) if fault == "other tokens" else inputs.visual
    assert inputs.teacher is not None
    teacher = inputs.teacher.attention

    def read(watcher: AttentionTap) -> Sequence[Tensor]:
        student = watcher.attention()
        if fault == "no gradient to the keys":
            student = type(student)(
                student.query, [key.detach() for key in student.key], student.scale, student.padding
            )
        return attention_terms(student, inputs.region, teacher=teacher, backend="reference")[:3]

    verdict = gate.check(spoilt(inputs, read, visual), SUITE.truth(inputs)["terms"], SUITE.tolerance(case))
    assert verdict.passed == (fault == "none")


def test_plain_pays_for_no_hook() -> None:
    inputs = SUITE.inputs(tiny(), CPU)

    def hooks() -> int:
        layers = inputs.stack.attention_layers()
        return sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in layers)

    tasks: list[Task] = [tap.ours("reference")(inputs), tap.today(inputs), tap.plain(inputs)]
    found = []
    for task in tasks:
        task.calls["both"]()
        found.append(hooks())
    assert found == [4, 2, 0]  # a tap has two for each of the two layers


def test_todays_way_materialises_attention_and_the_tap_does_not() -> None:
    """At a size where the attention of all heads is larger than everything else."""
    case = tiny(batch=4, tokens=225, words=7, width=16, heads=8, hidden=16)
    found = {name: row.peak or 0 for name, row in rows(case, "plain", "today", "ours-cpu").items()}
    weights = case.layers * case.batch * case.heads * (1 + case.words + case.tokens) ** 2 * 4
    assert found["today"] > found["plain"] + weights
    assert found["ours-cpu"] < found["plain"] + 0.2 * weights
