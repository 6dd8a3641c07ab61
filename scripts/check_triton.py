"""The compile gate of the Triton kernels: what Triton makes of them for each architecture. No GPU needed.

    python scripts/check_triton.py [--arch 90 ...] [--quick]

Runs the launchers of both ops with a driver that only names a device, so that each kernel is compiled with the
arguments, constants and options of a real call, and reads the machine code. One line for each kernel, variant and
architecture. Exits with 1, and says why, where

* a kernel uses local memory (spilled registers);
* `attend` of keys that 128-bit loads can read does not read, or `backward` does not write, 128 bits at once.

Also compiles for one AMD architecture (gfx942), where local memory is read from the assembly. (Scalar registers that do
not fit go to lanes of a vector register there, which is no memory.)
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: this is about machine code

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attbalance_ext.kernels.attention_terms import triton as attention_terms
from attbalance_ext.kernels.balanced_loss import triton as balanced_loss
from attbalance_ext.kernels.dtypes import DTYPES
from scripts.check_cuda import Kernel, parse_resources, read_machine_code

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
AMD = "gfx942"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Variant(NamedTuple):
    """A call of `attention_terms` forward and backward, L=6 B=8 N=400."""

    key: torch.dtype
    dim: int
    teacher: torch.dtype | None = None
    boxes: bool = True  # else weights
    padded: bool = False
    need_query: bool = True
    stride: int = 0  # of a token, where it is not dim
    dot: bool = False  # the gradient by query . key, as a tap wants it, instead of the keys'

    def __str__(self) -> str:
        words = [_short(self.key), f"D={self.dim}", f"teacher {_short(self.teacher)}" if self.teacher else "alone"]
        words += (
            ["boxes" if self.boxes else "weights"] + ["padded"] * self.padded + ["keys only"] * (not self.need_query)
        )
        return " ".join(words + ["odd stride"] * bool(self.stride) + ["factors"] * self.dot)

    @property
    def wide(self) -> bool:
        """Whether 128-bit accesses are possible."""
        return not self.stride and not self.dot and self.dim * self.key.itemsize % 16 == 0 and self.dim >= 64


def _short(dtype: torch.dtype | None) -> str:
    return {F32: "f32", BF16: "bf16", F16: "f16"}.get(dtype, "")  # type: ignore[arg-type]


VARIANTS = [
    *(Variant(key, dim, key, padded=True) for key in (F32, BF16) for dim in (32, 64, 128, 256, 512, 768, 1024, 2048)),
    *(Variant(key, dim, key) for key in (F32, BF16, F16) for dim in (1, 7, 256)),
    *(Variant(key, 256, None, boxes=False) for key in (F32, BF16)),
    *(Variant(key, 256, F32 if key == BF16 else BF16, padded=True) for key in (F32, BF16)),
    *(Variant(key, 256, key, boxes=False, padded=True, need_query=False) for key in (F32, BF16)),
    *(Variant(key, 250, key, padded=True) for key in (F32, BF16)),
    *(Variant(key, 256, key, stride=259) for key in (F32, BF16)),
    *(Variant(key, 256, key, padded=True, dot=True) for key in (F32, BF16)),
]
LOSSES = [  # layers, batch, rho given, plain
    (4, 8, False, False),
    (6, 64, False, False),
    (4, 300, False, False),
    (4, 300, True, False),
    (0, 64, False, True),
]
QUICK = [Variant(BF16, 256, BF16, padded=True), Variant(F32, 256, None, boxes=False)]


def run_attention_terms(variant: Variant) -> None:
    layers, batch, tokens, dim = 6, 8, 400, variant.dim
    query = [torch.zeros(batch, dim)] * layers

    def keys(dtype: torch.dtype | None) -> list[torch.Tensor]:
        stored = torch.zeros(batch, tokens, variant.stride or dim, dtype=dtype)
        return [] if dtype is None else [stored[..., :dim]] * layers

    scale = [0.1] * layers
    region = (torch.zeros(batch, 4), [20, 20], 0) if variant.boxes else (torch.zeros(batch, tokens), [], 0)
    padding = torch.zeros(batch, tokens, dtype=torch.bool) if variant.padded else None
    teacher = keys(variant.teacher)
    in_box, _, _, _, *kept = attention_terms.attention_terms(
        query, keys(variant.key), scale, *region, padding,
        query if teacher else [], teacher, scale if teacher else [], variant.need_query,
    )  # fmt: skip
    flags = [variant.need_query] * layers, [not variant.dot] * layers, variant.dot
    attention_terms.attention_terms_backward(
        *[torch.zeros(layers, batch)] * 3, query, scale, *region, padding, in_box, *kept,
        [DTYPES.index(variant.key)] * layers, [False] * layers, *flags,
    )  # fmt: skip


def run_balanced_loss(layers: int, batch: int, rho: bool, plain: bool) -> None:
    terms, box = torch.zeros(layers, batch), torch.zeros(batch, 4)
    balanced_loss.balanced_loss(
        terms, terms, terms, torch.ones(batch, dtype=torch.bool), box[None], box, box[:, 0].contiguous(),
        torch.zeros(layers) if rho else None, 1.0, 5.0, 2.0, 1.0, 1.0, 0, False, True, True, plain,
    )  # fmt: skip


# --- compiling without a device ---------------------------------------------------------------------------------------


class Offline:
    """Stands for Triton's driver: one device for each target, named by it."""

    def __init__(self) -> None:
        self.target = GPUTarget("cuda", 90, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int | str:
        return self.target.arch

    def get_current_stream(self, device: object) -> int:
        return 0


@dataclass
class Compiled:
    """wide: whether 128-bit accesses are possible."""

    variant: str
    arch: int | str
    kernel: Any  # triton.compiler.CompiledKernel
    wide: bool


class Recorder:
    """Compiles what is launched, and launches nothing."""

    def __init__(self) -> None:
        self.offline = Offline()
        self.found: list[Any] = []
        triton.runtime.driver.set_active(self.offline)
        run = JITFunction.run

        def compile_only(kernel: Any, *arguments: Any, **options: Any) -> None:
            if self.offline.target.backend == "hip":
                options.pop("maxnreg", None)  # which the launchers leave out where PyTorch is built for HIP
            self.found.append(run(kernel, *arguments, **(options | {"warmup": True})))

        JITFunction.run = compile_only

    def compile(self, target: GPUTarget, variants: list[Variant]) -> Iterator[Compiled]:
        self.offline.target = target
        for variant in variants:
            self.found.clear()
            run_attention_terms(variant)
            yield from (Compiled(str(variant), target.arch, kernel, variant.wide) for kernel in self.found)
        for layers, batch, rho, plain in LOSSES:
            self.found.clear()
            run_balanced_loss(layers, batch, rho, plain)
            name = f"L={layers} B={batch}{' rho given' * rho}{' plain' * plain}"
            yield from (Compiled(name, target.arch, kernel, False) for kernel in self.found)


# --- reading what came out --------------------------------------------------------------------------------------------


def inspect(compiled: Compiled) -> Kernel:
    """Registers, memory and access widths from the cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.kernel.asm["cubin"])
        file.flush()
        (kernel,) = parse_resources(_run("cuobjdump", "--dump-resource-usage", file.name))
        read_machine_code(_run("nvdisasm", "--no-dataflow", file.name), {kernel.symbol: kernel})
    kernel.arch = compiled.arch
    return kernel


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def problems(compiled: Compiled, kernel: Kernel) -> Iterator[str]:
    where = f"sm_{kernel.arch} {kernel.symbol} ({compiled.variant})"
    if kernel.local or kernel.local_accesses:
        yield f"{where}: {kernel.local} bytes of local memory, {kernel.local_accesses} instructions that use it"
    for name, kind, widths in (("attend", "load", kernel.loads), ("backward", "store", kernel.stores)):
        if kernel.symbol == name and compiled.wide and max(widths, default=0) < 128:
            yield f"{where}: widest {kind} is {max(widths, default=0)} bits, expected 128"


def amd_local(compiled: Compiled) -> int:
    """Bytes of local memory a thread, in the words of the AMD compiler."""
    (found,) = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", compiled.kernel.asm["amdgcn"])
    return int(found)


def check(architectures: list[int], variants: list[Variant], amd: bool) -> list[str]:
    """Print the table; what breaks a rule, in words."""
    recorder, wrong, lines = Recorder(), [], 0
    print(f"{'kernel':16}{'arch':8}{'regs':>5}{'local':>6}{'shared':>8}{'load':>6}{'store':>6}  variant")
    for arch in architectures:
        for compiled in recorder.compile(GPUTarget("cuda", arch, 32), variants):
            kernel = inspect(compiled)
            wrong += problems(compiled, kernel)
            lines += 1
            print(
                f"{kernel.symbol:16}{f'sm_{arch}':8}{kernel.registers:5}{kernel.local:6}"
                f"{compiled.kernel.metadata.shared:8}{max(kernel.loads, default=0):6}{max(kernel.stores, default=0):6}"
                f"  {compiled.variant}"
            )
    if amd:
        for compiled in recorder.compile(GPUTarget("hip", AMD, 64), variants):
            local = amd_local(compiled)
            lines += 1
            print(f"{compiled.kernel.metadata.name:16}{AMD:8}{'':5}{local:6}{'':20}  {compiled.variant}")
            if local:
                wrong.append(
                    f"{AMD} {compiled.kernel.metadata.name} ({compiled.variant}): {local} bytes of local memory"
                )
    print("local: bytes of spilled or indexed memory, must be 0. load, store: widest access to global memory in bits.")
    print(f"{lines} kernels")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", help="compute capabilities, as 90; default: all, and AMD")
    parser.add_argument("--quick", action="store_true", help="two variants only")
    arguments = parser.parse_args()
    variants = QUICK if arguments.quick else VARIANTS
    wrong = check(arguments.arch or list(ARCHITECTURES), variants, amd=not arguments.arch)
    if wrong:
        raise SystemExit("\n".join(f"BROKEN {line}" for line in wrong))
    print("ok")


if __name__ == "__main__":
    main()
