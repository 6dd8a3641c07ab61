"""``attbalance rho``: does attention in the box go with success?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from attbalance_ext.grounding.commands.analyse import DeviceOption
from attbalance_ext.grounding.commands.train import CacheOption
from attbalance_ext.grounding.console import messages, output
from attbalance_ext.grounding.files import write_json
from attbalance_ext.grounding.runs import load_run
from attbalance_ext.info import environment

if TYPE_CHECKING:
    from attbalance_ext.grounding.rho import RunRho

UNDEFINED = "undefined"


def register(app: typer.Typer) -> None:
    app.command()(rho)


def rho(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs (the best checkpoint counts), or checkpoint files.")
    ],
    split: Annotated[
        list[str] | None,
        typer.Option(help="Split to evaluate on; may be repeated; default: test. See 'attbalance data card'."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder for rho.json and the picture rho.svg.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    resamples: Annotated[int, typer.Option(min=100, help="Of the bootstrap that gives the intervals.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Draws the resamples.")] = 0,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Look at so many sentences of each split, evenly spaced; default: all.")
    ] = None,
    device: DeviceOption = "cpu",
    cache: CacheOption = None,
) -> None:
    """Correlate attention with success: Spearman's rho between in-box attention and IoU, layer by layer.

    Each rho comes with its sample size, p-value and 95 % bootstrap interval.

    Example: attbalance rho runs/plain runs/full --split test --split test_novel --out rho
    """
    from attbalance_ext.grounding.plots import require_matplotlib
    from attbalance_ext.grounding.rho import as_document, correlate
    from attbalance_ext.grounding.rho_plot import write_plot

    if out is not None:
        require_matplotlib()
    loaded = [load_run(run, device=device) for run in runs]
    console = output()
    results = []
    for result in correlate(loaded, split or ["test"], samples=samples, resamples=resamples, seed=seed, cache=cache):
        results.append(result)
        if not as_json:
            console.print(_table(result))
    document = as_document(results, versions=environment(), resamples=resamples, seed=seed)
    if as_json:
        print(json.dumps(document, allow_nan=False))
    else:
        console.print(
            "n: sentences behind the row. p: of no correlation. in box: mean attention inside the true box of the "
            "supervised map; used: of the attention that the network itself uses, words included.",
        )
    if out is not None:
        write_json(out / "rho.json", document)
        write_plot(results, out / "rho.svg", resamples=resamples)
        messages().print(f"wrote {out / 'rho.json'} and {out / 'rho.svg'}", soft_wrap=True)


def _table(result: RunRho) -> Table:
    table = Table(
        title=f"{result.name} at step {result.step}, {result.data} {result.split}",
        box=SIMPLE_HEAD,  # within 80 columns, whatever is undefined
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("layer")
    table.add_column("supervised")
    for name in ("n", "rho", "95 % interval", "p", "in box", "used"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in result.layers:
        table.add_row(
            f"{layer.layer}",
            "yes" if layer.supervised else "no",
            f"{layer.n}",
            _number(layer.rho, "+.3f"),
            UNDEFINED if layer.low is None else f"{layer.low:+.3f} {layer.high:+.3f}",
            "<1e-300" if layer.p == 0 else _number(layer.p, ".1e"),
            _number(layer.in_box, ".3f"),
            _number(layer.used_in_box, ".3f"),
        )
    return table


def _number(value: float | None, form: str) -> str:
    return UNDEFINED if value is None else f"{value:{form}}"
