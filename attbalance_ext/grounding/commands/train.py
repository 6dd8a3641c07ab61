"""``attbalance train``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from attbalance_ext import AttBalanceConfig
from attbalance_ext.grounding.console import messages
from attbalance_ext.grounding.distributed import ranks_of_this_run
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.fit import Interrupted, fit
from attbalance_ext.grounding.memory import peak_memory
from attbalance_ext.grounding.models import MODELS
from attbalance_ext.grounding.runs import WEIGHTS, resume_run, start_run
from attbalance_ext.grounding.settings import Settings
from attbalance_ext.grounding.train import BEST, LAST, Trainer

DEFAULT = Settings()
LOSS = AttBalanceConfig()

_RUN, _MODEL, _DATA, _TRAINING, _ATTBALANCE = "Run", "Model", "Data", "Training", "AttBalance"
_RENAMED = {"lr": "learning_rate", "vision_lr": "vision_rate", "text_lr": "text_rate", "frozen_part": "frozen_parts"}
_WITH_RESUME = ("device", "on_nan")
_OF_THE_COMMAND = ("out", "resume", "cache", "model")

CacheOption = Annotated[
    Path | None,
    typer.Option(help="Folder for generated data and pre-trained encoders; default: the user's cache folder."),
]


def register(app: typer.Typer) -> None:
    app.command()(train)


def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the run.", rich_help_panel=_RUN)] = Path("runs/default"),
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Continue the run in this folder exactly where it stopped, or from this checkpoint in it.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.", rich_help_panel=_RUN)] = DEFAULT.device,
    seed: Annotated[
        int, typer.Option(help="Of initial weights, data order, augmentation and dropout.", rich_help_panel=_RUN)
    ] = DEFAULT.seed,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the step up to the loss: torch.compile, which needs a C++ compiler (on a GPU: Triton).",
            rich_help_panel=_RUN,
        ),
    ] = DEFAULT.compile,
    cache: CacheOption = None,
    validate_every: Annotated[
        int, typer.Option(min=1, help="Steps between validations.", rich_help_panel=_RUN)
    ] = DEFAULT.validate_every,
    validation_samples: Annotated[
        int | None, typer.Option(min=1, help="Validate on so many sentences; default: all.", rich_help_panel=_RUN)
    ] = DEFAULT.validation_samples,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(min=1, help="Steps between checkpoints; default: after each validation.", rich_help_panel=_RUN),
    ] = DEFAULT.checkpoint_every,
    early_stop: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="PATIENCE",
            help="Stop after so many validations without a better accuracy.",
            rich_help_panel=_RUN,
        ),
    ] = DEFAULT.early_stop,
    on_nan: Annotated[
        str,
        typer.Option(
            help="A loss or gradient that is not finite: stop, or skip the step. Its batch is kept in not_finite.pt.",
            rich_help_panel=_RUN,
        ),
    ] = DEFAULT.on_nan,
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.", rich_help_panel=_MODEL)] = DEFAULT.model,
    vision_weights: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of pretrained image weights (DETR, Swin).", rich_help_panel=_MODEL),
    ] = None,
    text_weights: Annotated[
        str | None, typer.Option(help="Folder or hub id of pretrained BERT weights.", rich_help_panel=_MODEL)
    ] = None,
    max_words: Annotated[
        int | None,
        typer.Option(
            min=3,
            help="Longest sentence in tokens; default: the model's own (TransVG and QRNet: 20, 40 for RefCOCOg).",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of a Hugging Face tokenizer; default: the words of the training sentences.",
            rich_help_panel=_MODEL,
        ),
    ] = DEFAULT.tokenizer,
    pretrain_steps: Annotated[
        int,
        typer.Option(
            help="Language-free steps for a tiny model's frozen image encoder (cached).", rich_help_panel=_MODEL
        ),
    ] = DEFAULT.pretrain_steps,
    data: Annotated[
        str,
        typer.Option(
            help="Built-in data ('attbalance data list'), or with --data-root: unc, unc+, gref, gref_umd, referit, "
            "flickr, refcoco, ..., or your own ('attbalance data check ROOT').",
            rich_help_panel=_DATA,
        ),
    ] = DEFAULT.data,
    data_root: Annotated[
        str | None, typer.Option(help="Folder of annotation files and images.", rich_help_panel=_DATA)
    ] = DEFAULT.data_root,
    wrong_boxes: Annotated[
        str,
        typer.Option(help="Boxes outside the image, inverted or empty: skip, repair, error.", rich_help_panel=_DATA),
    ] = DEFAULT.wrong_boxes,
    size: Annotated[
        int, typer.Option(help="Side of the square canvas in pixels.", rich_help_panel=_DATA)
    ] = DEFAULT.size,
    train_share: Annotated[
        float, typer.Option(help="Part of the training pictures to train on.", rich_help_panel=_DATA)
    ] = DEFAULT.train_share,
    augment: Annotated[
        bool, typer.Option("--augment/--no-augment", help="Random resize, crop, colours, flip.", rich_help_panel=_DATA)
    ] = DEFAULT.augment,
    flip: Annotated[
        bool,
        typer.Option("--flip/--no-flip", help="With --augment: flips, left and right swapped.", rich_help_panel=_DATA),
    ] = DEFAULT.flip,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that read and transform images.", rich_help_panel=_DATA)
    ] = DEFAULT.workers,
    steps: Annotated[int, typer.Option(min=1, rich_help_panel=_TRAINING)] = DEFAULT.steps,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Instead of --steps.", rich_help_panel=_TRAINING)
    ] = DEFAULT.epochs,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Of one step, over all processes.", rich_help_panel=_TRAINING)
    ] = DEFAULT.batch_size,
    accumulate: Annotated[
        int,
        typer.Option(min=1, help="Parts that a process cuts its share of a batch into.", rich_help_panel=_TRAINING),
    ] = DEFAULT.accumulate,
    lr: Annotated[
        float, typer.Option(min=0, help="Peak learning rate of AdamW.", rich_help_panel=_TRAINING)
    ] = DEFAULT.learning_rate,
    vision_lr: Annotated[
        float | None,
        typer.Option(min=0, help="Of the image branch; 0 freezes it, default: --lr.", rich_help_panel=_TRAINING),
    ] = DEFAULT.vision_rate,
    text_lr: Annotated[
        float | None,
        typer.Option(min=0, help="Of the text branch; 0 freezes it, default: --lr.", rich_help_panel=_TRAINING),
    ] = DEFAULT.text_rate,
    weight_decay: Annotated[float, typer.Option(min=0, rich_help_panel=_TRAINING)] = DEFAULT.weight_decay,
    warmup_steps: Annotated[
        int, typer.Option(min=0, help="Linear warm-up.", rich_help_panel=_TRAINING)
    ] = DEFAULT.warmup_steps,
    schedule: Annotated[
        str, typer.Option(help="cosine to zero, or step: a tenth after --drop-fraction.", rich_help_panel=_TRAINING)
    ] = DEFAULT.schedule,
    drop_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Of the steps, for --schedule step.", rich_help_panel=_TRAINING)
    ] = DEFAULT.drop_fraction,
    frozen_part: Annotated[
        list[str] | None,
        typer.Option(help="Part that trains late: vision, text, fusion. May be repeated.", rich_help_panel=_TRAINING),
    ] = None,
    frozen_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="First part of the steps without them.", rich_help_panel=_TRAINING)
    ] = DEFAULT.frozen_fraction,
    clip: Annotated[
        float | None, typer.Option(min=0, help="Largest norm of the gradient.", rich_help_panel=_TRAINING)
    ] = DEFAULT.clip,
    precision: Annotated[
        str, typer.Option(help="fp32, or autocast to bf16 or fp16.", rich_help_panel=_TRAINING)
    ] = DEFAULT.precision,
    attbalance: Annotated[
        bool,
        typer.Option(
            "--attbalance/--plain", help="With AttBalance, or the plain box loss.", rich_help_panel=_ATTBALANCE
        ),
    ] = True,
    terms_fraction: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="First part of the steps with the attention terms.", rich_help_panel=_ATTBALANCE
        ),
    ] = DEFAULT.terms_fraction,
    momentum: Annotated[
        float, typer.Option(min=0, max=1, help="Of the teacher's moving average.", rich_help_panel=_ATTBALANCE)
    ] = DEFAULT.momentum,
    teacher_precision: Annotated[
        str, typer.Option(help="Of the teacher's forward pass: same, or bf16.", rich_help_panel=_ATTBALANCE)
    ] = DEFAULT.teacher_precision,
    rule: Annotated[
        str,
        typer.Option(help="Box to token weights: touch, center, coverage, nearest.", rich_help_panel=_ATTBALANCE),
    ] = DEFAULT.rule,
    backend: Annotated[
        str, typer.Option(help="Kernels: auto, or a name from 'attbalance info'.", rich_help_panel=_ATTBALANCE)
    ] = DEFAULT.backend,
    alpha_ar: Annotated[
        float, typer.Option(help="Weight of the attention terms.", rich_help_panel=_ATTBALANCE)
    ] = LOSS.alpha_ar,
    alpha_l1: Annotated[float, typer.Option(help="Weight of L1.", rich_help_panel=_ATTBALANCE)] = LOSS.alpha_l1,
    alpha_giou: Annotated[
        float, typer.Option(help="Weight of 1 - GIoU.", rich_help_panel=_ATTBALANCE)
    ] = LOSS.alpha_giou,
    weight_rac: Annotated[
        float, typer.Option(help="Weight of RAC in the attention terms.", rich_help_panel=_ATTBALANCE)
    ] = LOSS.weight_rac,
    weight_mrc: Annotated[
        float, typer.Option(help="Weight of MRC in the attention terms.", rich_help_panel=_ATTBALANCE)
    ] = LOSS.weight_mrc,
    rho: Annotated[
        str,
        typer.Option(
            help="Layer weights from: batch, global, ema, off, or one number per supervised layer: 0.1,0.3,0.2.",
            rich_help_panel=_ATTBALANCE,
        ),
    ] = str(LOSS.rho),
    difficulty_from: Annotated[
        str, typer.Option(help="Actual difficulty from: sum, mean, last.", rich_help_panel=_ATTBALANCE)
    ] = LOSS.difficulty_from,
    detach_difficulty: Annotated[
        bool,
        typer.Option(
            "--detach-difficulty", help="No gradient through the actual-difficulty weight.", rich_help_panel=_ATTBALANCE
        ),
    ] = False,
    adw: Annotated[
        bool, typer.Option("--adw/--no-adw", help="Actual-difficulty weight.", rich_help_panel=_ATTBALANCE)
    ] = True,
    odw: Annotated[
        bool, typer.Option("--odw/--no-odw", help="Objective-difficulty weight.", rich_help_panel=_ATTBALANCE)
    ] = True,
) -> None:
    """Train a grounding model.

    Defaults are those of transvg-tiny; the other models bring their papers' own, which settings.json shows.
    Each run is a folder: last.pt, previous.pt and best.pt (checkpoints), settings.json, history.json, tensorboard/.
    Ctrl-C or SIGTERM stops after the current step and leaves a checkpoint that --resume continues exactly.

    [bold]Examples[/bold]

      attbalance train --out runs/full

      attbalance train --plain --out runs/plain

      attbalance train --resume runs/full

      attbalance train --model vltvg-r50 --data unc --data-root DIR --text-weights BERT --tokenizer BERT

      torchrun --nproc-per-node 8 -m attbalance_ext.cli train --device cuda --rho global --out runs/eight

      attbalance report runs/plain runs/full --out report.html
    """
    console = messages()
    given = _given(context)
    with ranks_of_this_run() as ranks:
        if resume is not None:
            _refuse_other_options(given)
            changes = {name: given[name] for name in _WITH_RESUME if name in given}
            trainer = resume_run(resume, cache=cache, ranks=ranks, **changes)
        else:
            trainer = start_run(_settings(model, given), out, cache=cache, ranks=ranks)
        _train(trainer, console)


def _given(context: typer.Context) -> dict[str, Any]:
    """The options that were given: the others are the model's own."""
    return {
        name: value
        for name, value in context.params.items()
        if getattr(context.get_parameter_source(name), "name", "DEFAULT") != "DEFAULT"
    }


def _settings(model: str, given: dict[str, Any]) -> Settings:
    """The model's settings with what was ``given``, by the names of options."""
    changes = {_RENAMED.get(name, name): value for name, value in given.items() if name not in _OF_THE_COMMAND}
    loss = {name: changes.pop(name) for name in list(changes) if hasattr(LOSS, name)}
    if "rho" in loss:
        loss["rho"] = _rho(loss["rho"])
    if "frozen_parts" in changes:
        changes["frozen_parts"] = tuple(changes["frozen_parts"])
    options = {name: changes.pop(name) for name in (*WEIGHTS, "max_words") if name in changes}
    if "steps" in changes and "epochs" in changes:
        raise UserError("--steps and --epochs: give one of them")
    return Settings.for_model(model, loss=loss, model_options=options, **changes)


def _train(trainer: Trainer, console: Console) -> None:
    directory = trainer.directory
    try:
        fit({directory.name: trainer})
    except Interrupted as stop:
        if trainer.ranks.main:
            console.print(
                f"stopped at step {trainer.step}; checkpoint: {directory / LAST}; "
                f"continue with: attbalance train --resume {shlex.quote(str(directory))}",
                soft_wrap=True,
            )
        raise typer.Exit(stop.exit_code) from None
    if not trainer.ranks.main:
        return
    early = " (stopped early)" if trainer.step < trainer.settings.steps else ""
    console.print(
        f"done at step {trainer.step}{early}: best validation accuracy {100 * trainer.best_accuracy:.1f} % "
        f"at step {trainer.best_step}, in {directory / BEST}",
        soft_wrap=True,
    )
    if skipped := _skipped(trainer):
        console.print(f"{skipped} steps were left out, their loss or gradient was not finite", soft_wrap=True)
    last, validated = trainer.log.history["train"][-1], trainer.log.history["validation"][-1]
    console.print(
        f"loss {last['loss']:.4f}; attention in the box by layer: "
        f"{' '.join(f'{value:.2f}' for value in validated['in_box'])}; "
        f"peak memory {peak_memory(trainer.device) / 2**30:.2f} GiB",
        soft_wrap=True,
    )


def _skipped(trainer: Trainer) -> int:
    """How many steps the records say were left out."""
    records = trainer.log.history["train"]
    before = [0, *(record["step"] for record in records)]
    return sum(round(r.get("skipped", 0.0) * (r["step"] - start)) for start, r in zip(before, records, strict=False))


def _refuse_other_options(given: dict[str, Any]) -> None:
    """With --resume the settings are the checkpoint's: another option would be ignored, so it is refused."""
    others = [f"--{name.replace('_', '-')}" for name in given if name not in ("resume", "cache", *_WITH_RESUME)]
    if others:
        raise UserError(f"--resume takes its settings from the checkpoint; leave out {', '.join(others)}")


def _rho(text: str) -> str | tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        return text
