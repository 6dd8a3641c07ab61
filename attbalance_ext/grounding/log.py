"""What a run says about itself: records of training and validation, for the report and for TensorBoard."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Record = dict[str, Any]
NUMBERS = {"train": ("step", "step_ms", "box"), "validation": ("step", "samples", "acc50")}
"""What every record of a kind has at least; the report draws it."""
_log = logging.getLogger(__name__)


class RunLog:
    """Averages steps into records without waiting for the device at every step."""

    def __init__(self, directory: Path, *, write: bool = True) -> None:
        """``write``: whether TensorBoard gets the records too."""
        self.history: dict[str, list[Record]] = {"train": [], "validation": []}
        self._directory = directory
        self._write = write
        self._pending: list[dict[str, Tensor]] = []
        self._writer: Any = None

    def add(self, values: dict[str, Tensor]) -> None:
        """Take the values of one step: numbers, and ``rho`` (L,)."""
        self._pending.append(values)

    @property
    def steps(self) -> int:
        """How many there are since the last record."""
        return len(self._pending)

    @property
    def usable(self) -> bool:
        """Whether one of them was not left out."""
        return any("loss" in values for values in self._pending)

    def not_finite(self) -> tuple[int, list[str]]:
        """The first step since the last record with a value that was not finite, counted from 0, and the values' names.

        No names: all were finite. Waits for the device.
        """
        together = [name for name in self._names() if not math.isfinite(self._mean(name).sum().item())]
        for step, values in enumerate(self._pending if together else ()):
            if names := [name for name, value in values.items() if not value.isfinite().all()]:
                return step, names
        return self.steps - 1, together  # none, or finite one by one and too large together

    def close_window(self, step: int, **more: Any) -> Record:
        """Turn the steps since the last call into one record."""
        record = {"step": step, **more}
        for name in self._names():
            record[name] = self._mean(name).tolist()
        self._pending.clear()
        self._append("train", record)
        return record

    def validation(self, step: int, metrics: Record) -> None:
        self._append("validation", {"step": step, **metrics})

    def state_dict(self) -> dict[str, Any]:
        """The records and the open window, so that a resumed run continues them exactly."""
        pending = [{name: value.cpu() for name, value in values.items()} for values in self._pending]
        return {"history": self.history, "pending": pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_history(state["history"])
        self.history = state["history"]
        self._pending = state["pending"]

    def close(self) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._give_up(error)
            self._writer = None

    def _names(self) -> list[str]:
        """Of the values of the open window."""
        return list(dict.fromkeys(name for values in self._pending for name in values))

    def _mean(self, name: str) -> Tensor:
        """Over the steps of the window that have the value, on the CPU."""
        return torch.stack([values[name].cpu() for values in self._pending if name in values]).mean(0)

    def _append(self, kind: str, record: Record) -> None:
        self.history[kind].append(record)
        try:
            writer = self._tensorboard(record["step"])
            if writer is None:
                return
            for name, value in record.items():
                for tag, number in _scalars(name, value):
                    writer.add_scalar(f"{kind}/{tag}", number, record["step"])
        except (OSError, UnicodeError) as error:  # a full disk; a folder's name that is no text
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Go on without TensorBoard: the same records are in the checkpoint and in history.json."""
        self._write, self._writer = False, None
        folder = self._directory / "tensorboard"
        _log.warning("%s is no longer written (%s); the records go on in history.json", folder, error)

    def _tensorboard(self, step: int) -> Any:
        """The writer, opened at the first record; records of steps that a resumed run repeats are dropped."""
        if self._writer is None and self._write:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return None
            self._writer = SummaryWriter(str(self._directory / "tensorboard"), purge_step=step)
        return self._writer


def check_history(history: Any) -> None:
    """Raise ``ValueError``, with what is wrong, where these are no records as :class:`RunLog` keeps them."""
    for kind, numbers in NUMBERS.items():
        records = history.get(kind) if isinstance(history, dict) else None
        if not isinstance(records, list):
            raise ValueError(f"it holds no list of {kind} records")
        for count, record in enumerate(records, start=1):
            for name in numbers:
                if not isinstance(record, dict) or not isinstance(record.get(name), int | float):
                    raise ValueError(f"{kind} record {count} has no number {name!r}")


def _scalars(name: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, list):
        return [(f"{name}/layer{index}", number) for index, number in enumerate(value)]
    return [] if name == "step" else [(name, float(value))]
