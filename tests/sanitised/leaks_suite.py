"""What our code allocated and nothing points to any more, as LeakSanitizer sees it.

Python and PyTorch keep much for ever, so only what names a library of ours counts. A tensor that is never freed is
PyTorch's memory to LeakSanitizer; tests/test_resident_memory.py looks for those.
"""

from __future__ import annotations

import re

import pytest

from tests.sanitised import process

PROGRAM = """
import ctypes, os, sys
sanitiser = ctypes.CDLL(None)
sanitiser.__lsan_disable()  # of what is allocated until the ops run, LeakSanitizer would report more than it can hold

sys.path.append("tests")
import tests.sanitised.exchange
from helpers_attention import make_problem, solve
from helpers_loss import AttBalanceConfig, make_loss_problem, solve_loss
from attbalance_ext import available_backends

assert not available_backends()["cpu"]
problems = [make_problem(tokens=tokens, padded=True) for tokens in (31, 401)]
loss_problem = make_loss_problem(stages=2)
controls = ctypes.CDLL(os.environ["ATTBALANCE_SANITISED_CONTROLS"])
sanitiser.__lsan_enable()
for _ in range(3):
    for problem in problems:
        solve(problem, "cpu")
    solve_loss(loss_problem, AttBalanceConfig(), "cpu")
if sys.argv[1:]:
    controls.leak(int(sys.argv[1]))
sanitiser.__lsan_do_recoverable_leak_check()
os._exit(0)
"""


def leaks(*arguments: str) -> list[str]:
    """LeakSanitizer's reports of our libraries after the ops have run. Addresses only: names take it minutes."""
    done = process.run(process.ADDRESS, "-c", PROGRAM, *arguments, ASAN_OPTIONS="detect_leaks=1:symbolize=0")
    assert done.returncode == 0, done.stdout
    reports = [each for each in done.stdout.split("\n\n") if " leak of " in each]
    assert reports, "Python's own are always there"
    assert "Too many leaks" not in done.stdout
    return [each for each in reports if "attbalance_cpu" in each or "sanitised_controls" in each]


@pytest.mark.timeout(900)
def test_the_ops_leak_nothing() -> None:
    assert leaks() == []


@pytest.mark.timeout(900)
def test_leaks_are_found() -> None:
    (report,) = leaks("12345")
    assert re.search(r"leak of \d+ byte\(s\) in (9\d|100) object", report)
