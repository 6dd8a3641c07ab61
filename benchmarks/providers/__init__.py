"""Providers by name, the baseline first; one file each."""

from __future__ import annotations

from benchmarks.providers.compiled import Compiled
from benchmarks.providers.eager import Eager
from benchmarks.providers.graph import OursGraph
from benchmarks.providers.ours import Ours
from benchmarks.providers.today import Today
from benchmarks.task import Provider

BASELINE = "eager"
_ANYWHERE: tuple[Provider, ...] = (Eager(), Compiled(), Today())
BY_DEVICE: dict[str, tuple[Provider, ...]] = {
    "cpu": (*_ANYWHERE, Ours("cpu")),
    "cuda": (*_ANYWHERE, Ours("cuda"), OursGraph()),
}
PROVIDERS: dict[str, Provider] = {provider.name: provider for providers in BY_DEVICE.values() for provider in providers}
