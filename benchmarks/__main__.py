"""`python -m benchmarks run | table | plot`."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.models import MODELS
from benchmarks.allocator import keep_freed_memory
from benchmarks.bandwidth import copy_bandwidth
from benchmarks.cuda import CudaClock
from benchmarks.markdown import markdown_tables
from benchmarks.plot import plot as draw
from benchmarks.providers import PROVIDERS, on_device
from benchmarks.results import RESULTS, Row, append, latest, load
from benchmarks.runner import run_case
from benchmarks.suites import SUITES
from benchmarks.suites.tap import PRECISIONS
from benchmarks.sweep import NoSuchOption, cases
from benchmarks.table import print_tables
from benchmarks.timing import Clock, CpuClock

app = typer.Typer(
    help="Time attbalance_ext against what people use instead; correctness first.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

File = Annotated[Path, typer.Option(help="The results file.")]
Only = Annotated[str | None, typer.Option(help="Only this suite.")]
On = Annotated[str | None, typer.Option(help="Only rows from cpu or cuda.")]
_NONE: list[Any] = []


@app.command()
def run(
    suite: Annotated[str, typer.Option(help=f"What to measure: {', '.join(SUITES)}.")] = "op",
    device: Annotated[str, typer.Option(help="Where: cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads; PyTorch's choice when left out.")] = None,
    batch: Annotated[list[int], typer.Option(help="Samples. This and what follows: repeat for several cases.")] = _NONE,
    layers: Annotated[list[int], typer.Option(help="Supervised layers (op, tail, tap).")] = _NONE,
    tokens: Annotated[list[int], typer.Option(help="Visual tokens (op, tap).")] = _NONE,
    width: Annotated[list[int], typer.Option(help="Channels (op, tap).")] = _NONE,
    dtype: Annotated[list[str], typer.Option(help=f"Of the keys (op): {', '.join(DTYPES)}.")] = _NONE,
    precision: Annotated[list[str], typer.Option(help=f"Of the host (tap, step): {', '.join(PRECISIONS)}.")] = _NONE,
    words: Annotated[list[int], typer.Option(help="Words beside the visual tokens (tap).")] = _NONE,
    heads: Annotated[list[int], typer.Option(help="Heads of the host (tap).")] = _NONE,
    hidden: Annotated[list[int], typer.Option(help="Width of the host's feed-forward layers (tap).")] = _NONE,
    dropout: Annotated[list[float], typer.Option(help="Of the host (tap).")] = _NONE,
    model: Annotated[list[str], typer.Option(help="Grounding model (step).")] = _NONE,
    size: Annotated[list[int], typer.Option(help="Side of the canvas in pixels (step).")] = _NONE,
    teacher: Annotated[bool, typer.Option("--teacher", help="With a teacher's keys: RAC and MRC (op, tap).")] = False,
    no_teacher: Annotated[
        bool, typer.Option("--no-teacher", help="Without; together with --teacher: both (op, tap).")
    ] = False,
    mode: Annotated[list[str], typer.Option(help="forward, backward or both; repeat. All when left out.")] = _NONE,
    provider: Annotated[list[str], typer.Option(help="Repeat. All of the suite's when left out.")] = _NONE,
    rounds: Annotated[int | None, typer.Option(help="Timed calls of each; the suite's number when left out.")] = None,
    warm: Annotated[bool, typer.Option("--warm", help="Keep caches warm between calls (default: cold).")] = False,
    allocator: Annotated[
        str, typer.Option(help="'kept': malloc keeps freed memory; 'system': as the C library decides.")
    ] = "kept",
    output: File = RESULTS,
) -> None:
    """Check every provider against the truth, time those that pass, append rows to the results file, print tables."""
    _require("--suite", [suite], SUITES)
    _require("--device", [device], ["cpu", "cuda"])
    _require("--dtype", dtype, DTYPES)
    _require("--precision", precision, PRECISIONS)
    _require("--model", model, MODELS)
    _require("--mode", mode, SUITES[suite].modes)
    _require("--provider", provider, [known.name for known in PROVIDERS[suite]])
    _require("--allocator", [allocator], ["kept", "system"])
    given: dict[str, list[Any]] = {
        "batch": batch,
        "layers": layers,
        "tokens": tokens,
        "width": width,
        "dtype": [DTYPES[name] for name in dtype],
        "precision": precision,
        "words": words,
        "heads": heads,
        "hidden": hidden,
        "dropout": dropout,
        "model": model,
        "size": size,
        "teacher": [value for value, asked in ((False, no_teacher), (True, teacher)) if asked],
    }
    try:
        chosen = cases(SUITES[suite], given)
    except NoSuchOption as reason:
        raise typer.BadParameter(str(reason)) from None
    if allocator == "kept":
        keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    if (load := os.getloadavg()[0]) > 0.5:
        console.print(f"system load {load:.1f}: other programs are running, these times will be noisy", style="yellow")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: PyTorch finds no CUDA device")
    where = torch.device(device)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with console.status("measuring the bandwidth of a copy") as status:
        clock: Clock = CudaClock(cold=not warm) if device == "cuda" else CpuClock(cold=not warm)
        bandwidth = copy_bandwidth(clock, where)
        wrong = False
        for number, case in enumerate(chosen, 1):
            title = f"case {number} of {len(chosen)}, {', '.join(f'{k}={v}' for k, v in case.describe().items())}"
            try:
                rows = run_case(
                    SUITES[suite],
                    case,
                    [known for known in on_device(suite, device) if not provider or known.name in provider],
                    run=started,
                    modes=mode or None,
                    rounds=rounds,
                    clock=clock,
                    allocator=allocator,
                    device=where,
                    bandwidth=bandwidth,
                    say=lambda text, title=title: status.update(f"{title}: {text}"),  # type: ignore[misc]
                )
            except UserError as reason:  # a model that this canvas or this installation is not for
                raise typer.BadParameter(str(reason)) from None
            append(rows, output)
            print_tables([rows], console)
            wrong |= any(row.status.startswith("failed") for row in rows)
    if wrong:
        raise typer.Exit(1)  # somebody's results were wrong; the tables say whose


@app.command()
def table(
    suite: Only = None,
    device: On = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="One small table a suite and machine.")] = False,
    results: File = RESULTS,
) -> None:
    """Print the newest rows of every case in the results file."""
    groups = _groups(suite, device, results)
    if markdown:
        typer.echo(markdown_tables(groups))
    else:
        print_tables(groups, console)


@app.command()
def plot(
    suite: Only = None,
    device: On = None,
    results: File = RESULTS,
    output: Annotated[Path, typer.Option(help="Picture to write: .svg or .png.")] = Path("benchmarks.svg"),
) -> None:
    """Draw the newest rows of every case: time and memory of the whole work, with the byte floor where there is one."""
    draw(_groups(suite, device, results), output)
    console.print(f"wrote {output}")


def _groups(suite: str | None, device: str | None, path: Path) -> list[list[Row]]:
    _require("--device", [device or "cpu"], ["cpu", "cuda"])
    groups = [
        group
        for group in latest(load(path))
        if suite in (None, group[0].suite) and device in (None, group[0].environment["device"])
    ]
    if not groups:
        raise typer.BadParameter(f"no rows in {path}; make some with 'python -m benchmarks run'")
    return groups


def _require(option: str, given: list[str], known: Any) -> None:
    for name in given:
        if name not in known:
            raise typer.BadParameter(f"{option} {name}: choose from {', '.join(known)}")


if __name__ == "__main__":
    app()
