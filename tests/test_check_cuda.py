"""The compile gate of the CUDA kernels: the built library passes, and what breaks a rule is seen."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import check_cuda

SYMBOL = "_ZN10attbalance36_GLOBAL__N__e2206cc8_4_r_cu_cfee56b712forward_rowsIfLi8EEEvNS0_9ArgumentsE"
NAMES = {SYMBOL: "forward_rows<float, 8>", "backward": "backward_rows<float, 8>"}

# Recorded from cuobjdump and nvdisasm 13.5 on a kernel compiled for sm_90, shortened.
RESOURCES = f"""
Fatbin elf code:
================
arch = sm_90
code version = [1,8]
host = linux
compile_size = 64bit

Resource usage:
 Common:
  GLOBAL:0
 Function {SYMBOL}:
  REG:40 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:544 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
MACHINE_CODE = f"""
	.target	sm_90
	.section	.nv.info.{SYMBOL},"",@"SHT_CUDA_INFO"
	.align	4
	//----- nvinfo : EIATTR_MAXREG_COUNT
        /*001c*/ 	.byte	0x03, 0x1b
        /*001e*/ 	.short	0x00ff
	//----- nvinfo : EIATTR_MAX_THREADS
	.align		4
.L_12:
        /*0034*/ 	.word	0x00000100
        /*0038*/ 	.word	0x00000001
        /*003c*/ 	.word	0x00000001
	//----- nvinfo : EIATTR_CBANK_PARAM_SIZE
        /*0040*/ 	.byte	0x03, 0x19
	.section	.nv.callgraph,"",@"SHT_CUDA_CALLGRAPH"
        /*0000*/ 	.word	0x00000000
	.section	.text.{SYMBOL},"ax",@progbits
.text.{SYMBOL}:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   S2R R13, SR_TID.X ;
        /*0020*/                   LDC.64 R10, c[0x0][0x210] ;
        /*0040*/                   LDG.E.128.CONSTANT R4, desc[UR4][R10.64] ;
        /*0050*/              @!P2 LDG.E.U16 R8, desc[UR4][R10.64+0x10] ;
        /*0090*/              @P0 EXIT ;
        /*00a0*/                   LDS.128 R8, [R11] ;
        /*00c0*/                   STG.E desc[UR4][R8.64], R7 ;
.L_x_0:
        /*0100*/                   BRA `(.L_x_0);
"""


def kernels(resources: str = RESOURCES, machine_code: str = MACHINE_CODE) -> list[check_cuda.Kernel]:
    """The recorded kernel, and a faultless one that writes, without which the gate would miss it."""
    found = check_cuda.parse_resources(resources)
    check_cuda.read_machine_code(machine_code, {kernel.symbol: kernel for kernel in found})
    return [*found, check_cuda.Kernel(90, "backward", registers=40, stores=check_cuda.Counter({128: 1}))]


def test_what_is_read_from_the_tools() -> None:
    kernel = kernels()[0]
    assert (kernel.arch, kernel.symbol) == (90, SYMBOL)
    assert (kernel.registers, kernel.local, kernel.threads) == (40, 0, 256)
    assert kernel.shared == 0, "on sm_90 the tool counts what the system reserves"
    assert (kernel.loads, kernel.stores) == ({128: 1, 16: 1}, {32: 1}), "shared memory and constants do not count"


def test_a_good_kernel_passes() -> None:
    assert check_cuda.problems(kernels(), NAMES) == []


@pytest.mark.parametrize("resource", ["STACK", "LOCAL"])
def test_local_memory_is_refused(resource: str) -> None:
    (problem,) = check_cuda.problems(kernels(RESOURCES.replace(f"{resource}:0", f"{resource}:72")), NAMES)
    assert "sm_90 forward_rows<float, 8>: 72 bytes of local memory" in problem


@pytest.mark.parametrize("spill", ["STL [R1+0x4], R3", "@P1 LDL.64 R4, [R1]"])
def test_a_spill_is_refused(spill: str) -> None:
    spilt = MACHINE_CODE.replace("LDS.128 R8, [R11]", spill)
    (problem,) = check_cuda.problems(kernels(machine_code=spilt), NAMES)
    assert "1 instructions" in problem


def test_a_narrow_load_is_refused() -> None:
    narrow = MACHINE_CODE.replace("LDG.E.128.CONSTANT", "LDG.E.64.CONSTANT")
    (problem,) = check_cuda.problems(kernels(machine_code=narrow), NAMES)
    assert "widest load is 64 bits, expected 128" in problem


def test_a_narrow_store_is_refused() -> None:
    found = kernels()
    found[1].stores = check_cuda.Counter({32: 4})
    (problem,) = check_cuda.problems(found, NAMES)
    assert problem == "sm_90 backward_rows<float, 8>: widest store is 32 bits, expected 128"


def test_256_bits_are_wide_enough() -> None:
    wide = MACHINE_CODE.replace("LDG.E.128.CONSTANT", "LDG.E.ENL2.256.CONSTANT")
    found = kernels(machine_code=wide)
    assert max(found[0].loads) == 256
    assert check_cuda.problems(found, NAMES) == []


def test_the_kernel_for_any_layout_may_be_narrow() -> None:
    narrow = MACHINE_CODE.replace(".128", "")
    names = {**NAMES, SYMBOL: "forward_any<float>"}
    found = [*kernels(machine_code=narrow), check_cuda.Kernel(90, "wide", 40, loads=check_cuda.Counter({128: 1}))]
    assert check_cuda.problems(found, {**names, "wide": "forward_rows<float, 8>"}) == []


def test_kernels_under_another_name_do_not_slip_through() -> None:
    problems = check_cuda.problems(kernels(), dict.fromkeys(NAMES, "renamed"))
    assert [problem.split(":")[0] for problem in problems] == [
        "no kernel is named forward_rows...",
        "no kernel is named backward_rows...",
    ]


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "blocks", "occupancy"),
    [
        (90, 32, 256, 0, 8, 1.0),
        (90, 64, 256, 0, 4, 0.5),
        (80, 40, 256, 0, 6, 0.75),
        (90, 128, 256, 0, 2, 0.25),
        (90, 168, 256, 0, 1, 0.125),  # 12 warps fit, which is one block of 8
        (86, 32, 1024, 0, 1, 32 / 48),
        (89, 24, 32, 0, 24, 0.5),  # by the number of blocks
        (90, 32, 256, 48 << 10, 4, 0.5),  # by shared memory
        (90, 255, 1024, 0, 0, 0.0),  # cannot be launched
    ],
)
def test_occupancy(arch: int, registers: int, threads: int, shared: int, blocks: int, occupancy: float) -> None:
    kernel = check_cuda.Kernel(arch, "", registers, shared, threads=threads)
    assert kernel.resident_blocks == blocks
    assert kernel.occupancy == pytest.approx(occupancy)


def test_free_shared_memory_is_what_keeps_the_occupancy() -> None:
    kernel = check_cuda.Kernel(90, "", registers=64, threads=256)
    room = kernel.free_shared
    assert check_cuda.Kernel(90, "", 64, shared=room, threads=256).resident_blocks == kernel.resident_blocks
    assert check_cuda.Kernel(90, "", 64, shared=room + 1, threads=256).resident_blocks < kernel.resident_blocks


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        ("void attbalance::(anonymous namespace)::f<float, 8>(attbalance::Arguments)", "f<float, 8>"),
        ("void attbalance::f<attbalance::BFloat16, (int)16, (bool)1>(attbalance::A)", "f<BFloat16, 16, 1>"),
        ("attbalance::merge(float const*, int)", "merge"),
    ],
)
def test_short_names(demangled: str, short: str) -> None:
    assert check_cuda.short_name(demangled) == short


def test_missing_library_and_missing_tools_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run_gate(tmp_path / "none.so")
    assert done.returncode == 1
    assert "build it with ATTBALANCE_CUDA=1" in done.stderr
    monkeypatch.setattr(check_cuda, "tool_path", lambda: str(tmp_path))
    with pytest.raises(SystemExit, match="pip install nvidia-cuda-cuobjdump"):
        check_cuda.inspect(tmp_path / "none.so")


@pytest.mark.skipif(
    not shutil.which("nvcc", path=check_cuda.tool_path()), reason="no nvcc: the CUDA kernels were not compiled"
)
def test_the_built_kernels_pass() -> None:
    done = run_gate(check_cuda.LIBRARY)
    assert done.returncode == 0, done.stderr


def run_gate(library: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, check_cuda.__file__, str(library)]
    return subprocess.run(command, capture_output=True, text=True)
