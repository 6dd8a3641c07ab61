"""Runs as folders: starting one, resuming one, reading a trained model back."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from attbalance_ext import available_backends
from attbalance_ext.grounding import pretrain
from attbalance_ext.grounding.compilation import require_compiler
from attbalance_ext.grounding.data import GroundingDataset, Vocabulary, load_dataset
from attbalance_ext.grounding.data.cache import cache_directory
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.files import load_checkpoint
from attbalance_ext.grounding.models import GroundingModel, build_model
from attbalance_ext.grounding.settings import Settings
from attbalance_ext.grounding.split import PreparedSplit
from attbalance_ext.grounding.train import BEST, HISTORY, LAST, Trainer


@dataclass(frozen=True)
class Run:
    """A trained model and what is known about its training."""

    directory: Path
    settings: Settings
    step: int
    vocabulary: Vocabulary
    model: GroundingModel
    history: dict[str, list[dict[str, Any]]]


def start_run(
    settings: Settings, directory: Path, *, cache: Path | None = None, like: Trainer | None = None
) -> Trainer:
    """Load data, build and pre-train the model, and give back a trainer at step 0.

    ``like``: a trainer, still at step 0, of the same model, data and seed: its initial weights and its prepared
    splits are shared instead of made again.
    """
    refuse_existing(directory)
    _require_trainable(settings)
    if like is not None:
        model = _fresh_model(settings, like.split.vocabulary)
        model.load_state_dict(like.model.state_dict())
        return Trainer(settings, model, like.split, like.validation, directory)
    train = load_dataset(settings.data, "train", cache=cache, size=settings.size)
    vocabulary = Vocabulary.build(train.sentences)
    model = _fresh_model(settings, vocabulary)
    encoder = _fresh_model(replace(settings, seed=pretrain.SEED), vocabulary).image_encoder
    if settings.pretrain_steps and encoder is not None and model.image_encoder is not None:
        folder = cache_directory(cache) / "encoders"
        pretrain.load_pretrained(encoder, train, settings.pretrain_steps, torch.device(settings.device), folder)
        model.image_encoder.load_state_dict(encoder.state_dict())
    return _trainer(settings, model, vocabulary, train, directory, cache)


def resume_run(directory: Path, *, cache: Path | None = None) -> Trainer:
    """A trainer that goes on exactly where ``directory``'s last checkpoint ends."""
    state, settings = _read(directory / LAST)
    _require_trainable(settings)
    vocabulary, model = _trained_model(directory / LAST, state, settings)
    train = load_dataset(settings.data, "train", cache=cache, size=settings.size)
    trainer = _trainer(settings, model, vocabulary, train, directory, cache)
    trainer.load_state_dict(state)
    return trainer


def load_run(path: Path, *, device: str = "cpu") -> Run:
    """Read a run's folder (its best checkpoint, else its last) or one checkpoint file."""
    if not path.exists():
        raise UserError(f"no run at {path}; a run is a folder written by 'attbalance train', or a checkpoint in it")
    directory = path if path.is_dir() else path.parent
    if path.is_dir():
        path = directory / BEST if (directory / BEST).exists() else directory / LAST
    state, settings = _read(path)
    settings = replace(settings, device=device)
    require_runnable(settings)
    vocabulary, model = _trained_model(path, state, settings)
    history = directory / HISTORY
    return Run(
        directory=directory,
        settings=settings,
        step=state["step"],
        vocabulary=vocabulary,
        model=model.to(device).eval(),
        history=json.loads(history.read_text()) if history.exists() else state["log"]["history"],
    )


def refuse_existing(directory: Path) -> None:
    """A finished or unfinished run is never written over."""
    if (directory / LAST).exists():
        raise UserError(
            f"{directory} already holds a run; continue it with --resume {directory}, or choose another --out"
        )


def require_runnable(settings: Settings) -> None:
    """Refuse a device or backend that cannot run here before any time is spent."""
    if settings.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"device {settings.device!r} is not available here; there is: cpu")
    backend, backends = settings.backend, available_backends()
    if backend == "auto":
        backend = os.environ.get("ATTBALANCE_BACKEND", "auto")
    if backend not in ("auto", *backends):
        raise UserError(f"unknown ATTBALANCE_BACKEND {backend!r}; there is: auto, {', '.join(backends)}")
    if reasons := backends.get(backend):
        raise UserError(f"backend {backend!r} cannot run here: {'; '.join(reasons)}")


def _require_trainable(settings: Settings) -> None:
    require_runnable(settings)
    if settings.compile:
        require_compiler(torch.device(settings.device))


def _read(path: Path) -> tuple[dict[str, Any], Settings]:
    """A run's checkpoint and its settings; another kind of checkpoint is refused."""
    state = load_checkpoint(path)
    missing = {"settings", "vocabulary", "model", "step", "log"} - state.keys()
    if missing:
        raise UserError(f"{path} is not a run's checkpoint: it has no {', '.join(sorted(missing))}")
    return state, Settings.from_dict(state["settings"])


def _trained_model(path: Path, state: dict[str, Any], settings: Settings) -> tuple[Vocabulary, GroundingModel]:
    vocabulary = Vocabulary(state["vocabulary"])
    model = _fresh_model(settings, vocabulary)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise UserError(f"{path} does not hold the weights of a {settings.model}: {error}") from None
    return vocabulary, model


def _fresh_model(settings: Settings, vocabulary: Vocabulary) -> GroundingModel:
    torch.manual_seed(settings.seed)
    return build_model(
        settings.model, vocabulary_size=len(vocabulary), image_size=settings.size, **settings.model_options
    )


def _trainer(
    settings: Settings,
    model: GroundingModel,
    vocabulary: Vocabulary,
    train: GroundingDataset,
    directory: Path,
    cache: Path | None,
) -> Trainer:
    device = torch.device(settings.device)
    model.to(device)
    validation = load_dataset(settings.data, "val", cache=cache, size=settings.size)
    return Trainer(
        settings,
        model,
        PreparedSplit(train, vocabulary, model, device),
        PreparedSplit(validation, vocabulary, model, device),
        directory,
    )
