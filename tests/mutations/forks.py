"""Runs pytest again and again, each time in a fork of a process that has imported what takes long and is not edited.

    python tests/mutations/forks.py torch scipy.stats

Reads lines of JSON, {"arguments": [...], "output": path, "limit": seconds}. Answers each with the child's process id,
which is its group's too; and when it has ended with its exit code (negative: the signal; SIGXCPU: at the limit) and how
many seconds of a processor's time it took.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest


def main() -> None:
    sys.path[0] = os.getcwd()  # as `python -m pytest` has it
    for name in sys.argv[1:]:
        with suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            _test(order["arguments"], Path(order["output"]), order["limit"])
        print(child, flush=True)
        _, status, used = os.wait4(child, 0)
        print(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, flush=True)


def _test(arguments: list[str], output: Path, limit: int) -> NoReturn:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 60))
    nothing = os.open(os.devnull, os.O_RDONLY)
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor, stream in ((nothing, 0), (written, 1), (written, 2)):
        os.dup2(descriptor, stream)
    sys.argv = ["pytest", *arguments]
    code = 3  # pytest's own, for an error of pytest
    try:
        code = int(pytest.main(arguments))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
