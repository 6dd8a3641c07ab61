"""`python -m benchmarks run | table | plot`."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.allocator import keep_freed_memory
from benchmarks.cuda import CudaClock
from benchmarks.plot import plot as draw
from benchmarks.providers import BY_DEVICE, PROVIDERS
from benchmarks.results import RESULTS, Row, append, latest, load
from benchmarks.runner import run_case
from benchmarks.suites import SUITES
from benchmarks.suites.op import OpCase
from benchmarks.table import print_tables
from benchmarks.task import MODES
from benchmarks.timing import Clock, CpuClock

app = typer.Typer(
    help="Time the fused ops against what people use instead; correctness first.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

File = Annotated[Path, typer.Option(help="The results file.")]


@app.command()
def run(
    suite: Annotated[str, typer.Option(help=f"What to measure: {', '.join(SUITES)}.")] = "op",
    device: Annotated[str, typer.Option(help="Where: cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads; PyTorch's choice when left out.")] = None,
    batch: Annotated[list[int], typer.Option(help="Samples; repeat for several cases.")] = [8, 32],  # noqa: B006
    layers: Annotated[int, typer.Option(help="Supervised layers.")] = 6,
    tokens: Annotated[int, typer.Option(help="Visual tokens.")] = 400,
    width: Annotated[int, typer.Option(help="Channels of query and key.")] = 256,
    dtype: Annotated[str, typer.Option(help=f"Of the keys: {', '.join(DTYPES)}.")] = "float32",
    teacher: Annotated[bool, typer.Option("--teacher", help="With a teacher's keys: RAC and MRC.")] = False,
    mode: Annotated[list[str], typer.Option(help=f"{', '.join(MODES)}; repeat for several.")] = list(MODES),  # noqa: B006
    provider: Annotated[
        list[str], typer.Option(help=f"{', '.join(PROVIDERS)}; repeat. All of the device's when left out.")
    ] = [],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Timed calls of each provider and mode.")] = 50,
    warm: Annotated[bool, typer.Option("--warm", help="Keep caches warm between calls (default: cold).")] = False,
    allocator: Annotated[
        str, typer.Option(help="'kept': malloc keeps freed memory; 'system': as the C library decides.")
    ] = "kept",
    output: File = RESULTS,
) -> None:
    """Check every provider against fp64, time those that pass, append rows to the results file, print the table."""
    _require("--suite", [suite], SUITES)
    _require("--device", [device], BY_DEVICE)
    _require("--dtype", [dtype], DTYPES)
    _require("--mode", mode, MODES)
    _require("--provider", provider, PROVIDERS)
    _require("--allocator", [allocator], ["kept", "system"])
    if allocator == "kept":
        keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    if (load := os.getloadavg()[0]) > 0.5:
        console.print(f"system load {load:.1f}: other programs are running, these times will be noisy", style="yellow")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: PyTorch finds no CUDA device")
    clock: Clock = CudaClock(cold=not warm) if device == "cuda" else CpuClock(cold=not warm)
    providers = [PROVIDERS[name] for name in provider] or BY_DEVICE[device]
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    for size in batch:
        case = OpCase(layers, size, tokens, width, DTYPES[dtype], teacher)
        with console.status("") as status:
            rows = run_case(
                SUITES[suite],
                case,
                providers,
                run=started,
                modes=mode,
                rounds=rounds,
                clock=clock,
                allocator=allocator,
                device=torch.device(device),
                say=lambda text, size=size: status.update(f"B = {size}: {text}"),  # type: ignore[misc]
            )
        append(rows, output)
        print_tables([rows], console)


@app.command()
def table(suite: Annotated[str | None, typer.Option(help="Only this suite.")] = None, results: File = RESULTS) -> None:
    """Print the newest rows of every case in the results file."""
    print_tables(_groups(suite, results), console)


@app.command()
def plot(
    suite: Annotated[str | None, typer.Option(help="Only this suite.")] = None,
    results: File = RESULTS,
    output: Annotated[Path, typer.Option(help="Picture to write: .svg or .png.")] = Path("benchmarks.svg"),
) -> None:
    """Draw the newest rows of every case: time of forward + backward, with the byte floor."""
    draw(_groups(suite, results), output)
    console.print(f"wrote {output}")


def _groups(suite: str | None, path: Path) -> list[list[Row]]:
    groups = [group for group in latest(load(path)) if suite in (None, group[0].suite)]
    if not groups:
        raise typer.BadParameter(f"no rows in {path}; make some with 'python -m benchmarks run'")
    return groups


def _require(option: str, given: list[str], known: Any) -> None:
    for name in given:
        if name not in known:
            raise typer.BadParameter(f"{option} {name}: choose from {', '.join(known)}")


if __name__ == "__main__":
    app()
