"""The baseline: the reference, plain PyTorch run eagerly."""

from __future__ import annotations

from benchmarks.providers.ours import Ours


class Eager(Ours):
    def __init__(self) -> None:
        super().__init__("reference", "eager", "eager PyTorch (the reference)")
