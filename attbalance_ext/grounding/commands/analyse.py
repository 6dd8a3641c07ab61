"""``attbalance eval | report``: what trained models do on a split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from attbalance_ext.grounding.commands.train import CacheOption
from attbalance_ext.grounding.console import messages, output
from attbalance_ext.grounding.evaluate import Evaluation, evaluate
from attbalance_ext.grounding.experiment.findings import findings
from attbalance_ext.grounding.experiment.spec import load_spec
from attbalance_ext.grounding.runs import Run, load_run
from attbalance_ext.grounding.sources import open_split
from attbalance_ext.info import environment

RunArgument = Annotated[
    Path, typer.Argument(help="A run's folder (its best checkpoint counts), or one checkpoint file.")
]
SplitOption = Annotated[str, typer.Option(help="Split to evaluate on; see 'attbalance data card'.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate_run)
    app.command()(report)


def evaluate_run(
    run: RunArgument,
    split: SplitOption = "test",
    device: DeviceOption = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    cache: CacheOption = None,
) -> None:
    """Evaluate a trained model: accuracy, IoU, and where its object query looks.

    Example: attbalance eval runs/full --split test
    """
    loaded = load_run(run, device=device)
    metrics = _evaluate(loaded, split, cache).metrics()
    if as_json:
        print(json.dumps({"run": str(run), "step": loaded.step, "split": split, **metrics}))
        return
    table = Table("metric", "value", title=f"{run} at step {loaded.step}, {loaded.settings.data} {split}")
    table.add_row("sentences", f"{metrics['samples']}")
    table.add_row("acc@0.5", f"{100 * metrics['acc50']:.1f} %")
    table.add_row("acc@0.7", f"{100 * metrics['acc70']:.1f} %")
    table.add_row("mean IoU", f"{metrics['miou']:.3f}")
    table.add_row("in-box attention per layer", "  ".join(f"{value:.2f}" for value in metrics["in_box"]))
    table.add_row("rho per layer", "  ".join(f"{value:+.2f}" for value in metrics["rho"]))
    output().print(table)


def report(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Folders of runs over the same data; the first is the baseline.")
    ] = None,
    study: Annotated[
        list[Path] | None, typer.Option(help="A study's TOML file, with its records beside it; may be repeated.")
    ] = None,
    records: Annotated[
        Path | None, typer.Option(help="Folder of the studies' records; default: 'records' beside each file.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the studies' tables as Markdown and write no page.")
    ] = False,
    figures: Annotated[
        Path | None, typer.Option(help="Write the studies' figures into this folder, as SVG, beside the page.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    split: SplitOption = "test",
    examples: Annotated[int, typer.Option(min=1, help="Pictures per outcome.")] = 4,
    seed: Annotated[int, typer.Option(help="Draws the pictures.")] = 0,
    cache: CacheOption = None,
) -> None:
    """Write one self-contained HTML page about runs and studies.

    Of runs: figures, curves, rho per layer, attention on test images. Of studies: tables with intervals and paired
    tests, curves, attention, rho, what has not been run.

    Examples:

      attbalance report runs/plain runs/full --out report.html

      attbalance report --study experiments/ablation.toml --out evidence.html
    """
    from attbalance_ext.grounding.report import write_report
    from attbalance_ext.grounding.report.studies import markdown as as_markdown
    from attbalance_ext.grounding.report.studies import write_figures

    specs = [load_spec(path) for path in study or ()]
    studies = [findings(spec, records or spec.path.parent / "records") for spec in specs]
    if figures is not None:
        for found in studies:
            write_figures(found, figures)
    if markdown:
        print("\n\n".join(as_markdown(found) for found in studies))
        return
    write_report(
        [load_run(run) for run in runs or ()],
        out,
        versions=environment(),
        studies=studies,
        split=split,
        cache=cache,
        per_group=examples,
        seed=seed,
    )
    messages().print(f"wrote {out}", soft_wrap=True)


def _evaluate(run: Run, split: str, cache: Path | None) -> Evaluation:
    settings = run.settings
    data = open_split(settings, split, run.tokenizer, run.model, cache=cache)
    return evaluate(run.model, data, rule=settings.rule, backend=settings.backend)
