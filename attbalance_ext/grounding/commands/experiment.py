"""``attbalance experiment``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from attbalance_ext.grounding.commands.train import CacheOption
from attbalance_ext.grounding.console import messages, output
from attbalance_ext.grounding.experiment.grid import Outcome, Places, default_jobs, run_grid
from attbalance_ext.grounding.experiment.spec import Cell, load_spec
from attbalance_ext.info import environment


def register(app: typer.Typer) -> None:
    app.command()(experiment)


def experiment(
    spec: Annotated[Path, typer.Argument(help="The study: a TOML file, see experiments/ in the repository.")],
    records: Annotated[
        Path | None, typer.Option(help="Folder of the records; default: 'records' beside the file.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs themselves.")] = Path("runs/experiments"),
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; default: one per processor, four per GPU.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each run.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda (all GPUs in turn) or cuda:N.")] = "cpu",
    model: Annotated[list[str] | None, typer.Option(help="Only this model; may be repeated, as may the next.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Only this data set.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Only this variant.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this seed.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is done and what is left; run nothing.")] = False,
    cache: CacheOption = None,
) -> None:
    """Run a study: every model, data set, variant and seed of a file, each once. Then: attbalance report FILE.

    Each finished run leaves a record, a small JSON file. Whatever was stopped or killed goes on with the same command;
    runs that two studies share are made once.

    Example: attbalance experiment experiments/ablation.toml --seed 0 --seed 1
    """
    study = load_spec(spec)
    cells = study.chosen(models=model or (), data=data or (), variants=variant or (), seeds=seed or ())
    places = Places(records or spec.parent / "records", runs, cache)
    left = places.left(cells)
    console = messages()
    if dry_run:
        output().print(_status(cells, places))
    console.print(f"{study.title}: {len(cells)} cells, {len(left)} runs left to do")
    if dry_run or not left:
        return
    outcome = run_grid(
        cells,
        places,
        splits=study.splits,
        versions=environment(),
        device=device,
        jobs=jobs or default_jobs(device, threads),
        threads=threads,
    )
    _report(outcome, console)
    if outcome.interrupted:
        console.print("stopped; the same command goes on from here")
        raise typer.Exit(outcome.interrupted)
    if outcome.failed:
        raise typer.Exit(1)


def _status(cells: list[Cell], places: Places) -> Table:
    table = Table("model", "data", "variant", "seed", "state", "record or run")
    for cell in cells:
        record, run = places.record(cell), places.run(cell)
        state, where = ("done", record) if record.exists() else ("begun" if run.exists() else "to do", run)
        table.add_row(cell.model, cell.data, cell.variant, f"{cell.seed}", state, f"{where}")
    return table


def _report(outcome: Outcome, console: Console) -> None:
    console.print(f"{len(outcome.finished)} runs finished")
    for cell in outcome.busy:
        console.print(f"another process is at {cell.name}")
    for name, message in outcome.failed.items():
        console.print(f"failed: {name}: {message}", soft_wrap=True)
