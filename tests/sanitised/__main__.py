"""The long form, `make sanitize`: `python -m tests.sanitised [address|thread|leak ...]`; all of them by default.

The tests that an ordinary run makes of both ops, and of the emulator, run again in processes that a sanitiser watches.
What one finds is printed, and the exit status is 1.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from tests.sanitised import process

OPS = ("tests/attention_terms", "tests/balanced_loss")
SUITE, THREADS_SUITE, LEAKS_SUITE = (f"tests/sanitised/{name}suite.py" for name in ("", "threads_", "leaks_"))
# Tests that start programs of their own, which have no exchanged library; they run no kernel that others do not.
APART = "instruction_sets or triton or registration"
Step = tuple[str, Callable[[], subprocess.CompletedProcess[str]]]


def address() -> Iterator[Step]:
    """AddressSanitizer and UndefinedBehaviorSanitizer: the CPU library in each vector width, the emulated kernels."""
    libraries = process.compile_library(process.ADDRESS)
    process.compile_emulation()
    tests = (*OPS, "tests/emulation/test_emulator.py", SUITE)
    yield (
        "both ops, native and emulated",
        lambda: process.run_tests(process.ADDRESS, *tests, "-k", f"not ({APART})", **libraries),
    )
    for isa in ("baseline", "avx2"):
        yield (
            f"the CPU library with {isa}",
            lambda: process.run_tests(
                process.ADDRESS,
                SUITE,
                "-k",
                "cpu",
                **libraries,
                ATTBALANCE_CPU_ISA=isa,  # noqa: B023 called before the next
            ),
        )


def thread() -> Iterator[Step]:
    """ThreadSanitizer: the CPU library in four threads of Python, each with four of PyTorch's."""
    libraries = process.compile_library(process.THREAD)
    yield "the CPU library in 4 threads", lambda: process.run_tests(process.THREAD, THREADS_SUITE, **libraries)


def leak() -> Iterator[Step]:
    """LeakSanitizer: what our library allocated and nothing points to when the process ends."""
    libraries = process.compile_library(process.ADDRESS)
    yield "the CPU library", lambda: process.run_unwatched(LEAKS_SUITE, **libraries)


CHECKS = {"address": address, "thread": thread, "leak": leak}


def main(names: list[str]) -> int:
    unknown = set(names) - set(CHECKS)
    if unknown:
        print(f"a check is one of {', '.join(CHECKS)}, got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    clean = True
    for name in names or CHECKS:
        for what, run in CHECKS[name]():
            start = time.monotonic()
            done = run()
            clean = clean and not done.returncode
            if done.returncode:
                print(done.stdout)
            tests = re.search(r"\d+ passed", done.stdout)
            result = "clean" if not done.returncode else "FINDINGS, see above"
            print(
                f"{name:8} {what:32} {tests[0] if tests else '':12} {time.monotonic() - start:5.0f} s  {result}",
                flush=True,
            )
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
