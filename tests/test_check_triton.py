"""The compile gate of the Triton kernels: a few kernels pass it, and what breaks a rule is seen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent

# In a process of its own: in this one Triton is interpreted, and what it imported stays so.
BROKEN = """
from types import SimpleNamespace
from scripts.check_cuda import Kernel
from scripts.check_triton import AMD, Compiled, amd_local, problems
compiled = Compiled("a variant", 90, SimpleNamespace(), wide=True)
for kernel in (
    Kernel(90, "attend", local=8, loads={128: 1}),
    Kernel(90, "attend", loads={64: 1}),
    Kernel(90, "backward", loads={128: 1}, stores={32: 1}),
    Kernel(90, "backward", stores={128: 1}),
    Kernel(90, "finish"),
):
    print(*problems(compiled, kernel), sep="|")
assembly = "  .sgpr_spill_count: 25\\n  .private_segment_fixed_size: 64\\n"
print(amd_local(Compiled("a variant", AMD, SimpleNamespace(asm={"amdgcn": assembly}), wide=False)))
"""


def python(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's tools come with its Linux wheels")
def test_kernels_compile_without_spills(tmp_path: Path) -> None:
    done = python("scripts/check_triton.py", "--arch", "90", "--quick", cache=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in ("attend", "finish", "backward", "_balanced_loss"):
        assert f"\n{kernel} " in done.stdout


def test_what_breaks_a_rule_is_seen(tmp_path: Path) -> None:
    done = python("-c", BROKEN, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    spill, load, store, good, other, amd = done.stdout.split("\n")[:6]
    assert "8 bytes of local memory" in spill
    assert "widest load is 64 bits" in load
    assert "widest store is 32 bits" in store
    assert good == other == ""
    assert amd == "64"
