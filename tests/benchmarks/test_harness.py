"""The benchmark harness: a wrong provider gets no time, rows are complete, byte counts and memory are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from attbalance_ext import BackendUnavailable, attention_terms
from benchmarks import gate, timing
from benchmarks.__main__ import app
from benchmarks.differentiable import differentiable
from benchmarks.floor import Floor
from benchmarks.memory import kept_bytes, most_alive, peak_bytes
from benchmarks.providers import PROVIDERS, ours
from benchmarks.results import RESULTS, Row, append, latest, load
from benchmarks.runner import run_case
from benchmarks.scenes import grids_of
from benchmarks.suites.op import OpCase, OpInputs, OpSuite
from benchmarks.sweep import NoSuchOption, cases
from benchmarks.table import print_tables
from benchmarks.task import Provider, Task
from benchmarks.timing import CpuClock, Timing, interleave
from benchmarks.today.masks import paint
from benchmarks.wash import smallest_that_washes

SUITE = OpSuite()
MODES = SUITE.modes
TINY = OpCase(layers=2, batch=3, tokens=16, width=32, teacher=True)
CPU = torch.device("cpu")
OP = {provider.name: provider for provider in PROVIDERS["op"]}


def broken(spoilt: str) -> Provider:
    """The reference with one result spoilt: an output, only a gradient, or one left out."""

    def task(inputs: OpInputs) -> Task:
        def forward() -> list[Tensor]:
            terms = attention_terms(inputs.student(), inputs.region, teacher=inputs.teacher(), backend="reference")
            outputs = list(terms[:3])
            if spoilt == "output":
                outputs[1] = outputs[1] * 1.001
            elif spoilt == "gradient":
                outputs[1] = outputs[1].detach() + 1.001 * (outputs[1] - outputs[1].detach())
            elif spoilt == "nan":
                outputs[0] = outputs[0] * float("nan")
            return outputs

        leaves = inputs.leaves
        if spoilt == "missing":
            del leaves["key 0"]
        return differentiable(forward, leaves, inputs.gradients)

    return Provider("broken", "a wrong provider", task)


def missing(inputs: OpInputs) -> Task:
    raise BackendUnavailable("no such hardware")


def run(*providers: Provider, case: OpCase = TINY) -> list[Row]:
    return run_case(SUITE, case, providers, run="now", rounds=2, clock=CpuClock(cold=False))


@pytest.mark.parametrize("spoilt", ["output", "gradient", "nan", "missing"])
def test_a_wrong_provider_is_caught_and_not_timed(spoilt: str) -> None:
    rows = run(broken(spoilt))
    wrong = [row for row in rows if row.provider == "broken"]
    assert len(wrong) == len(MODES)
    for row in wrong:
        assert row.status.startswith("failed")
        assert row.timing is None
        assert row.error is not None
        assert row.error > SUITE.tolerance(TINY)


def test_the_gate_passes_what_is_only_wrapped() -> None:
    assert all(row.status == "ok" and row.timing for row in run(broken("nothing")))


def test_a_provider_that_cannot_run_says_why() -> None:
    row = next(
        row for row in run(Provider("missing", "one that cannot run here", missing)) if row.provider == "missing"
    )
    assert row.status == "unavailable: no such hardware"
    assert row.timing is None


@pytest.mark.parametrize("name", ["eager", "today", "ours-cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher", [False, True])
def test_providers_pass_the_gate(name: str, dtype: torch.dtype, teacher: bool) -> None:
    case = OpCase(layers=2, batch=3, tokens=500, width=64, dtype=dtype, teacher=teacher)
    rows = [row for row in run(OP[name], case=case) if row.provider == name]
    assert [row.status for row in rows] == ["ok"] * len(MODES)


def test_rows_are_complete_and_survive_the_file(tmp_path: Path) -> None:
    rows = run(OP["eager"])
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
    rows = run(OP["eager"])
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

    def forward() -> Tensor:
        y = x.exp()  # saves its result: 400 bytes
        return (y * y[:5].sum()).sin()  # y again, a scalar, and the product

    assert kept_bytes(forward, [x]) == 400 + 4 + 400
    assert kept_bytes(lambda: x * x, [x]) == 0


def test_peak_memory_is_what_lives_at_one_time() -> None:
    def call() -> Tensor:
        a = torch.ones(1000, 1000)
        b = a + 1
        del a
        c = b + 1
        del b
        return c + 1  # with c: two at a time, of four

    already_there = torch.ones(1000, 1000)
    assert 8e6 <= peak_bytes(call, CPU) < 8.1e6
    assert peak_bytes(lambda: already_there.add_(1), CPU) < 1e5


def test_the_end_of_an_earlier_block_is_no_gain() -> None:
    assert most_alive([(1, 100), (2, -70), (3, 50), (1, -100), (4, 20)]) == 150


def test_op_keeps_a_small_fraction_of_the_keys() -> None:
    case = OpCase(layers=2, batch=2)
    task = ours.op("cpu")(SUITE.inputs(case, CPU))
    assert task.kept is not None
    assert 0 < task.kept() <= 0.02 * SUITE.bytes(case).read


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


def test_interleaving_rotates_and_times_only_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "last_level_cache", lambda: 1 << 20)
    calls = []

    def contender(name: str):
        def prepare():
            calls.append(f"prepare {name}")
            return lambda: calls.append(f"run {name}")

        return prepare

    clock = CpuClock()
    assert (clock.cache, clock.washed) == ("cold", 64 << 20)
    timings = interleave({"a": contender("a"), "b": contender("b")}, clock, rounds=2, warmup=1)
    assert {name: found.samples for name, found in timings.items()} == {"a": 2, "b": 2}
    order = [call.split()[1] for call in calls if call.startswith("run")]
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert calls[0::2] == [f"prepare {name}" for name in order]


def test_timing_quantiles() -> None:
    found = Timing.of([s / 1000 for s in (5, 1, 2, 3, 4, 6)])
    assert found == pytest.approx(Timing(median=3.5, p20=2.0, p80=5.0, fastest=1.0, samples=6))


def test_relative_error_of_bad_results() -> None:
    want = torch.tensor([3.0, 4.0])
    assert gate.relative_error(want * 1.01, want) == pytest.approx(0.01, rel=1e-5)
    assert gate.relative_error(torch.zeros(3), want) == float("inf")
    assert gate.relative_error(torch.tensor([float("nan"), 4.0]), want) == float("inf")


def test_table_shows_no_speedup_for_a_failed_provider(tmp_path: Path) -> None:
    from rich.console import Console

    console = Console(width=40, record=True, file=(tmp_path / "out").open("w"))
    print_tables([run(OP["eager"], broken("output"))], console)
    line = next(line for line in console.export_text().splitlines() if line.strip().startswith("broken"))
    assert line.split()[1:] == [*["-"] * (len(line.split()) - 2), "failed"]


def test_a_wrong_provider_is_an_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that runs the benchmarks must not take a rejected backend for a measured one; its rows are kept."""
    monkeypatch.setitem(PROVIDERS, "op", (OP["eager"], broken("gradient")))
    results = tmp_path / "results.jsonl"
    small = ["--batch", "2", "--layers", "1", "--tokens", "9", "--width", "16", "--rounds", "1", "--warm", "--teacher"]
    done = CliRunner().invoke(app, ["run", *small, "--allocator", "system", "--output", str(results)])
    assert isinstance(done.exception, SystemExit), done.output  # and no crash
    assert done.exit_code == 1
    assert {row.provider for row in load(results) if row.status.startswith("failed")} == {"broken"}


def test_command_line(tmp_path: Path) -> None:
    results, picture = tmp_path / "results.jsonl", tmp_path / "plot.svg"
    shapes = ["--batch", "8", "--layers", "1", "--tokens", "16", "--tokens", "9", "--width", "128", "--rounds", "2"]
    shapes += ["--teacher", "--no-teacher", "--warm"]
    shapes += ["--allocator", "system"]  # the other choice would hold for every later test
    done = CliRunner().invoke(app, ["run", *shapes, "--provider", "eager", "--output", str(results)])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert {row["provider"] for row in rows} >= {"eager", "floor"}
    assert {(row["case"]["N"], row["case"]["teacher"]) for row in rows} == {
        (16, False),
        (16, True),
        (9, False),
        (9, True),
    }
    assert all(row["bandwidth"] > 1e6 for row in rows)
    assert "% of copy" in done.output
    assert CliRunner().invoke(app, ["table", "--results", str(results)]).exit_code == 0
    markdown = CliRunner().invoke(app, ["table", "--markdown", "--results", str(results)])
    assert "| N=16, teacher=True | " in markdown.output
    here = CliRunner().invoke(app, ["table", "--markdown", "--device", "cpu", "--results", str(results)])
    assert here.output == markdown.output
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
        ["run", "--precision", "bf16"],
        ["run", "--suite", "step", "--mode", "forward"],
        ["run", "--suite", "step", "--model", "nosuch"],
        ["run", "--suite", "step", "--model", "qrnet-tiny", "--warm", "--allocator", "system", "--size", "20"],
        ["table", "--results", "nosuch.jsonl"],
        ["table", "--device", "tpu"],
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert arguments[-1] in done.output or arguments[-2] in done.output
    assert "Traceback" not in done.output


def test_a_sweep_is_every_combination_of_what_is_given() -> None:
    found = cases(SUITE, {"tokens": [400, 500], "teacher": [False, True], "layers": []})
    assert len(found) == 8
    assert {(case.batch, case.tokens, case.layers) for case in found} == {
        (b, n, 6) for b in (8, 32) for n in (400, 500)
    }
    with pytest.raises(NoSuchOption, match="model"):
        cases(SUITE, {"model": ["transvg-r50"]})


def test_the_wash_is_as_large_as_it_has_to_be() -> None:
    seconds = {1: 0.4, 2: 0.9, 4: 0.99, 8: 1.0, 16: 1.0}
    assert smallest_that_washes([1, 2, 4, 8], 16, seconds.__getitem__) == 8
    assert smallest_that_washes([], 16, seconds.__getitem__) == 16
    assert smallest_that_washes([1, 2], 16, seconds.__getitem__) == 16


def test_the_committed_results_load() -> None:
    assert latest(load(RESULTS))
