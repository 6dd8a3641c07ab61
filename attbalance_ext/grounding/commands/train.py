"""``attbalance train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from attbalance_ext import AttBalanceConfig
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.fit import Interrupted, fit
from attbalance_ext.grounding.runs import resume_run, start_run
from attbalance_ext.grounding.settings import Settings
from attbalance_ext.grounding.train import BEST, LAST, Trainer

DEFAULT = Settings()
LOSS = AttBalanceConfig()

_RUN, _DATA, _TRAINING, _ATTBALANCE = "Run", "Model and data", "Training", "AttBalance"

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
        typer.Option(help="Continue the run in this folder exactly where it stopped.", rich_help_panel=_RUN),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.", rich_help_panel=_RUN)] = DEFAULT.device,
    seed: Annotated[
        int, typer.Option(help="Of initial weights, data order and dropout.", rich_help_panel=_RUN)
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
    model: Annotated[str, typer.Option(help="Name of the model.", rich_help_panel=_DATA)] = DEFAULT.model,
    data: Annotated[
        str, typer.Option(help="Name of the data set; see 'attbalance data list'.", rich_help_panel=_DATA)
    ] = DEFAULT.data,
    size: Annotated[int, typer.Option(help="Side of the image in pixels.", rich_help_panel=_DATA)] = DEFAULT.size,
    pretrain_steps: Annotated[
        int,
        typer.Option(help="Language-free steps for the frozen image encoder (cached).", rich_help_panel=_DATA),
    ] = DEFAULT.pretrain_steps,
    steps: Annotated[int, typer.Option(min=1, rich_help_panel=_TRAINING)] = DEFAULT.steps,
    batch_size: Annotated[int, typer.Option(min=1, rich_help_panel=_TRAINING)] = DEFAULT.batch_size,
    lr: Annotated[
        float, typer.Option(min=0, help="Peak learning rate of AdamW.", rich_help_panel=_TRAINING)
    ] = DEFAULT.learning_rate,
    weight_decay: Annotated[float, typer.Option(min=0, rich_help_panel=_TRAINING)] = DEFAULT.weight_decay,
    warmup_steps: Annotated[
        int, typer.Option(min=0, help="Linear warm-up before the cosine.", rich_help_panel=_TRAINING)
    ] = DEFAULT.warmup_steps,
    clip: Annotated[
        float, typer.Option(min=0, help="Largest norm of the gradient.", rich_help_panel=_TRAINING)
    ] = DEFAULT.clip,
    validate_every: Annotated[
        int, typer.Option(min=1, help="Steps between validations and checkpoints.", rich_help_panel=_TRAINING)
    ] = DEFAULT.validate_every,
    early_stop: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="PATIENCE",
            help="Stop after so many validations without a better accuracy.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
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

    Each run is a folder: last.pt and best.pt (checkpoints), settings.json, history.json, tensorboard/.
    Ctrl-C stops after the current step and leaves a checkpoint that --resume continues exactly.

    [bold]Examples[/bold]

      attbalance train --out runs/full

      attbalance train --plain --out runs/plain

      attbalance train --resume runs/full

      attbalance report runs/plain runs/full --out report.html
    """
    if resume is not None:
        _refuse_other_options(context)
        trainer = resume_run(resume, cache=cache)
    else:
        settings = Settings(
            model=model,
            data=data,
            size=size,
            seed=seed,
            steps=steps,
            batch_size=batch_size,
            learning_rate=lr,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            clip=clip,
            pretrain_steps=pretrain_steps,
            attbalance=attbalance,
            loss=_loss(
                alpha_ar=alpha_ar,
                alpha_l1=alpha_l1,
                alpha_giou=alpha_giou,
                weight_rac=weight_rac,
                weight_mrc=weight_mrc,
                rho=_rho(rho),
                difficulty_from=difficulty_from,
                detach_difficulty=detach_difficulty,
                adw=adw,
                odw=odw,
            ),
            terms_fraction=terms_fraction,
            momentum=momentum,
            rule=rule,
            backend=backend,
            device=device,
            compile=compile,
            validate_every=validate_every,
            early_stop=early_stop,
        )
        trainer = start_run(settings, out, cache=cache)
    _train(trainer, Console(stderr=True))


def _train(trainer: Trainer, console: Console) -> None:
    directory = trainer.directory
    try:
        fit({directory.name: trainer})
    except Interrupted:
        console.print(
            f"stopped at step {trainer.step}; checkpoint: {directory / LAST}; "
            f"continue with: attbalance train --resume {directory}",
            soft_wrap=True,
            highlight=False,
        )
        raise typer.Exit(130) from None
    early = " (stopped early)" if trainer.step < trainer.settings.steps else ""
    console.print(
        f"done at step {trainer.step}{early}: best validation accuracy {100 * trainer.best_accuracy:.1f} % "
        f"at step {trainer.best_step}, in {directory / BEST}",
        soft_wrap=True,
        highlight=False,
    )


def _refuse_other_options(context: typer.Context) -> None:
    """With --resume the settings are the checkpoint's: another option would be ignored, so it is refused."""
    given = [
        f"--{name.replace('_', '-')}"
        for name in context.params
        if name not in ("resume", "cache")
        and getattr(context.get_parameter_source(name), "name", "DEFAULT") != "DEFAULT"
    ]
    if given:
        raise UserError(f"--resume takes its settings from the checkpoint; leave out {', '.join(given)}")


def _rho(text: str) -> str | tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        return text


def _loss(**options: Any) -> AttBalanceConfig:
    try:
        return AttBalanceConfig(**options)
    except ValueError as error:
        raise UserError(str(error)) from None
