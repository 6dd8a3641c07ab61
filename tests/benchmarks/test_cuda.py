"""Measuring on a GPU, as far as it can be tested without one: what is timed, in which order, and what is reported."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import cuda, runner
from benchmarks.markdown import markdown_tables
from benchmarks.providers import PROVIDERS, on_device, ours
from benchmarks.results import Row
from benchmarks.suites.op import OpCase, OpInputs, OpSuite
from benchmarks.table import number, print_tables
from benchmarks.task import Provider, Task
from benchmarks.timing import CpuClock, Timing

ROW = Row(
    run="now",
    suite="op",
    case={"L": 1, "B": 1, "N": 10, "D": 25, "dtype": "float32"},
    provider="ours-cuda",
    title="ours",
    mode="both",
    status="ok",
    error=1e-7,
    timing=Timing(0.5, 0.4, 0.6, 0.4, 3),
    floor=0.25,
    bytes=10**9,
    formula="K",
    kept=10,
    bandwidth=4e12,
    environment={
        "device": "cuda",
        "cpu": "some CPU",
        "gpu": "some GPU",
        "threads": 1,
        "torch": "2",
        "cache": "cold",
        "allocator": "kept",
        "load": 0,
        "commit": None,
        "modified": False,
    },
    peak=2_000_000,
    launches=4,
    host=0.031,
)


class FakeDevice:
    """Stands in for `torch.cuda`: a log of what was asked of it, and a clock that ticks once a call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        properties = SimpleNamespace(L2_cache_size=1024)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: self.event())
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.log.append("sleep"))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.log.append("synchronize"))
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **options: zeros(*shape, **options))

    def event(self) -> SimpleNamespace:
        event = SimpleNamespace(time=0)

        def record() -> None:
            self.log.append("record")
            event.time = len(self.log)

        event.record, event.elapsed_time = record, lambda stop: float(stop.time - event.time)
        return event

    def contender(self):
        self.log.append("prepare")
        return lambda: self.log.append("run")


def test_only_the_call_is_between_the_events(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDevice(monkeypatch)
    seconds = cuda.CudaClock().seconds(fake.contender)
    assert fake.log == ["prepare", "sleep", "record", "run", "record", "synchronize"]
    assert seconds == pytest.approx(2e-3), "elapsed_time is in milliseconds"


def test_warm_calls_once_before(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDevice(monkeypatch)
    clock = cuda.CudaClock(cold=False)
    clock.seconds(fake.contender)
    assert clock.cache == "warm"
    assert fake.log[:3] == ["prepare", "run", "prepare"]


def test_each_device_has_its_own_providers() -> None:
    assert [provider.name for provider in on_device("op", "cpu")] == [
        *("eager", "compile", "compile-max-autotune", "today", "ours-cpu"),
    ]
    assert [provider.name for provider in on_device("op", "cuda")] == [
        *("eager", "compile", "compile-max-autotune", "today", "liger"),
        *("ours-triton", "ours-cuda", "ours-cuda-graph"),
    ]
    for suite, providers in PROVIDERS.items():
        names = [provider.name for provider in providers]
        assert len(set(names)) == len(names), suite


def test_a_provider_is_timed_only_in_its_modes() -> None:
    def task(inputs: OpInputs) -> Task:
        eager = ours.op("reference")(inputs)
        return Task(eager.results, {"both": eager.calls["both"]}, allocates=False)

    case = OpCase(layers=1, batch=2, tokens=16, width=16)
    provider = Provider("only-both", "one mode", task)
    rows = runner.run_case(OpSuite(), case, [provider], run="now", rounds=2, clock=CpuClock(cold=False))
    found = [(row.mode, row.status, row.kept, row.peak) for row in rows if row.provider == "only-both"]
    assert found == [("both", "ok", None, None)]


def test_table_of_gpu_rows() -> None:
    console = Console(width=160)
    with console.capture() as capture:
        print_tables([[ROW]], console)
    text = capture.get()
    assert "some GPU" in text
    assert "some CPU" not in text
    heading = next(line for line in text.splitlines() if line.strip().startswith("ms "))
    line = next(line for line in text.splitlines() if line.strip().startswith("ours-cuda "))
    assert [heading.split()[-1], *line.split()[-3:]] == ["host", "1e-07", "4", "0.0310"]
    assert line.split()[-7:-3] == ["50", "0.01", "1.0", "2.00"], "half the copy's bandwidth, 1 % of K, the peak"
    assert "kept kB" in heading
    assert "peak MB" in heading


def test_few_bytes_have_no_floor() -> None:
    """Moving a kilobyte takes nanoseconds: a multiple of that, or a share of a bandwidth, says nothing."""
    few = replace(ROW, suite="tail", case={"L": 6, "B": 8}, bytes=1000, floor=1e3 * 1000 / 4e12, kept=512, peak=3584)
    console = Console(width=160)
    with console.capture() as capture:
        print_tables([[few]], console)
    text = capture.get()
    assert not any(said in text for said in ("floor", "% of copy", "GB/s", "0.00"))
    assert {"0.51", "3.58"} <= set(text.split()), "kilobytes"
    assert "floor" not in markdown_tables([[few]])


def test_markdown_of_gpu_rows() -> None:
    text = markdown_tables([[replace(ROW, timing=Timing(0.0308, 0.03, 0.04, 0.03, 3))]])
    assert "**op**, some GPU, caches cold, allocator kept, milliseconds" in text, "threads have no part in it"
    assert "|  | **ours-cuda** | floor |" in text, "the floor has no rows of its own on a GPU"
    assert "| **0.0308** | 0.250 |" in text


@pytest.mark.parametrize(
    ("milliseconds", "shown"),
    [(0.0044, "0.0044"), (0.0308, "0.0308"), (0.1154, "0.115"), (3.89, "3.89"), (43.18, "43.2"), (885.4, "885")],
)
def test_three_digits_or_so(milliseconds: float, shown: str) -> None:
    assert number(milliseconds) == shown


def test_rows_of_a_gpu_and_a_cpu_are_never_compared() -> None:
    on_cpu = Row(**{**ROW.__dict__, "environment": {**ROW.environment, "device": "cpu", "gpu": None}})
    older = Row(**{**ROW.__dict__, "environment": {k: v for k, v in on_cpu.environment.items() if k != "gpu"}})
    assert ROW.group != on_cpu.group
    assert older.group == on_cpu.group, "rows from before GPUs were measured"
