"""Everything that decides a run, in one value: saved in the checkpoint and, readable, as settings.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from attbalance_ext import AttBalanceConfig, available_backends
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.models import PARTS, design

RULES = ("touch", "center", "coverage", "nearest")
SCHEDULES = ("cosine", "step")
PRECISIONS = ("fp32", "bf16", "fp16")
TEACHER_PRECISIONS = ("same", "bf16")
ON_NAN = ("stop", "skip")
WRONG_BOXES = ("skip", "repair", "error")
SEEDS = 2**43
"""PyTorch's seeds have 64 bits, and a run makes them of its own times 1_000_003 and the step."""


@dataclass(frozen=True)
class Settings:
    """Settings of one training run. Two runs with equal settings on one CPU give the same bits.

    The defaults are those of ``transvg-tiny``; :meth:`for_model` has each model's own.
    """

    model: str = "transvg-tiny"
    model_options: dict[str, Any] = field(default_factory=dict)

    data: str = "builtin:refcoco"
    data_root: str | None = None
    """Folder of annotation files and images; None for built-in data."""
    wrong_boxes: str = "skip"
    """Boxes outside the image, inverted or empty: skip, repair or error."""
    tokenizer: str | None = None
    """Folder or hub id of a Hugging Face tokenizer; None: the words of the training sentences."""
    size: int = 64
    """Side of the square canvas in pixels."""
    train_share: float = 1.0
    """Train on this part of the training pictures. A tiny model's image encoder is pre-trained on all of them."""
    augment: bool = False
    """Random resize, crop, colours and flips, as TransVG trains."""
    flip: bool = True
    """With ``augment``: horizontal flips, with left and right swapped in the sentence."""
    workers: int = 0
    """Processes that read and transform images; the batches do not depend on it."""

    seed: int = 0
    """Decides the initial weights, the order of the data, augmentation and dropout; not the data set."""
    steps: int = 1000
    epochs: int | None = None
    """Instead of ``steps``: passes over the training data. A started run has its number of steps in ``steps``."""
    batch_size: int = 64
    """Samples of one step of the optimizer, over all processes and accumulated parts."""
    accumulate: int = 1
    """Parts that a process cuts its share of a batch into, one forward and backward pass each."""
    learning_rate: float = 3e-3
    vision_rate: float | None = None
    """Learning rate of the image branch; 0 freezes it, None: as the rest."""
    text_rate: float | None = None
    weight_decay: float = 1e-4
    warmup_steps: int = 100
    schedule: str = "cosine"
    """After a linear warm-up: cosine to zero, or step (a tenth from ``drop_fraction`` on)."""
    drop_fraction: float = 2 / 3
    frozen_parts: tuple[str, ...] = ()
    """Parts of the model (vision, text, fusion) that do not train in the first ``frozen_fraction`` of the steps."""
    frozen_fraction: float = 0.0
    clip: float | None = 1.0
    """Largest norm of the gradient; None: any."""
    precision: str = "fp32"
    """Of the model's forward passes: fp32, or autocast to bf16 or fp16 (with loss scaling)."""
    pretrain_steps: int = 400
    """Language-free steps for the tiny models' frozen image encoder; 0 leaves it random."""

    attbalance: bool = True
    """False: the plain box loss, no teacher, no tap."""
    loss: AttBalanceConfig = field(default_factory=AttBalanceConfig)
    terms_fraction: float = 2 / 3
    """The attention terms are on for this first part of the steps (the paper: 60 of 90 epochs)."""
    momentum: float = 0.9
    """Of the teacher's moving average."""
    teacher_precision: str = "same"
    """Of the teacher's forward pass: the same as the model's, or autocast to bf16. Its average is always in float32."""
    rule: str = "touch"
    """How a box becomes weights on the visual tokens, see ``BoxRegion``."""
    backend: str = "auto"

    on_nan: str = "stop"
    """A loss or gradient that is not finite: stop, or skip the step (which then waits for the device at every step)."""

    device: str = "cpu"
    compile: bool = False
    """The step up to the loss under ``torch.compile``. It rounds, and draws dropout, otherwise than eager PyTorch."""
    validate_every: int = 100
    """In steps; a checkpoint follows each validation."""
    validation_samples: int | None = None
    """Validate on so many sentences, evenly spaced over the split; None: on all."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; None: one after each validation."""
    early_stop: int | None = None
    """Stop after this many validations without a better accuracy; None: never."""

    def __post_init__(self) -> None:
        design(self.model)
        for name in ("steps", "batch_size", "validate_every", "size", "accumulate"):
            _require_at_least(1, name, getattr(self, name))
        for name in ("epochs", "validation_samples", "checkpoint_every", "early_stop"):
            if getattr(self, name) is not None:
                _require_at_least(1, name, getattr(self, name))
        for name in ("workers", "pretrain_steps"):
            _require_at_least(0, name, getattr(self, name))
        if not -SEEDS < self.seed < SEEDS:
            raise UserError(f"seed must lie between -2**43 and 2**43, got {self.seed}")
        if self.clip is not None and not self.clip > 0.0:
            raise UserError(f"clip must be above 0, got {self.clip}")
        if not 0.0 < self.train_share <= 1.0:
            raise UserError(f"train_share must lie in (0, 1], got {self.train_share}")
        for name in ("terms_fraction", "drop_fraction", "frozen_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name, known in (
            ("rule", RULES),
            ("backend", ("auto", *available_backends())),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
            ("teacher_precision", TEACHER_PRECISIONS),
            ("wrong_boxes", WRONG_BOXES),
            ("on_nan", ON_NAN),
        ):
            _require_known(name, getattr(self, name), known)
        for part in self.frozen_parts:
            _require_known("part of a model", part, PARTS)
        _require_known("device", self.device.split(":")[0], ("cpu", "cuda"))

    @classmethod
    def for_model(cls, model: str, *, loss: Mapping[str, Any] | None = None, **changes: Any) -> Settings:
        """The settings that ``model``'s paper trains it with, and ``changes`` to them and to its ``loss``."""
        recipe = dict(design(model).recipe)
        if "steps" in changes:
            recipe.pop("epochs", None)
        prefix = "loss."
        weights = {name.removeprefix(prefix): recipe.pop(name) for name in list(recipe) if name.startswith(prefix)}
        try:
            config = AttBalanceConfig(**{**weights, **(loss or {})})
        except ValueError as error:
            raise UserError(str(error)) from None
        return cls(**{"model": model, "loss": config, **recipe, **changes})

    @property
    def terms_steps(self) -> int:
        """Number of first steps with the attention terms."""
        return round(self.terms_fraction * self.steps) if self.attbalance else 0

    @property
    def frozen_steps(self) -> int:
        """Number of first steps in which ``frozen_parts`` do not train."""
        return round(self.frozen_fraction * self.steps) if self.frozen_parts else 0

    def with_steps_of(self, steps_per_epoch: int) -> Settings:
        """The same with ``epochs`` turned into ``steps``."""
        return self if self.epochs is None else replace(self, steps=self.epochs * steps_per_epoch, epochs=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, as JSON and checkpoints hold them."""
        plain = asdict(self)
        plain["frozen_parts"] = list(self.frozen_parts)
        if isinstance(plain["loss"]["rho"], tuple):
            plain["loss"]["rho"] = list(plain["loss"]["rho"])
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Settings:
        """The inverse of :meth:`to_dict`. A name that does not exist raises :class:`UserError`."""
        if not isinstance(plain, dict):
            raise UserError(f"settings that cannot be used: {type(plain).__name__} instead of a table of names")
        unknown = set(plain) - {item.name for item in fields(cls)}
        if unknown:
            raise UserError(f"unknown settings: {', '.join(sorted(unknown))}")
        try:
            loss = dict(plain.get("loss", {}))
            if isinstance(loss.get("rho"), list):
                loss["rho"] = tuple(loss["rho"])
            frozen = tuple(plain.get("frozen_parts", ()))
            return cls(**{**plain, "loss": AttBalanceConfig(**loss), "frozen_parts": frozen})
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"settings that cannot be used: {error}") from None


def _require_at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise UserError(f"{name} must be at least {least}, got {value}")


def _require_known(what: str, name: str, known: Iterable[str]) -> None:
    """An unknown name is refused before any data is made."""
    if name not in known:
        raise UserError(f"unknown {what} {name!r}; there is: {', '.join(known)}")
