"""Suites by name; one file each."""

from __future__ import annotations

from benchmarks.suites.op import OpSuite
from benchmarks.suites.step import StepSuite
from benchmarks.suites.tail import TailSuite
from benchmarks.suites.tap import TapSuite
from benchmarks.task import Suite

SUITES: dict[str, Suite] = {suite.name: suite for suite in (OpSuite(), TailSuite(), TapSuite(), StepSuite())}
