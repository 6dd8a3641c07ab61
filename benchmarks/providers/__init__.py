"""Providers by name, the baseline first; one file each."""

from __future__ import annotations

from benchmarks.providers.compiled import Compiled
from benchmarks.providers.eager import Eager
from benchmarks.providers.ours import Ours
from benchmarks.providers.today import Today
from benchmarks.task import Provider

BASELINE = "eager"
PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in (Eager(), Compiled(), Today(), Ours("cpu"))}
