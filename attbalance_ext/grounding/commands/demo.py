"""``attbalance demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from attbalance_ext.grounding.commands.train import CacheOption
from attbalance_ext.grounding.console import messages, output
from attbalance_ext.grounding.demo import run_demo
from attbalance_ext.grounding.fit import Interrupted
from attbalance_ext.grounding.report.summary import Summary
from attbalance_ext.grounding.settings import Settings
from attbalance_ext.info import environment

DEFAULT = Settings()


def register(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for both runs and report.html.")] = Path("demo"),
    data: Annotated[str, typer.Option(help="Data set; see 'attbalance data list'.")] = DEFAULT.data,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run.")] = DEFAULT.steps,
    pretrain_steps: Annotated[
        int, typer.Option(min=0, help="Language-free steps for the image encoder (cached).")
    ] = DEFAULT.pretrain_steps,
    seed: Annotated[int, typer.Option(help="Of initial weights and data order.")] = DEFAULT.seed,
    cache: CacheOption = None,
) -> None:
    """See AttBalance work: train one small model without and with it, compare, write a report. About five minutes.

    Both runs have the same initial weights, data order and steps. An interrupted demo goes on where it stopped.
    """
    console = messages()
    settings = Settings(data=data, steps=steps, pretrain_steps=pretrain_steps, seed=seed)
    try:
        summaries = run_demo(settings, out, versions=environment(), cache=cache)
    except Interrupted as stop:
        console.print(f"stopped; both checkpoints are in {out}; the same command goes on from there")
        raise typer.Exit(stop.exit_code) from None
    output().print(_table(summaries, settings))
    console.print(f"report: {out / 'report.html'}", soft_wrap=True)


def _table(summaries: list[Summary], settings: Settings) -> Table:
    table = Table(
        title=f"{settings.data}, test split, {summaries[0].samples} sentences, seed {settings.seed}",
        caption="in-box: attention of the object query inside the true box, last fusion layer. Times: medians over "
        "steps; the runs took turns step by step, AttBalance with its terms on.",
    )
    table.add_column("run")
    for name in ("acc@0.5", "mean IoU", "in-box", "ms per step", "added by AttBalance"):
        table.add_column(name, justify="right")
    plain = summaries[0].step_ms
    for row in summaries:
        added = f"{row.step_ms - plain:+.1f} ms ({100 * (row.step_ms / plain - 1):+.0f} %)" if row.attbalance else ""
        table.add_row(
            row.name,
            f"{100 * row.acc50:.1f} %",
            f"{row.miou:.3f}",
            f"{row.in_box[-1]:.2f}",
            f"{row.step_ms:.1f}",
            added,
        )
    return table
