"""``attbalance data list | card | export``: the built-in benchmark. ``attbalance data check``: data in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from attbalance_ext.grounding.commands.train import CacheOption
from attbalance_ext.grounding.console import output
from attbalance_ext.grounding.data import FORMATS, SPLITS, card, export
from attbalance_ext.grounding.data.benchmarks import BENCHMARKS
from attbalance_ext.grounding.data.check import Found, check
from attbalance_ext.grounding.data.grammar import FLAVOURS

data = typer.Typer(help="The built-in benchmark: names, statistics, export. Of files: check.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="Name of a data set, for example builtin:refcoco.")]
SizeOption = Annotated[int, typer.Option(help="Side of the image in pixels.")]


def register(app: typer.Typer) -> None:
    app.add_typer(data, name="data")


@data.command("list")
def list_names() -> None:
    """Name the data sets and their splits."""
    for flavour in FLAVOURS:
        print(f"builtin:{flavour:10} builtin:{flavour}-hard")
    print(f"splits: {', '.join(SPLITS)}")
    print("in files (one name a line, as different formats call it; see 'attbalance data check'):")
    for benchmark in BENCHMARKS:
        print(f"{' = '.join(benchmark.names):28} splits: {', '.join(benchmark.splits)}")


@data.command("card")
def show_card(
    name: NameArgument,
    size: SizeOption = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything, as JSON.")] = False,
    cache: CacheOption = None,
) -> None:
    """Show the statistics of a data set: sizes, sentence lengths, boxes, chance level, what the words are needed for.

    Example: attbalance data card builtin:refcoco
    """
    found = card(name, cache=cache, size=size)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    table = Table("", *found["splits"], title=f"{found['name']}, {size} px, version {found['content_version']}")
    splits = found["splits"].values()
    for name_of_row, values in (
        ("scenes", [f"{split['scenes']}" for split in splits]),
        ("sentences", [f"{split['sentences']}" for split in splits]),
        ("distinct sentences", [f"{split['distinct_sentences']}" for split in splits]),
        ("seen in training, word for word", [_percent(split["seen_in_train"]) for split in splits]),
        ("words per sentence", [f"{split['words']['mean']:.1f}" for split in splits]),
        ("objects per scene", [f"{split['objects']['mean']:.1f}" for split in splits]),
        ("box area / image area, median", [f"{split['box_ratio']['quantiles']['0.5']:.3f}" for split in splits]),
        ("chance: any object", [_percent(split["chance"]["any_object"]) for split in splits]),
        ("chance: any of its shape", [_percent(split["chance"]["any_object_of_its_shape"]) for split in splits]),
        *(
            (f"{group} needed", [_percent(split["clauses"][group]["needed"]) for split in splits])
            for group in found["splits"]["train"]["clauses"]
        ),
    ):
        table.add_row(name_of_row, *values)
    output().print(table)


@data.command("export")
def export_files(
    name: NameArgument,
    root: Annotated[Path, typer.Argument(help="Folder to write to.")],
    format: Annotated[str, typer.Option(help=f"One of {', '.join(FORMATS)}.")] = FORMATS[0],
    size: SizeOption = 64,
    cache: CacheOption = None,
) -> None:
    """Write a data set's images and annotations in a file format of real data.

    Example: attbalance data export builtin:refcoco out --format refer
    """
    print(export(name, root, format, cache=cache, size=size))


@data.command("check")
def check_files(
    root: Annotated[Path, typer.Argument(help="Folder to look in.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything, as JSON.")] = False,
    images: Annotated[bool, typer.Option("--images", help="Decode every image, to find damaged ones.")] = False,
) -> None:
    """Say which data sets lie in a folder, how much of them, which boxes are wrong, and what is missing where.

    Looks for split files (ReSC, TransVG), the refer API's files and JSON lines. The exit code is 0 if some data set
    is complete, else 1.

    Example: attbalance data check /data/grounding
    """
    report = check(root, decode=images)
    if as_json:
        print(json.dumps(report.as_dict(), indent=1))
    else:
        for found in report.found:
            _show(found)
        if not report.found:
            print(f"nothing was found under {report.root}; there would be")
            for what, path in report.expected.items():
                print(f"  {what}: {path}")
        elif not report.usable:
            print("no data set is complete")
    if not report.usable:
        raise typer.Exit(1)


def _show(found: Found) -> None:
    print(f"{found.name} ({found.format}): {'complete' if found.complete else 'not complete'}")
    for split, what in found.splits.items():
        wrong = ", ".join(f"{count} {kind}" for kind, count in what.wrong_boxes.items())
        print(f"  {split}: {what.sentences} sentences, {what.images} images, wrong boxes: {wrong or 'none'}")
    for missing in found.missing:
        print(f"  missing: {missing}")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
