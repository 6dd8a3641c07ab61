"""The benchmark harness: a wrong provider gets no time, rows are complete, byte counts and memory are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from attbalance_ext import BackendUnavailable
from benchmarks import gate
from benchmarks.__main__ import app
from benchmarks.floor import Floor
from benchmarks.memory import kept_bytes
from benchmarks.providers import PROVIDERS
from benchmarks.providers.today import paint
from benchmarks.results import Row, append, latest, load
from benchmarks.runner import run_case
from benchmarks.suites.op import OpCase, OpInputs, OpSuite, grids_of
from benchmarks.table import print_tables
from benchmarks.task import MODES, Task
from benchmarks.timing import CpuClock, Timing, interleave

SUITE = OpSuite()
TINY = OpCase(layers=2, batch=3, tokens=16, width=32, teacher=True)
CPU = torch.device("cpu")


class Broken:
    """The reference with one result spoilt: an output, or only a gradient."""

    name, title = "broken", "a wrong provider"

    def __init__(self, spoilt: str) -> None:
        self._spoilt = spoilt

    def task(self, suite: str, inputs: OpInputs) -> Task:
        right = PROVIDERS["eager"].task(suite, inputs)
        assert right is not None

        def forward() -> list[Tensor]:
            outputs = list(right.forward())
            if self._spoilt == "output":
                outputs[1] = outputs[1] * 1.001
            elif self._spoilt == "gradient":
                outputs[1] = outputs[1].detach() + 1.001 * (outputs[1] - outputs[1].detach())
            elif self._spoilt == "nan":
                outputs[0] = outputs[0] * float("nan")
            return outputs

        return Task(forward, right.inputs)


class Missing:
    name, title = "missing", "a provider that cannot run here"

    def task(self, suite: str, inputs: OpInputs) -> Task:
        raise BackendUnavailable("no such hardware")


def run(*providers: object, case: OpCase = TINY) -> list[Row]:
    return run_case(SUITE, case, providers, run="now", rounds=2, clock=CpuClock(cold=False))  # type: ignore[arg-type]


@pytest.mark.parametrize("spoilt", ["output", "gradient", "nan"])
def test_a_wrong_provider_is_caught_and_not_timed(spoilt: str) -> None:
    rows = run(Broken(spoilt))
    broken = [row for row in rows if row.provider == "broken"]
    assert len(broken) == len(MODES)
    for row in broken:
        assert row.status.startswith("failed")
        assert row.timing is None
        assert row.error is not None
        assert row.error > SUITE.tolerance(TINY)


def test_the_gate_passes_what_is_only_wrapped() -> None:
    assert all(row.status == "ok" and row.timing for row in run(Broken("nothing")))


def test_a_provider_that_cannot_run_says_why() -> None:
    row = next(row for row in run(Missing()) if row.provider == "missing")
    assert row.status == "unavailable: no such hardware"
    assert row.timing is None


@pytest.mark.parametrize("name", ["eager", "today", "ours-cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("teacher", [False, True])
def test_providers_pass_the_gate(name: str, dtype: torch.dtype, teacher: bool) -> None:
    case = OpCase(layers=2, batch=3, tokens=500, width=64, dtype=dtype, teacher=teacher)
    rows = [row for row in run(PROVIDERS[name], case=case) if row.provider == name]
    assert [row.status for row in rows] == ["ok"] * len(MODES)


def test_rows_are_complete_and_survive_the_file(tmp_path: Path) -> None:
    rows = run(PROVIDERS["eager"])
    assert {(row.provider, row.mode) for row in rows} == {
        (name, mode) for name in ("eager", "floor", "floor-fresh") for mode in MODES
    }
    for row in rows:
        assert row.timing is not None
        assert 0 < row.timing.fastest <= row.timing.p20 <= row.timing.median <= row.timing.p80
        assert row.timing.samples == 2
        assert row.floor > 0
        assert row.case == {"L": 2, "B": 3, "N": 16, "D": 32, "dtype": "float32", "teacher": True}
        assert row.environment["threads"] == torch.get_num_threads()
        assert row.environment["torch"] == torch.__version__
    append(rows, tmp_path / "results.jsonl")
    assert load(tmp_path / "results.jsonl") == rows


def test_latest_keeps_one_run_of_each_case(tmp_path: Path) -> None:
    rows = run(PROVIDERS["eager"])
    path = tmp_path / "results.jsonl"
    append(rows, path)
    path.write_text(path.read_text() + path.read_text().replace('"run": "now"', '"run": "later"'))
    (group,) = latest(load(path))
    assert {row.run for row in group} == {"later"}
    assert len(group) == len(rows)


@pytest.mark.parametrize(
    ("dtype", "teacher", "read", "written"),
    [(torch.float32, False, 2 * 3 * 16 * 32 * 4, 2 * 3 * 16 * 32 * 4), (torch.bfloat16, True, 12288, 6144)],
)
def test_byte_formula_counts_the_tensors_it_names(dtype: torch.dtype, teacher: bool, read: int, written: int) -> None:
    case = OpCase(layers=2, batch=3, tokens=16, width=32, dtype=dtype, teacher=teacher)
    size = SUITE.bytes(case)
    assert (size.read, size.write) == (read, written)
    reads, writes = SUITE.floor(SUITE.inputs(case, CPU))
    assert sum(t.nbytes for t in reads) == read
    assert sum(t.nbytes for t in writes) == written
    namespace = {"L": 2, "B": 3, "N": 16, "D": 32}
    assert eval(size.write_formula.split("=")[1], namespace) == written
    assert eval(size.read_formula.split("=")[1], namespace) == read


def test_floor_writes_every_tensor() -> None:
    tensors = [torch.full((5, 3), 7.0), torch.full((4,), 7.0, dtype=torch.bfloat16)]
    Floor([torch.ones(3)], tensors, CpuClock(cold=False)).write()
    assert not any((t == 7).any() for t in tensors)


def test_kept_memory_counts_storages_once_and_no_leaf() -> None:
    x = torch.randn(10, 10, requires_grad=True)

    def forward() -> list[Tensor]:
        y = x.exp()  # saves its result: 400 bytes
        return [(y * y[:5].sum()).sin()]  # y again, a scalar, and the product

    assert kept_bytes(Task(forward, [x])) == 400 + 4 + 400
    assert kept_bytes(Task(lambda: [x * x], [x])) == 0


def test_op_keeps_a_small_fraction_of_the_keys() -> None:
    case = OpCase(layers=2, batch=2)
    task = PROVIDERS["ours-cpu"].task("op", SUITE.inputs(case, CPU))
    assert task is not None
    assert kept_bytes(task) <= 0.02 * SUITE.bytes(case).read


def test_painted_masks_equal_the_region() -> None:
    """The usual way's pixel masks and the library's region are the same input, or the gate compares two problems."""
    for tokens in (1, 31, 400, 500, 1369):
        inputs = SUITE.inputs(OpCase(layers=1, batch=8, tokens=tokens, width=32), CPU)
        mask = inputs.region.mask()
        assert torch.equal(paint(inputs.boxes, inputs.grids), mask)
        assert mask.any(-1).all()


def test_grids() -> None:
    assert grids_of(400) == ((20, 20),)
    assert grids_of(500) == ((20, 20), (10, 10))
    assert grids_of(12) == ((3, 4),)
    assert grids_of(31) == ((1, 31),)


def test_interleaving_rotates_and_times_only_the_call() -> None:
    calls = []

    def contender(name: str):
        def prepare():
            calls.append(f"prepare {name}")
            return lambda: calls.append(f"run {name}")

        return prepare

    timings = interleave({"a": contender("a"), "b": contender("b")}, CpuClock(), rounds=2, warmup=1)
    assert {name: timing.samples for name, timing in timings.items()} == {"a": 2, "b": 2}
    order = [call.split()[1] for call in calls if call.startswith("run")]
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert calls[0::2] == [f"prepare {name}" for name in order]


def test_timing_quantiles() -> None:
    timing = Timing.of([s / 1000 for s in (5, 1, 2, 3, 4, 6)])
    assert timing == pytest.approx(Timing(median=3.5, p20=2.0, p80=5.0, fastest=1.0, samples=6))


def test_relative_error_of_bad_results() -> None:
    want = torch.tensor([3.0, 4.0])
    assert gate.relative_error(want * 1.01, want) == pytest.approx(0.01, rel=1e-5)
    assert gate.relative_error(torch.zeros(3), want) == float("inf")
    assert gate.relative_error(torch.tensor([float("nan"), 4.0]), want) == float("inf")


def test_table_shows_no_speedup_for_a_failed_provider(tmp_path: Path) -> None:
    from rich.console import Console

    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    print_tables([run(PROVIDERS["eager"], Broken("output"))], console)
    line = next(line for line in console.export_text().splitlines() if line.strip().startswith("broken"))
    assert line.split() == ["broken", *["-"] * 7, "failed"]


def test_command_line(tmp_path: Path) -> None:
    results, picture = tmp_path / "results.jsonl", tmp_path / "plot.svg"
    shapes = ["--batch", "2", "--layers", "1", "--tokens", "16", "--width", "16", "--rounds", "2"]
    shapes += ["--allocator", "system"]  # the other choice would hold for every later test
    done = CliRunner().invoke(app, ["run", *shapes, "--provider", "eager", "--output", str(results)])
    assert done.exit_code == 0, done.output
    assert {json.loads(line)["provider"] for line in results.read_text().splitlines()} >= {"eager", "floor"}
    assert CliRunner().invoke(app, ["table", "--results", str(results)]).exit_code == 0
    assert CliRunner().invoke(app, ["plot", "--results", str(results), "--output", str(picture)]).exit_code == 0
    assert picture.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--suite", "nosuch"],
        ["run", "--dtype", "int8"],
        ["run", "--mode", "sideways"],
        ["run", "--device", "tpu"],
        ["run", "--provider", "nosuch"],
        ["table", "--results", "nosuch.jsonl"],
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert arguments[-1] in done.output
    assert "Traceback" not in done.output
