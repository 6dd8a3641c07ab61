"""Suites by name; one file each."""

from __future__ import annotations

from benchmarks.suites.op import OpSuite

SUITES = {suite.name: suite for suite in (OpSuite(),)}
