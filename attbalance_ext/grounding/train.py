"""One training run: steps, validation, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch

from attbalance_ext import (
    AttBalanceLoss,
    AttBalanceOutput,
    AttentionTap,
    BoxRegion,
    MomentumTeacher,
    attention_terms,
)
from attbalance_ext.grounding.clock import StepClock
from attbalance_ext.grounding.compilation import Objective, compiled
from attbalance_ext.grounding.errors import TrainingFailed
from attbalance_ext.grounding.evaluate import evaluate
from attbalance_ext.grounding.files import save_checkpoint, write_json
from attbalance_ext.grounding.log import RunLog
from attbalance_ext.grounding.models import GroundingModel
from attbalance_ext.grounding.order import DataOrder
from attbalance_ext.grounding.settings import Settings
from attbalance_ext.grounding.split import Batch, PreparedSplit

LAST, BEST, SETTINGS, HISTORY = "last.pt", "best.pt", "settings.json", "history.json"


class Trainer:
    """Trains one model, with or without AttBalance.

    A step is a function of the settings, the state in the checkpoint and the step's number: the data order and
    the random numbers (dropout) follow from (seed, step). So a resumed run goes on with the same bits on a CPU,
    several trainers can take turns in one process, and a plain run and an AttBalance run of one seed see the same
    batches and the same dropout.
    """

    log_every = 10

    def __init__(
        self,
        settings: Settings,
        model: GroundingModel,
        train: PreparedSplit,
        validation: PreparedSplit,
        directory: Path,
    ) -> None:
        self.settings = settings
        self.directory = directory
        self.split, self.validation = train, validation
        self.device = torch.device(settings.device)
        self.model = model.to(self.device).train()
        self.order = DataOrder(len(train), settings.batch_size, settings.seed)
        self.criterion = AttBalanceLoss(settings.loss, backend=settings.backend).to(self.device)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, _warmup_cosine(settings))
        self.log = RunLog(directory)
        self.clock = StepClock(self.device)
        self.step = 0
        self.best_step = 0
        self.best_accuracy = -1.0
        self.validations_without_gain = 0
        self.tap: AttentionTap | None = None
        self.teacher: MomentumTeacher | None = None
        if settings.terms_steps > 0:
            self.tap = self.model.make_tap()
            self.teacher = MomentumTeacher(self.model, methodcaller("make_tap"), settings.momentum)
        self.objective: Objective = compiled(self._objective) if settings.compile else self._objective

    @property
    def finished(self) -> bool:
        """All steps done, or stopped early."""
        patience = self.settings.early_stop
        out_of_patience = patience is not None and self.validations_without_gain >= patience
        return out_of_patience or self.step >= self.settings.steps

    def advance(self) -> None:
        """One step, and what is due after it: a record, a validation, checkpoints."""
        if self.step >= self.settings.terms_steps:
            self._end_supervision()
        self.clock.start()
        self._train_step()
        self.clock.stop()
        self.step += 1
        last = self.step == self.settings.steps
        if self.step % self.log_every == 0 or last:
            self._require_finite()
            self.log.close_window(
                self.step, learning_rate=self.scheduler.get_last_lr()[0], step_ms=self.clock.median_ms()
            )
        if self.step % self.settings.validate_every == 0 or last:
            self._validate()
            self.save()

    def _train_step(self) -> None:
        torch.manual_seed(self.settings.seed * 1_000_003 + self.step)
        output = self.objective(self.split.batch(self.order.indices(self.step)))
        self.optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimizer.step()
        self.scheduler.step()
        names = ["loss", "box", "iou"]
        if self.tap is not None:
            names += ["attention", "rac", "mrc", "adw", "odw", "rho"]
        self.log.add({"gradient_norm": norm, **{name: getattr(output, name) for name in names}})

    def _objective(self, batch: Batch) -> AttBalanceOutput:
        """From a batch to its loss: what is compiled."""
        if self.tap is None or self.teacher is None:
            return self.criterion(None, self.model(*batch.inputs), batch.boxes, box_ratio=batch.box_ratio)
        self.teacher.update(self.model)
        with self.tap.recording():
            boxes = self.model(*batch.inputs)
        terms = attention_terms(
            self.tap.attention(),
            BoxRegion(batch.boxes, self.model.grids, self.settings.rule),
            teacher=self.teacher.attention(*batch.inputs, attention_only=True),
            backend=self.settings.backend,
        )
        return self.criterion(terms, boxes, batch.boxes, box_ratio=batch.box_ratio)

    def _end_supervision(self) -> None:
        """Take the tap and the teacher down: from here a step costs what a plain step costs."""
        if self.tap is not None:
            self.tap.remove()
        self.tap = self.teacher = None

    def _validate(self) -> None:
        settings = self.settings
        metrics = evaluate(self.model, self.validation, rule=settings.rule, backend=settings.backend).metrics()
        self.log.validation(self.step, metrics)
        if metrics["acc50"] > self.best_accuracy:
            self.best_step, self.best_accuracy = self.step, metrics["acc50"]
            self.validations_without_gain = 0
            self.save(BEST)
        else:
            self.validations_without_gain += 1

    def _require_finite(self) -> None:
        names = self.log.not_finite()
        if names:
            last = self.directory / LAST
            raise TrainingFailed(
                f"not finite at or just before step {self.step}: {', '.join(names)}. "
                f"The last good state: {last if last.exists() else 'none was saved yet'}. "
                "A lower learning rate or more warm-up is the usual way out"
            )

    def save(self, name: str = LAST) -> Path:
        """Write a complete checkpoint, and settings and history as JSON beside it, each atomically.

        A state that is no longer finite is never written over a good one: :class:`TrainingFailed`.
        """
        self._require_finite()
        path = self.directory / name
        save_checkpoint(path, self.state_dict())
        write_json(self.directory / SETTINGS, self.settings.to_dict())
        write_json(self.directory / HISTORY, self.log.history)
        return path

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types: everything the rest of the run depends on."""
        return {
            "settings": self.settings.to_dict(),
            "vocabulary": self.split.vocabulary.words,
            "model": self.model.state_dict(),
            "teacher": self.teacher.state_dict() if self.teacher is not None else None,
            "criterion": self.criterion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "log": self.log.state_dict(),
            "step": self.step,
            "best_step": self.best_step,
            "best_accuracy": self.best_accuracy,
            "validations_without_gain": self.validations_without_gain,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`, for a trainer built from the same settings."""
        self.model.load_state_dict(state["model"])
        if self.teacher is not None and state["teacher"] is not None:
            self.teacher.load_state_dict(state["teacher"])
        self.criterion.load_state_dict(state["criterion"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.log.load_state_dict(state["log"])
        for name in ("step", "best_step", "best_accuracy", "validations_without_gain"):
            setattr(self, name, state[name])
        if state["teacher"] is None:
            self._end_supervision()


def _warmup_cosine(settings: Settings) -> Callable[[int], float]:
    """Linear warm-up, then half a cosine down to zero at the last step."""

    def factor(step: int) -> float:
        if step < settings.warmup_steps:
            return (step + 1) / settings.warmup_steps
        progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor
