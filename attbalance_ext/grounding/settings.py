"""Everything that decides a run, in one value: saved in the checkpoint and, readable, as settings.json."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from attbalance_ext import AttBalanceConfig, available_backends
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.models import MODELS

RULES = ("touch", "center", "coverage", "nearest")


@dataclass(frozen=True)
class Settings:
    """Settings of one training run. Two runs with equal settings on one CPU give the same bits."""

    model: str = "transvg-tiny"
    data: str = "builtin:refcoco"
    size: int = 64
    """Side of the square canvas in pixels."""
    seed: int = 0
    """Decides the initial weights, the order of the data and dropout; not the data set."""
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    warmup_steps: int = 100
    clip: float = 1.0
    """Largest norm of the gradient."""
    pretrain_steps: int = 400
    """Language-free steps for the frozen image encoder; 0 leaves it random."""
    attbalance: bool = True
    """False: the plain box loss, no teacher, no tap."""
    loss: AttBalanceConfig = field(default_factory=AttBalanceConfig)
    terms_fraction: float = 2 / 3
    """The attention terms are on for this first part of the steps (the paper: 60 of 90 epochs)."""
    momentum: float = 0.9
    """Of the teacher's moving average."""
    rule: str = "touch"
    """How a box becomes weights on the visual tokens, see ``BoxRegion``."""
    backend: str = "auto"
    device: str = "cpu"
    compile: bool = False
    """The step up to the loss under ``torch.compile``. It rounds, and draws dropout, otherwise than eager PyTorch."""
    validate_every: int = 100
    """In steps; a checkpoint follows each validation."""
    early_stop: int | None = None
    """Stop after this many validations without a better accuracy; None: never."""
    model_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "validate_every", "size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.clip > 0.0:
            raise UserError(f"clip must be above 0, got {self.clip}")
        if not 0.0 <= self.terms_fraction <= 1.0:
            raise UserError(f"terms_fraction must lie in [0, 1], got {self.terms_fraction}")
        if self.early_stop is not None and self.early_stop < 1:
            raise UserError(f"early_stop must be at least 1, got {self.early_stop}")
        _require_known("model", self.model, MODELS)
        _require_known("rule", self.rule, RULES)
        _require_known("backend", self.backend, ("auto", *available_backends()))
        _require_known("device", self.device.split(":")[0], ("cpu", "cuda"))

    @property
    def terms_steps(self) -> int:
        """Number of first steps with the attention terms."""
        return round(self.terms_fraction * self.steps) if self.attbalance else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, as JSON and checkpoints hold them."""
        plain = asdict(self)
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
            return cls(**{**plain, "loss": AttBalanceConfig(**loss)})
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"settings that cannot be used: {error}") from None


def _require_known(what: str, name: str, known: Iterable[str]) -> None:
    """An unknown name is refused before any data is made."""
    if name not in known:
        raise UserError(f"unknown {what} {name!r}; there is: {', '.join(known)}")
