"""clang-tidy over the C++ kernels, and over the CUDA kernels as the emulation compiles them: `make tidy`.

Which checks, and why not the others: .clang-tidy. The compiler's own errors and warnings count, too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.emulation import build  # noqa: E402

PROJECTS = {"library": ROOT, "emulation": build.SOURCES}
# Kernels count in int, in which a GPU is fast: threads and lanes, which are few, and masks of lanes.
KERNELS = ("narrowing-conversions", "implicit-widening-of-multiplication-result", "signed-bitwise")


def sources(database: Path) -> list[str]:
    """The files of csrc/ that are compiled."""
    entries = json.loads((database / "compile_commands.json").read_text())
    files = {str(Path(entry["directory"], entry["file"]).resolve()) for entry in entries}
    return sorted(file for file in files if file.startswith(f"{ROOT}/csrc/"))


def check(job: tuple[Path, str]) -> bool:
    """Whether nothing is found in a file and what it includes; prints what is."""
    database, file = job
    tool = shutil.which("clang-tidy", path=sysconfig.get_path("scripts")) or shutil.which("clang-tidy")
    if tool is None:
        sys.exit("clang-tidy is not installed: pip install clang-tidy")
    # A file that is compiled for several instruction sets is checked for each.
    options = ["--quiet", "-p", str(database), "--extra-arg=-Wno-unused-command-line-argument"]
    if file.endswith(".cu"):
        options.append("--checks=" + ",".join(f"-bugprone-{name}" for name in KERNELS))
    done = subprocess.run([tool, *options, file], capture_output=True, text=True)
    print(f"{Path(file).relative_to(ROOT)}: {'FINDINGS' if done.returncode else 'clean'}", flush=True)
    if done.returncode:
        print(done.stdout + done.stderr, flush=True)
    return not done.returncode


def main() -> int:
    jobs = []
    for name, project in PROJECTS.items():
        database = ROOT / "build" / "tidy" / name
        build.configure(project, database, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *build.module_options())
        jobs += [(database, file) for file in sources(database)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return 0 if all(list(pool.map(check, jobs))) else 1


if __name__ == "__main__":
    sys.exit(main())
