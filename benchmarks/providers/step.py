"""A whole training step: plain, with AttBalance by the library and as done today, and the teacher's parts alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from attbalance_ext import AttBalanceLoss, AttentionTap, QueryAttention, attention_map, attention_terms
from benchmarks.suites.step import StepInputs, loss_and_gradient
from benchmarks.task import Results, Task
from benchmarks.today import terms as today_terms
from benchmarks.today.host import TodaysHost
from benchmarks.today.masks import paint
from benchmarks.today.objective import objective
from benchmarks.watch import Nobody, W


def plain(inputs: StepInputs) -> Task:
    criterion = AttBalanceLoss(inputs.settings.loss)

    def loss(nobody: Nobody) -> Tensor:
        with inputs.autocast():
            boxes = inputs.model(*inputs.batch)
        return criterion(None, boxes.float(), inputs.boxes).loss

    return _task(inputs, Nobody, loss, None)


def ours(inputs: StepInputs) -> Task:
    return _task(
        inputs, inputs.model.make_tap, _ours(inputs, teacher=True), lambda: inputs.teacher.update(inputs.model)
    )


def ours_without_teacher(inputs: StepInputs) -> Task:
    return _task(inputs, inputs.model.make_tap, _ours(inputs, teacher=False), None)


def _ours(inputs: StepInputs, *, teacher: bool) -> Callable[[AttentionTap], Tensor]:
    criterion = AttBalanceLoss(inputs.settings.loss)

    def loss(tap: AttentionTap) -> Tensor:
        with inputs.autocast():
            batch = inputs.shared_batch()
            with tap.recording():
                boxes = inputs.model(*batch)
            theirs = inputs.teacher.attention(*batch, attention_only=True) if teacher else None
        terms = attention_terms(tap.attention(), inputs.region, teacher=theirs)
        return criterion(terms, boxes.float(), inputs.boxes, box_ratio=inputs.box_ratio).loss

    return loss


def _todays_update(inputs: StepInputs) -> Callable[[], None]:
    def update() -> None:
        momentum = inputs.settings.momentum
        with torch.no_grad():
            for average, value in zip(inputs.teacher.module.parameters(), inputs.model.parameters(), strict=True):
                average.mul_(momentum).add_(value, alpha=1 - momentum)

    return update


def today(inputs: StepInputs) -> Task:
    return _task(inputs, lambda: _Pair(inputs), _today(inputs), _todays_update(inputs))


def today_fused(inputs: StepInputs) -> Task:
    return _task(inputs, lambda: _Pair(inputs, materialise=False), _today(inputs), _todays_update(inputs))


def today_without_teacher(inputs: StepInputs) -> Task:
    return _task(inputs, lambda: _Pair(inputs, teacher=False), _today(inputs), None)


class _Pair:
    """Student and teacher, both read today's way in their supervised layers."""

    def __init__(self, inputs: StepInputs, *, teacher: bool = True, materialise: bool = True) -> None:
        def host(model: nn.Module) -> TodaysHost:
            visual = slice(-sum(rows * columns for rows, columns in inputs.model.grids), None)
            return TodaysHost(_supervised(model), visual, materialise=materialise)

        self.student = host(inputs.model)
        self.teacher = host(inputs.teacher.module) if teacher else None

    def remove(self) -> None:
        self.student.remove()
        if self.teacher is not None:
            self.teacher.remove()


def _today(inputs: StepInputs) -> Callable[[_Pair], Tensor]:
    config = inputs.settings.loss

    def loss(pair: _Pair) -> Tensor:
        theirs: list[Tensor] = []
        with inputs.autocast():
            boxes = inputs.model(*inputs.batch)
            scores = pair.student.scores()
            if pair.teacher is not None:
                with torch.no_grad():
                    inputs.teacher.module(*inputs.batch)
                    theirs = pair.teacher.scores()
        mask = paint(inputs.boxes, inputs.model.grids, inputs.case.canvas)
        in_box, rac, *mrc = today_terms.attention_terms(scores, mask, theirs, pair.student.padding)
        return objective(
            in_box,
            rac,
            mrc[0] if mrc else None,
            boxes.float(),
            inputs.boxes,
            alpha_l1=config.alpha_l1,
            alpha_giou=config.alpha_giou,
            box_ratio=inputs.box_ratio,
        )

    return loss


def _supervised(model: nn.Module) -> list[nn.MultiheadAttention]:
    """The attention layers that a model's own tap reads, first to last: those that making one hangs a hook on."""
    layers = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    before = [len(layer._forward_pre_hooks) for layer in layers]
    tap: AttentionTap = model.make_tap()  # type: ignore[operator]
    chosen = [layer for layer, hooks in zip(layers, before, strict=True) if len(layer._forward_pre_hooks) > hooks]
    tap.remove()
    return chosen


def teacher_update(inputs: StepInputs) -> Task:
    """The moving average alone."""

    def update() -> None:
        inputs.teacher.update(inputs.model)

    def results() -> Results:
        with inputs.restored_teacher():
            return _moved(inputs, update)

    return Task(results, {"step": lambda: update})


def teacher_forward(inputs: StepInputs) -> Task:
    """The teacher's forward pass alone, from where the student's work serves it to its last supervised attention."""

    def prepare() -> Callable[[], QueryAttention]:
        inputs.watch.by(Nobody)  # today's way hangs its hooks on the teacher too
        with inputs.autocast():
            batch = inputs.shared_batch()

        def forward() -> QueryAttention:
            with inputs.autocast():
                return inputs.teacher.attention(*batch, attention_only=True)

        return forward

    return Task(lambda: {"map": attention_map(prepare()())}, {"step": prepare})


def _task(
    inputs: StepInputs, make: Callable[[], W], loss: Callable[[W], Tensor], update: Callable[[], None] | None
) -> Task:
    """The step around a loss. update: the teacher's, before its forward pass as in the paper.

    Checked without dropout, which draws other numbers in fused attention, and without a step of the optimizer.
    """

    def step(watcher: W) -> None:
        inputs.optimizer.zero_grad(set_to_none=True)
        if update is not None:
            update()
        loss(watcher).backward()
        nn.utils.clip_grad_norm_(inputs.parameters, inputs.settings.clip or math.inf)
        inputs.optimizer.step()

    def prepare() -> Callable[[], None]:
        inputs.model.train()
        watcher = inputs.watch.by(make)
        return lambda: step(watcher)

    def results() -> Results:
        inputs.model.eval()
        watcher = inputs.watch.by(make)
        if update is None:
            return loss_and_gradient(inputs, loss(watcher))
        with inputs.restored_teacher():
            return {**_moved(inputs, update), **loss_and_gradient(inputs, loss(watcher))}

    return Task(results, {"step": prepare})


def _moved(inputs: StepInputs, update: Callable[[], None]) -> Results:
    """How far an update of the teacher takes it."""
    _, before = inputs.fusion_weights()
    update()
    return {"teacher's move": inputs.fusion_weights()[1] - before}
