"""Backend "cuda" on CPU tensors: the launchers and kernels of csrc, on the emulated device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

from attbalance_ext.kernels import choose
from tests.emulation.build import load

Size = tuple[int, int, int]


class Launch(NamedTuple):
    """One kernel that was started: its name with template arguments, in blocks and threads (x, y, z)."""

    kernel: str
    grid: Size
    block: Size
    shared_bytes: int


class Device:
    """The emulated device that runs the kernels of one compiled module."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def configure(
        self,
        *,
        multiprocessors: int = 132,
        block_order: str = "forward",
        thread_order: str = "forward",
        seed: int = 0,
        shared_fill: int = 0xFF,
    ) -> dict[str, Any]:
        """Set how the next kernels run; the arguments that set it back.

        multiprocessors: what the launchers are told. block_order: "forward" | "reversed" | "shuffled" by ``seed``: in
        which order blocks run, one after another. thread_order: in which order the threads of a block run, each as far
        as it gets without the others. shared_fill: each byte of fresh shared memory; 0xFF makes NaN of every float
        type. A right kernel gives the same bits whatever the orders and the fill.
        """
        return self._module.configure(
            multiprocessors=multiprocessors,
            block_order=block_order,
            thread_order=thread_order,
            seed=seed,
            shared_fill=shared_fill,
        )

    def launches(self) -> list[Launch]:
        """Every kernel started since the log was cleared, in order."""
        return [Launch(*row) for row in self._module.launches()]

    def clear(self) -> None:
        """Forget the launches."""
        self._module.clear_launches()


@contextmanager
def emulated_cuda(
    *,
    multiprocessors: int = 132,
    block_order: str = "forward",
    thread_order: str = "forward",
    seed: int = 0,
    shared_fill: int = 0xFF,
) -> Iterator[Device]:
    """Backend "cuda" runs on CPU tensors inside; yields the device, with an empty log of launches.

    The arguments are those of :meth:`Device.configure`. Compiles the kernels on first use.
    """
    device = Device(load("_emulated_cuda"))
    before = device.configure(
        multiprocessors=multiprocessors,
        block_order=block_order,
        thread_order=thread_order,
        seed=seed,
        shared_fill=shared_fill,
    )
    device.clear()
    real = choose.BACKENDS["cuda"]
    choose.BACKENDS["cuda"] = real._replace(devices=("cpu",), problems=list)
    try:
        yield device
    finally:
        choose.BACKENDS["cuda"] = real
        device.configure(**before)
