"""Runs as folders: starting one, resuming one, reading a trained model back."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from attbalance_ext import available_backends
from attbalance_ext.grounding import pretrain
from attbalance_ext.grounding.alone import alone_in
from attbalance_ext.grounding.compilation import require_compiler
from attbalance_ext.grounding.data.cache import cache_directory
from attbalance_ext.grounding.data.tokenizers import Tokenizer, tokenizer_from_state
from attbalance_ext.grounding.distributed import ALONE, Ranks
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.files import load_checkpoint, remove_unfinished
from attbalance_ext.grounding.log import check_history
from attbalance_ext.grounding.memory import ran_out
from attbalance_ext.grounding.models import GroundingModel, build_model, design
from attbalance_ext.grounding.order import DataOrder
from attbalance_ext.grounding.settings import Settings
from attbalance_ext.grounding.sources import make_tokenizer, open_pictures, open_split, pretraining_scenes
from attbalance_ext.grounding.train import BEST, HISTORY, LAST, PREVIOUS, Trainer

BERT_VOCABULARY = 30_522
"""Embeddings that BERT has; a model whose text branch it is has no fewer."""
WEIGHTS = ("vision_weights", "text_weights")
"""Options of a model that say where its first weights come from: of no use once it has weights of its own."""


@dataclass(frozen=True)
class Run:
    """A trained model and what is known about its training."""

    directory: Path
    checkpoint: Path
    """The file that was read."""
    settings: Settings
    step: int
    tokenizer: Tokenizer
    model: GroundingModel
    history: dict[str, list[dict[str, Any]]]


def start_run(
    settings: Settings,
    directory: Path,
    *,
    cache: Path | None = None,
    like: Trainer | None = None,
    ranks: Ranks = ALONE,
) -> Trainer:
    """Load data, build and pre-train the model, and give back a trainer at step 0.

    ``like``: a trainer, still at step 0, of the same model, data and seed: its initial weights and its prepared
    splits are shared instead of made again.
    """
    refuse_existing(directory)
    _require_trainable(settings, ranks)
    if like is not None:
        model = _fresh_model(settings, like.split.tokenizer)
        model.load_state_dict(like.model.state_dict())
        return _begun(Trainer(settings, model, like.split, like.validation, directory))
    with ranks.main_first():  # what it generates or trains, the others find in the cache
        train = open_pictures(settings, "train", cache=cache)
        order = DataOrder(len(train), settings.batch_size, settings.seed)
        settings = settings.with_steps_of(order.steps_per_epoch)
        tokenizer = make_tokenizer(settings, train)
        model = _fresh_model(settings, tokenizer)
        if settings.pretrain_steps and model.image_encoder is not None:
            encoder = _fresh_model(replace(settings, seed=pretrain.SEED), tokenizer).image_encoder
            assert encoder is not None
            scenes, folder = pretraining_scenes(settings, cache=cache), cache_directory(cache) / "encoders"
            pretrain.load_pretrained(encoder, scenes, settings.pretrain_steps, torch.device(settings.device), folder)
            model.image_encoder.load_state_dict(encoder.state_dict())
    return _begun(_trainer(settings, model, tokenizer, directory, cache, ranks))


def _begun(trainer: Trainer) -> Trainer:
    """The first that a run does in its folder: until here a mistake leaves nothing behind."""
    with ExitStack() as folder:
        folder.enter_context(take_folder(trainer.directory, trainer.ranks))
        refuse_existing(trainer.directory)  # another process may have come in between
        trainer.write_settings()  # a folder that takes no files is met now, and not at the first checkpoint
        trainer.held = folder.pop_all()
    return trainer


def resume_run(
    path: Path,
    *,
    cache: Path | None = None,
    device: str | None = None,
    on_nan: str | None = None,
    ranks: Ranks = ALONE,
) -> Trainer:
    """A trainer that goes on exactly where a run's last checkpoint ends, or the one that ``path`` names.

    ``device``, ``on_nan``: others than it began with. The number of processes may be another one too.
    """
    directory, path = (path.parent, path) if path.is_file() else (path, path / LAST)
    with ExitStack() as folder:
        if path.is_file():  # a name that is wrong gets no folder
            folder.enter_context(take_folder(directory, ranks))
        try:
            state, settings = _read(path, "optimizer")
        except UserError as error:
            raise UserError(f"{error}{_another(directory, path)}") from None
        changes: dict[str, Any] = {"device": device, "on_nan": on_nan}
        settings = replace(settings, **{name: value for name, value in changes.items() if value is not None})
        _require_trainable(settings, ranks)
        tokenizer, model = _trained_model(path, state, settings)
        trainer = _trainer(settings, model, tokenizer, directory, cache, ranks)
        with _holding_a_run(path):
            _require_same_data(path, state.get("data", {}), trainer)
            trainer.load_state_dict(state)
        trainer.last_is_whole = path.name == LAST
        if ranks.main:
            for name in (LAST, PREVIOUS, BEST):
                remove_unfinished(directory / name)
        trainer.held = folder.pop_all()
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
    tokenizer, model = _trained_model(path, state, settings)
    with _holding_a_run(path):
        check_history(state["log"]["history"])
    return Run(
        directory=directory,
        checkpoint=path,
        settings=settings,
        step=state["step"],
        tokenizer=tokenizer,
        model=model.to(device).eval(),
        history=_history(directory / HISTORY) or state["log"]["history"],
    )


def _history(path: Path) -> dict[str, list[dict[str, Any]]] | None:
    """A run's records; None where there is no such file."""
    if not path.exists():
        return None
    try:
        found: dict[str, list[dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))
        check_history(found)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}; without it the records in the checkpoint are used") from None
    return found


def _another(directory: Path, path: Path) -> str:
    """What else a run may go on from that cannot from ``path``: chosen by who reads it, and never silently."""
    previous = directory / PREVIOUS
    if path.name != LAST or not previous.exists():
        return ""
    try:
        step = load_checkpoint(previous)["step"]
    except (UserError, KeyError):
        return ""
    return (
        f". The checkpoint before it is whole, of step {step}; go on with: "
        f"attbalance train --resume {shlex.quote(str(previous))}"
    )


def refuse_existing(directory: Path) -> None:
    """A finished or unfinished run is never written over; a link to a file that is elsewhere at present counts too."""
    there = [name for name in (LAST, PREVIOUS, BEST) if os.path.lexists(directory / name)]
    if there:
        from_there = {LAST: directory, PREVIOUS: directory / PREVIOUS}.get(there[0])
        going_on = f"continue it with --resume {shlex.quote(str(from_there))}, or " if from_there else ""
        raise UserError(f"{directory} already holds a run ({', '.join(there)}); {going_on}choose another --out")


@contextmanager
def take_folder(directory: Path, ranks: Ranks = ALONE) -> Iterator[None]:
    """Keep out of ``directory`` all processes that are not of this run. Collective."""
    with alone_in(directory) if ranks.main else nullcontext(True) as alone:
        if ranks.any(not alone):
            raise UserError(f"another process is training in {directory}; wait for its end, or take another folder")
        yield


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


def _require_trainable(settings: Settings, ranks: Ranks) -> None:
    require_runnable(settings)
    if ranks.world > 1 and ":" in settings.device:
        raise UserError(f"each process of torchrun has a GPU of its own: --device cuda, not {settings.device}")
    if settings.compile:
        if ranks.world > 1:
            raise UserError("--compile trains in one process: DistributedDataParallel would break its graph")
        require_compiler(torch.device(settings.device))


def _read(path: Path, *needed: str) -> tuple[dict[str, Any], Settings]:
    """A run's checkpoint with what is ``needed`` and its settings; another kind of checkpoint is refused."""
    state = load_checkpoint(path)
    missing = {"settings", "tokenizer", "model", "step", "log", *needed} - state.keys()
    if missing:
        raise UserError(f"{path} is not a run's checkpoint: it has no {', '.join(sorted(missing))}")
    wrong = "" if isinstance(state["step"], int) else f"its step is {state['step']!r}"
    try:
        settings = Settings.from_dict(state["settings"])
    except UserError as error:
        wrong = str(error)
    if wrong:
        raise UserError(f"{path} does not hold a run of this version: {wrong}")
    return state, settings


@contextmanager
def _holding_a_run(path: Path) -> Iterator[None]:
    """A checkpoint of the right format may hold anything: what the block cannot use is said in one line."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if ran_out(error):
            raise
        why = f"it has no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{path} does not hold a run of this version: {shorten(why, 300)}") from None


def _require_same_data(path: Path, known: dict[str, dict[str, Any]], trainer: Trainer) -> None:
    """``known``: what the splits held when ``path`` was written; earlier versions did not note it down."""
    for split, now in trainer.data().items():
        then = known.get(split, now)
        if then != now:
            many, few = then["sentences"], now["sentences"]
            how = f"{many} sentences then, {few} now" if many != few else f"{few} sentences, but not the same ones"
            raise UserError(
                f"{trainer.settings.data} {split} is not what it was when {path} was written ({how}); "
                "put the old data back, or start a new run"
            )


def _trained_model(path: Path, state: dict[str, Any], settings: Settings) -> tuple[Tokenizer, GroundingModel]:
    with _holding_a_run(path):
        tokenizer = tokenizer_from_state(state["tokenizer"])
        options = {name: value for name, value in settings.model_options.items() if name not in WEIGHTS}
        model = _fresh_model(replace(settings, model_options=options), tokenizer)
        try:
            model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise UserError(f"{path} does not hold the weights of a {settings.model}: {error}") from None
    return tokenizer, model


def _fresh_model(settings: Settings, tokenizer: Tokenizer) -> GroundingModel:
    torch.manual_seed(settings.seed)
    words = max(len(tokenizer), BERT_VOCABULARY) if design(settings.model).bert else len(tokenizer)
    model = build_model(settings.model, vocabulary_size=words, image_size=settings.size, **settings.model_options)
    rho, layers = settings.loss.rho, len(model.supervised)
    if settings.terms_steps and isinstance(rho, tuple) and len(rho) != layers:
        raise UserError(f"rho: {settings.model} supervises {layers} layers, and there are {len(rho)} numbers for them")
    return model


def _trainer(
    settings: Settings,
    model: GroundingModel,
    tokenizer: Tokenizer,
    directory: Path,
    cache: Path | None,
    ranks: Ranks,
) -> Trainer:
    model.to(settings.device)
    with ranks.main_first():
        train, validation = (
            open_split(settings, split, tokenizer, model, cache=cache, training=split == "train")
            for split in ("train", "val")
        )
    return Trainer(settings, model, train, validation, directory, ranks)
