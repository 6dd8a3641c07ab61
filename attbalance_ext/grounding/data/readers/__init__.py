"""Reading the file formats that grounding data comes in, each into annotations."""

from __future__ import annotations

from pathlib import Path

from ..benchmarks import BENCHMARKS, Benchmark, find_benchmark
from .jsonl import JsonLines
from .refer import ReferFiles
from .source import Source
from .split_files import SplitFiles

__all__ = ["JsonLines", "ReferFiles", "Source", "SplitFiles", "sources_of", "sources_under"]


def sources_of(name: str, root: Path) -> list[Source]:
    """Every place under ``root`` where the data set ``name`` would lie: split files, refer API, JSON lines."""
    benchmark = find_benchmark(name)
    if benchmark is None:
        return [JsonLines(root, (name,))]
    return [*_published(benchmark, root), JsonLines(root, benchmark.names)]


def sources_under(root: Path) -> list[Source]:
    """Every place where a data set would lie: the published ones, and JSON lines of whatever names are there."""
    published = [source for benchmark in BENCHMARKS for source in _published(benchmark, root)]
    return [*published, *(JsonLines(root, (name,)) for name in JsonLines.names_under(root))]


def _published(benchmark: Benchmark, root: Path) -> list[Source]:
    sources: list[Source] = [SplitFiles(root, benchmark)]
    if benchmark.refer:
        sources.append(ReferFiles(root, benchmark, *benchmark.refer))
    return sources
