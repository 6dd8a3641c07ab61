"""Measuring on a GPU, as far as it can be tested without one: what is timed, in which order, and what is reported."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import cuda, runner
from benchmarks.providers import BY_DEVICE, PROVIDERS
from benchmarks.results import Row
from benchmarks.suites.op import OpCase, OpSuite
from benchmarks.table import print_tables
from benchmarks.task import Task
from benchmarks.timing import CpuClock, Timing

ROW = Row(
    run="now",
    suite="op",
    case={"L": 1},
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
    names = {device: [provider.name for provider in providers] for device, providers in BY_DEVICE.items()}
    assert names["cpu"] == ["eager", "compile", "today", "ours-cpu"]
    assert names["cuda"] == ["eager", "compile", "today", "ours-cuda", "ours-cuda-graph"]
    assert set(PROVIDERS) == {*names["cpu"], *names["cuda"]}


def test_a_provider_is_timed_only_in_its_modes() -> None:
    class OnlyBoth:
        name, title = "only-both", "one mode"

        def task(self, suite: str, inputs: object) -> Task:
            eager = PROVIDERS["eager"].task(suite, inputs)
            assert eager is not None
            return Task(eager.forward, eager.inputs, modes=("both",))

    case = OpCase(layers=1, batch=2, tokens=16, width=16)
    rows = runner.run_case(OpSuite(), case, [OnlyBoth()], run="now", rounds=2, clock=CpuClock(cold=False))
    assert [(row.mode, row.status, row.kept) for row in rows if row.provider == "only-both"] == [("both", "ok", None)]


def test_table_of_gpu_rows() -> None:
    console = Console(width=160)
    with console.capture() as capture:
        print_tables([[ROW]], console)
    text = capture.get()
    assert "some GPU" in text
    assert "some CPU" not in text
    line = next(line for line in text.splitlines() if line.strip().startswith("ours-cuda "))
    assert line.split()[-4:] == ["2000", "2.0", "4", "0.03"]


def test_rows_of_a_gpu_and_a_cpu_are_never_compared() -> None:
    on_cpu = Row(**{**ROW.__dict__, "environment": {**ROW.environment, "device": "cpu", "gpu": None}})
    older = Row(**{**ROW.__dict__, "environment": {k: v for k, v in on_cpu.environment.items() if k != "gpu"}})
    assert ROW.group != on_cpu.group
    assert older.group == on_cpu.group, "rows from before GPUs were measured"
