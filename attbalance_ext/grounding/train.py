"""One training run: steps, validation, checkpoints."""

from __future__ import annotations

import itertools
import logging
import math
import shlex
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from attbalance_ext import (
    AttBalanceLoss,
    AttBalanceOutput,
    AttentionTap,
    BoxRegion,
    MomentumTeacher,
    attention_terms,
)
from attbalance_ext.grounding.batch import Batch
from attbalance_ext.grounding.clock import StepClock
from attbalance_ext.grounding.compilation import Objective, compiled
from attbalance_ext.grounding.distributed import ALONE, Ranks
from attbalance_ext.grounding.errors import NotWritten, TrainingFailed, UserError
from attbalance_ext.grounding.evaluate import evaluate
from attbalance_ext.grounding.files import save_checkpoint, write_json
from attbalance_ext.grounding.log import RunLog
from attbalance_ext.grounding.models import GroundingModel
from attbalance_ext.grounding.not_finite import keep_batch, weights_not_finite
from attbalance_ext.grounding.optimization import frozen_parts, learning_rate_schedule, make_optimizer
from attbalance_ext.grounding.order import DataOrder
from attbalance_ext.grounding.settings import Settings
from attbalance_ext.grounding.split import Split

LAST, PREVIOUS, BEST, SETTINGS, HISTORY = "last.pt", "previous.pt", "best.pt", "settings.json", "history.json"
NOT_FINITE = "not_finite.pt"
"""The batch of the last step whose loss or gradient was not finite."""
_log = logging.getLogger(__name__)


class Trainer:
    """Trains one model, with or without AttBalance.

    A step is a function of the settings, the state in the checkpoint and the step's number: the data order and
    the random numbers (dropout, augmentation) follow from (seed, step). So a resumed run goes on with the same bits on
    a CPU, several trainers can take turns in one process, and a plain run and an AttBalance run of one seed see the
    same batches and the same dropout.

    Of several processes each has a part of every batch; what they log and decide is the same in all, and the main one
    writes.
    """

    log_every = 10

    def __init__(
        self,
        settings: Settings,
        model: GroundingModel,
        train: Split,
        validation: Split,
        directory: Path,
        ranks: Ranks = ALONE,
    ) -> None:
        self.settings = settings
        self.directory = directory
        self.ranks = ranks
        self.held = ExitStack()
        """What ``fit`` lets go of when it ends: the folder, for other processes."""
        self.split, self.validation = train, validation
        self.device = torch.device(settings.device)
        self.model = model.to(self.device).train()
        self.order = DataOrder(len(train), settings.batch_size, settings.seed)
        _require_even_parts(self.order.batch_size, settings.accumulate, ranks)
        self.criterion = AttBalanceLoss(settings.loss, backend=settings.backend).to(self.device)
        self.optimizer = make_optimizer(model, settings)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, learning_rate_schedule(settings))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.log = RunLog(directory, write=ranks.main)
        self.clock = StepClock(self.device)
        self.step = 0
        self.saved_step: int | None = None
        """Of the last checkpoint; None before the first."""
        self.last_is_whole = True
        """Whether the file ``last.pt`` may take the place of ``previous.pt``."""
        self.best_step = 0
        self.best_accuracy = -1.0
        self.validations_without_gain = 0
        self.tap: AttentionTap | None = None
        self.teacher: MomentumTeacher | None = None
        if settings.terms_steps > 0:
            self.tap = self.model.make_tap()
            self.teacher = MomentumTeacher(self.model, methodcaller("make_tap"), settings.momentum)
        self.network: nn.Module = self.model
        self.objective: Objective = compiled(self._objective) if settings.compile else self._objective
        self._frozen: frozenset[str] | None = None
        self._batches: Iterator[Batch] | None = None

    @property
    def finished(self) -> bool:
        """All steps done, or stopped early."""
        patience = self.settings.early_stop
        out_of_patience = patience is not None and self.validations_without_gain >= patience
        return out_of_patience or self.step >= self.settings.steps

    def advance(self) -> None:
        """One step, and what is due after it: a record, a validation, checkpoints. Collective, like :meth:`save`."""
        settings = self.settings
        if self.step >= settings.terms_steps:
            self._end_supervision()
        self._freeze(frozen_parts(settings, self.step))
        self.clock.start()
        self._train_step()
        self.clock.stop()
        self.step += 1
        last = self.step == settings.steps
        if self.step % self.log_every == 0 or last:
            self._close_window()
        validate = self.step % settings.validate_every == 0 or last
        if validate:
            self._validate()
        if self.finished and self.log.steps:  # stopped early, inside a window
            self._close_window()
        due = validate if settings.checkpoint_every is None else self.step % settings.checkpoint_every == 0
        if self.finished or due:
            self.save()

    def _close_window(self) -> None:
        self._require_finite()
        if not self.log.usable:
            if self.log.steps >= self.log_every or not self.log.history["train"]:
                raise TrainingFailed(
                    f"each of the {self.log.steps} steps up to step {self.step} was left out, its loss or gradient not "
                    f"finite: this is no single batch's fault. {self.last_good()}"
                )
            return  # the last few of a run that has ended
        self.log.close_window(self.step, learning_rate=self.scheduler.get_last_lr()[0], step_ms=self.clock.median_ms())

    def _train_step(self) -> None:
        torch.manual_seed(self.settings.seed * 1_000_003 + self.step + 7_368_787 * self.ranks.rank)
        batches = self._next_batches()
        self.optimizer.zero_grad(set_to_none=True)
        if self.teacher is not None:
            self.teacher.update(self.model)
        parts, rho_average = len(batches), self.criterion.rho_average
        values = [self._accumulate(batch, 1 / parts, last=part == parts - 1) for part, batch in enumerate(batches)]
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip or math.inf)
        step = {name: torch.stack([value[name] for value in values]).mean(0) for name in values[0]}
        bad = self._to_skip({"gradient_norm": norm, **step})
        if not bad:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        with warnings.catch_warnings():  # the schedule goes on where a first step overflowed and was left out
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler")
            self.scheduler.step()
        if bad:  # as if the step had not been: the teacher follows weights that have not changed
            self.criterion.rho_average = rho_average
            self.log.add({"skipped": torch.ones(())})
            said = self._keep_batch(self.step, bad)
            if self.ranks.main:
                _log.warning("step %d is left out: not finite: %s. %s", self.step + 1, ", ".join(bad), said)
            return
        if self.tap is not None and self.settings.loss.rho == "ema":
            # One average for all processes, whatever number of them goes on with it. Averaging is linear: it is that
            # of the processes' mean rho.
            average = self.ranks.mean({"rho": self.criterion.rho_average})
            self.criterion.rho_average = average["rho"]
        if self.settings.on_nan == "skip":
            step["skipped"] = torch.zeros_like(norm)
        if self.scaler.is_enabled():  # a step whose gradient overflowed was left out; that is no failure
            step["skipped"] = (~norm.isfinite()).to(norm.dtype)
            norm = norm.nan_to_num(0.0, 0.0, 0.0)
        self.log.add({"gradient_norm": norm.detach(), **self.ranks.mean(step)})

    def _next_batches(self) -> list[Batch]:
        """This process's parts of the step's batch, read before anything changes: where that fails, the state is whole.

        A process that is alone saves it then; of several the others wait in the middle of the step, and cannot.
        """
        if self._batches is None:
            self._batches = self.split.stream(self._plan())
        try:
            return [next(self._batches) for _ in range(self.settings.accumulate)]
        except UserError as error:
            self._batches = None
            stopped = f"{error}. Stopped before step {self.step + 1}"
            if self.step and self.ranks.world == 1:
                try:
                    self.save()
                except TrainingFailed as another:
                    raise TrainingFailed(f"{stopped}. {another}") from None
            raise UserError(f"{stopped}. {self.last_good()}") from None

    def _to_skip(self, values: dict[str, Tensor]) -> list[str]:
        """Names of what is not finite in any process where such a step is to be left out, else none. Collective then.

        A gradient that overflowed under loss scaling is the scaler's to leave out.
        """
        if self.settings.on_nan == "stop":  # seen when the window is closed, so that no step waits for the device
            return []
        scaled = self.scaler.is_enabled()
        names = [name for name in values if not (scaled and name == "gradient_norm")]
        finite = torch.stack([values[name].isfinite().all() for name in names]).tolist()
        bad = [name for name, whole in zip(names, finite, strict=True) if not whole]
        if not self.ranks.any(bool(bad)):
            return []
        return sorted({name for found in self.ranks.gather(bad) for name in found})

    def _keep_batch(self, step: int, names: list[str]) -> str:
        """Keep the whole batch of ``step`` (counted from 0) for inspection; where it lies, or why not. Collective."""
        path = self.directory / NOT_FINITE
        said = f"Its batch, to look at with torch.load: {path}"
        if self.ranks.main:
            parts = self.order.indices(step).tensor_split(self.ranks.world * self.settings.accumulate)
            try:
                keep_batch(path, self.split, parts, step=step + 1, epoch=self.order.epoch(step), names=names)
            except NotWritten as error:
                said = f"Its batch is not kept: {error}"
        self.ranks.any(False)  # the others wait: where one process ends, torchrun ends all
        return said

    def last_good(self) -> str:
        """Where a run that stops goes on from."""
        if self.saved_step is None:
            return "Nothing was saved yet"
        going_on = f"attbalance train --resume {shlex.quote(str(self.directory))}"
        return f"The last good state: {self.directory / LAST} of step {self.saved_step}; go on with: {going_on}"

    def _accumulate(self, batch: Batch, share: float, *, last: bool) -> dict[str, Tensor]:
        """Forward and backward pass of a part of the step's batch; what the log is told of it."""
        network = self.network
        # Gradients are averaged over the processes once, in the last part's backward pass.
        with network.no_sync() if not last and isinstance(network, DistributedDataParallel) else nullcontext():
            output = self.objective(batch)
            self.scaler.scale(output.loss * share).backward()
        names = ["loss", "box", "iou"]
        if self.tap is not None:
            names += ["attention", "rac", "mrc", "adw", "odw", "rho"]
        values = {name: getattr(output, name).detach() for name in names}
        return {name: value if name == "rho" else value.mean() for name, value in values.items()}

    def _objective(self, batch: Batch) -> AttBalanceOutput:
        """From a batch to its loss: what is compiled."""
        precision, teacher_precision = self.settings.precision, self.settings.teacher_precision
        if self.tap is None or self.teacher is None:
            with self._autocast(precision):
                boxes = self.network(*batch.inputs)
            return self.criterion(None, _at_least_float32(boxes), batch.boxes, box_ratio=batch.box_ratio)
        with self._autocast(precision):
            inputs = (self.model.share(batch.images, batch.padding), *batch.inputs[1:])
            with self.tap.recording():
                boxes = self.network(*inputs)
        with self._autocast(precision if teacher_precision == "same" else teacher_precision):
            teacher = self.teacher.attention(*inputs, attention_only=True)
        terms = attention_terms(
            self.tap.attention(),
            BoxRegion(batch.boxes, self.model.grids, self.settings.rule),
            teacher=teacher,
            backend=self.settings.backend,
        )
        return self.criterion(terms, _at_least_float32(boxes), batch.boxes, box_ratio=batch.box_ratio)

    def _autocast(self, precision: str) -> AbstractContextManager[None]:
        if precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype)

    def _plan(self) -> Iterator[tuple[Tensor, int]]:
        """This process's parts of every batch from the current step on, and their epochs."""
        for step in itertools.count(self.step):
            share = self.ranks.share(self.order.indices(step))
            for part in share.tensor_split(self.settings.accumulate):
                yield part, self.order.epoch(step)

    def _freeze(self, parts: frozenset[str]) -> None:
        """Let just the other parts train. What averages gradients is made anew: it knows who has one."""
        if parts == self._frozen:
            return
        self._frozen = parts
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_(group["name"] not in parts)
        if self.ranks.world > 1:
            self.network = DistributedDataParallel(self.model)

    def _end_supervision(self) -> None:
        """Take the tap and the teacher down: from here a step costs what a plain step costs."""
        if self.tap is not None:
            self.tap.remove()
        self.tap = self.teacher = None

    def _validate(self) -> None:
        settings = self.settings
        metrics = evaluate(
            self.model,
            self.validation,
            rule=settings.rule,
            backend=settings.backend,
            samples=settings.validation_samples,
            ranks=self.ranks,
        ).metrics()
        self.log.validation(self.step, metrics)
        if metrics["acc50"] > self.best_accuracy:
            self.best_step, self.best_accuracy = self.step, metrics["acc50"]
            self.validations_without_gain = 0
            self.save(BEST, self.model_state())
        else:
            self.validations_without_gain += 1

    def _require_finite(self) -> None:
        first, names = self.log.not_finite()
        if names:
            step = self.step - self.log.steps + first  # counted from 0
            raise TrainingFailed(
                f"not finite in step {step + 1}: {', '.join(names)}. {self._keep_batch(step, names)}. "
                f"{self.last_good()} (with --on-nan skip such steps are left out). "
                "A lower learning rate or more warm-up is the usual way out"
            )

    def save(self, name: str = LAST, state: dict[str, Any] | None = None) -> Path:
        """Write ``state`` (default: all of it), and settings and history as JSON beside it, each atomically.

        The last checkpoint but one stays as ``previous.pt``.

        Raises:
            TrainingFailed: the state is no longer finite, and is not written over a good one; or the disk is full.
        """
        self._require_finite()
        if names := weights_not_finite(self.model):
            raise TrainingFailed(
                f"not finite after step {self.step}: the weights {', '.join(names[:3])} and {len(names)} in all. "
                f"{self.last_good()}. A lower learning rate or more warm-up is the usual way out"
            )
        path = self.directory / name
        if self.ranks.main:
            keep = self.directory / PREVIOUS if name == LAST and self.last_is_whole else None
            try:
                save_checkpoint(path, self.state_dict() if state is None else state, keep=keep)
                self.write_settings()
                write_json(self.directory / HISTORY, self.log.history)
            except NotWritten as error:
                raise TrainingFailed(f"{error}. {self.last_good()}") from error
        if name == LAST:
            self.saved_step, self.last_is_whole = self.step, True
        return path

    def write_settings(self) -> None:
        """Write settings.json, for people; a run's are in its checkpoints."""
        if self.ranks.main:
            write_json(self.directory / SETTINGS, self.settings.to_dict())

    def model_state(self) -> dict[str, Any]:
        """Tensors and plain types: the model and what is known about it, to use it and not to train on."""
        return {
            "settings": self.settings.to_dict(),
            "tokenizer": self.split.tokenizer.state(),
            "model": self.model.state_dict(),
            "log": self.log.state_dict(),
            "step": self.step,
        }

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types: everything the rest of the run depends on."""
        return {
            **self.model_state(),
            "data": self.data(),
            "teacher": self.teacher.state_dict() if self.teacher is not None else None,
            "criterion": self.criterion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best_step": self.best_step,
            "best_accuracy": self.best_accuracy,
            "validations_without_gain": self.validations_without_gain,
        }

    def data(self) -> dict[str, dict[str, Any]]:
        """What each split holds, to notice that a run goes on with other data."""
        return {"train": self.split.content, "val": self.validation.content}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`, for a trainer built from the same settings."""
        self.model.load_state_dict(state["model"])
        if self.teacher is not None and state["teacher"] is not None:
            self.teacher.load_state_dict(state["teacher"])
        self.criterion.load_state_dict(state["criterion"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.log.load_state_dict(state["log"])
        for name in ("step", "best_step", "best_accuracy", "validations_without_gain"):
            setattr(self, name, state[name])
        self.saved_step = self.step
        self._batches = None
        if state["teacher"] is None:
            self._end_supervision()


def _at_least_float32(tensor: Tensor) -> Tensor:
    """What autocast made of the boxes, in the precision of the loss."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _require_even_parts(batch_size: int, accumulate: int, ranks: Ranks) -> None:
    """Unequal parts would weigh samples unequally."""
    if batch_size % (ranks.world * accumulate):
        raise UserError(
            f"batch_size must be divisible by processes x accumulate, got {batch_size} for {ranks.world} x {accumulate}"
        )
