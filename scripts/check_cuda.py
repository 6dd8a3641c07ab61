"""The compile gate of the CUDA kernels: what nvcc made of them, read from the built library. No GPU needed.

    python scripts/check_cuda.py [libattbalance_cuda.so]

One line for each kernel and architecture. Exits with 1, and says why, where

* a kernel uses local memory: spilled registers, or arrays that did not fit into registers;
* a kernel named `forward_rows...` does not read, or one named `backward_rows...` does not write, 128 bits at once.

Needs cuobjdump and nvdisasm, of the CUDA toolkit or from `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

LIBRARY = Path(__file__).resolve().parent.parent / "attbalance_ext" / "kernels" / "lib" / "libattbalance_cuda.so"


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor holds, of all architectures beside 65536 registers."""

    warps: int
    blocks: int
    shared_kib: int


RESERVED_SHARED = 1024  # bytes that the system adds to what each block asks for

# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
LIMITS = {
    75: Limits(32, 16, 64),
    80: Limits(64, 32, 164),
    86: Limits(48, 16, 100),
    87: Limits(48, 16, 164),
    89: Limits(48, 24, 100),
    90: Limits(64, 32, 228),
    100: Limits(64, 32, 228),
    103: Limits(64, 32, 228),
    110: Limits(48, 24, 228),
    120: Limits(48, 24, 100),
    121: Limits(48, 24, 100),
}


@dataclass
class Kernel:
    """One kernel in the machine code of one architecture. Sizes in bytes, widths in bits."""

    arch: int  # 90 for sm_90
    symbol: str
    registers: int = 0
    shared: int = 0  # static: what is asked for at launch is not in the library
    local: int = 0
    threads: int = 1024  # a block has at most
    loads: Counter[int] = field(default_factory=Counter)  # instructions that read global memory, by width
    stores: Counter[int] = field(default_factory=Counter)
    local_accesses: int = 0  # instructions that read or write local memory

    @property
    def resident_blocks(self) -> int:
        """Blocks of the largest allowed size that a multiprocessor holds, before dynamic shared memory counts.

        Registers are given to warps in units of 256, and warps live in four partitions with a quarter of the
        registers each (cuda_occupancy.h of the toolkit).
        """
        limits = LIMITS[self.arch]
        warps = -(-self.threads // 32)
        of_a_warp = -(-self.registers * 32 // 256) * 256
        by_registers = 4 * (65536 // 4 // of_a_warp) // warps
        by_shared = (limits.shared_kib << 10) // (self.shared + RESERVED_SHARED)
        return min(limits.warps // warps, limits.blocks, by_registers, by_shared)

    @property
    def occupancy(self) -> float:
        """Resident warps over the most that a multiprocessor can hold."""
        return self.resident_blocks * -(-self.threads // 32) / LIMITS[self.arch].warps

    @property
    def free_shared(self) -> int:
        """Shared memory that a block may ask for at launch without lowering the occupancy."""
        blocks = self.resident_blocks
        return (LIMITS[self.arch].shared_kib << 10) // blocks - RESERVED_SHARED - self.shared if blocks else 0


def problems(kernels: Iterable[Kernel], names: dict[str, str]) -> list[str]:
    """What breaks a rule, in words."""
    kernels = list(kernels)
    found = []
    for kernel in kernels:
        where = f"sm_{kernel.arch} {names[kernel.symbol]}"
        if kernel.local or kernel.local_accesses:
            found.append(
                f"{where}: {kernel.local} bytes of local memory, {kernel.local_accesses} instructions that use it"
            )
        if kernel.arch not in LIMITS:
            found.append(f"{where}: no limits known for this architecture, add them to LIMITS")
        for prefix, kind, widths in (("forward", "load", kernel.loads), ("backward", "store", kernel.stores)):
            if names[kernel.symbol].startswith(f"{prefix}_rows") and max(widths, default=0) < 128:
                found.append(f"{where}: widest {kind} is {max(widths, default=0)} bits, expected 128")
    for prefix in ("forward_rows", "backward_rows"):
        if not any(names[kernel.symbol].startswith(prefix) for kernel in kernels):
            found.append(f"no kernel is named {prefix}...: either it is missing or this check looks for the wrong name")
    return found


# --- what the tools print --------------------------------------------------------------------------------------------

_ARCH = re.compile(r"^arch = sm_(\d+)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_SECTION = re.compile(r"^\t\.section\s+\.(?:(?:text|nv\.info)\.)?([^,\s]+)")
_ATTRIBUTE = re.compile(r"^\t//-+ nvinfo : (\w+)")
_WORD = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+\.word\s+(0x[0-9a-f]+)")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
# LD, ST: generic addresses, where the compiler did not know that they are global. LDGSTS: global to shared.
_MEMORY = {"LDG": "loads", "LD": "loads", "LDGSTS": "loads", "STG": "stores", "ST": "stores"}


def parse_resources(text: str) -> list[Kernel]:
    """Kernels from the output of `cuobjdump --dump-resource-usage`; what the machine code tells is not filled in."""
    kernels = []
    arch, symbol = 0, ""
    for line in text.splitlines():
        if found := _ARCH.match(line):
            arch = int(found.group(1))
        elif line.startswith(" Function "):
            symbol = line.removeprefix(" Function ").rstrip(":")
        elif found := _RESOURCES.search(line):
            registers, stack, shared, local = map(int, found.groups())
            if arch >= 90 and shared >= RESERVED_SHARED:  # from there on the tool counts it
                shared -= RESERVED_SHARED
            kernels.append(Kernel(arch, symbol, registers, shared, stack + local))
    return kernels


def read_machine_code(text: str, kernels: Mapping[str, Kernel]) -> None:
    """Fill in `kernels`, by symbol, from what `nvdisasm` prints for their architecture."""
    kernel = None
    threads: list[int] | None = None
    for line in text.splitlines():
        if found := _SECTION.match(line):
            kernel, threads = kernels.get(found.group(1)), None
        elif kernel is None:
            continue
        elif found := _INSTRUCTION.match(line):
            _count(kernel, found.group(1))
        elif found := _ATTRIBUTE.match(line):
            threads = [] if found.group(1) in ("EIATTR_MAX_THREADS", "EIATTR_REQNTID") else None
        elif threads is not None and (found := _WORD.match(line)):
            threads.append(int(found.group(1), 16))
            kernel.threads = math.prod(threads)


def _count(kernel: Kernel, instruction: str) -> None:
    opcode, *modifiers = instruction.split(".")
    if opcode in ("LDL", "STL"):
        kernel.local_accesses += 1
    elif opcode in _MEMORY:
        widths = [int(digits) for m in modifiers if (digits := re.sub(r"^[US](?=8$|16$)", "", m)).isdigit()]
        getattr(kernel, _MEMORY[opcode])[max(widths, default=32)] += 1


def short_name(demangled: str) -> str:
    """The kernel's own name and template arguments, without namespaces, return type and parameters."""
    name = demangled.replace("(anonymous namespace)::", "").replace("attbalance::", "")
    depth = 0
    for position, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            name = name[:position]
            break
    return re.sub(r"\((?:int|bool|unsigned int|long)\)", "", name.removeprefix("void "))


# --- running the tools -----------------------------------------------------------------------------------------------


TOOLS = {
    "cuobjdump": "the CUDA toolkit, or pip install nvidia-cuda-cuobjdump",
    "nvdisasm": "the CUDA toolkit, or pip install nvidia-cuda-nvdisasm",
    "c++filt": "binutils",
}


def tool_path() -> str:
    """PATH with the places where the toolkit's tools may also be."""
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(f"{toolkit}/bin" for toolkit in toolkits if toolkit)]
    places += [str(path) for entry in sys.path for path in Path(entry or ".").glob("nvidia/cu*/bin")]
    return os.pathsep.join(places)


def inspect(library: Path) -> tuple[list[Kernel], dict[str, str]]:
    """The kernels in `library`, and their short names by symbol. Raises SystemExit where a tool is missing."""
    path = tool_path()
    for tool, package in TOOLS.items():
        if not shutil.which(tool, path=path):
            raise SystemExit(f"{tool} not found: install {package}")

    def run(name: str, *arguments: object, given: str | None = None, folder: str | None = None) -> str:
        command = [str(shutil.which(name, path=path)), *map(str, arguments)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, input=given, cwd=folder)
        return done.stdout

    kernels = parse_resources(run("cuobjdump", "--dump-resource-usage", library))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        run("cuobjdump", "--extract-elf", "all", library.resolve(), folder=folder)
        cubins = sorted(Path(folder).glob("*.cubin"))
        listings = pool.map(lambda cubin: run("nvdisasm", "--no-dataflow", cubin), cubins)
        for cubin, listing in zip(cubins, listings, strict=True):
            found = re.search(r"\.sm_(\d+)", cubin.name)
            assert found, cubin.name
            arch = int(found.group(1))
            read_machine_code(listing, {kernel.symbol: kernel for kernel in kernels if kernel.arch == arch})
    symbols = sorted({kernel.symbol for kernel in kernels})
    demangled = run("c++filt", given="\n".join(symbols)).splitlines()
    return kernels, dict(zip(symbols, map(short_name, demangled), strict=True))


def table(kernels: Iterable[Kernel], names: dict[str, str]) -> Iterator[str]:
    rows = [("kernel", "arch", "regs", "local", "shared", "threads", "blocks/SM", "occupancy", "loads", "stores")]
    for kernel in sorted(kernels, key=lambda k: (names[k.symbol], k.arch)):
        known = kernel.arch in LIMITS
        rows.append(
            (
                names[kernel.symbol],
                f"sm_{kernel.arch}",
                str(kernel.registers),
                str(kernel.local),
                f"{kernel.shared}+{kernel.free_shared}" if known else str(kernel.shared),
                str(kernel.threads),
                str(kernel.resident_blocks) if known else "?",
                f"{kernel.occupancy:.0%}" if known else "?",
                _widths(kernel.loads),
                _widths(kernel.stores),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _widths(counts: Counter[int]) -> str:
    return " ".join(f"{width}b*{counts[width]}" for width in sorted(counts, reverse=True)) or "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="?", type=Path, default=LIBRARY)
    library = parser.parse_args().library
    if not library.exists():
        raise SystemExit(f"{library} does not exist: build it with ATTBALANCE_CUDA=1 (in a checkout: make setup)")
    kernels, names = inspect(library)
    print(*table(kernels, names), sep="\n")
    print(
        "local: bytes of spilled or indexed memory, must be 0. shared: static + what a launch may add before it costs "
        "occupancy.\nloads, stores: global memory instructions by width."
    )
    if wrong := problems(kernels, names):
        raise SystemExit("\n".join(["", *(f"BROKEN {line}" for line in wrong)]))
    architectures = sorted({kernel.arch for kernel in kernels})
    print(f"ok: {len(kernels)} kernels for {', '.join(f'sm_{arch}' for arch in architectures)}")


if __name__ == "__main__":
    main()
