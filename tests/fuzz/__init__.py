"""Random calls of both ops on every backend, judged by the equations; see `python -m tests.fuzz --help`.

A case is a dict of plain values drawn from a `Space`: terms.py (`attention_terms`), loss.py (`AttBalanceLoss`),
refusals.py (wrong arguments). Its tensors follow from it alone. What has failed once lies in corpus/ and is replayed by
the tests.
"""

import sys
from pathlib import Path

# The helpers of the tests are imported by their bare names, which pytest is told in pyproject.toml.
_TESTS = str(Path(__file__).parents[1])
if _TESTS not in sys.path:
    sys.path.insert(0, _TESTS)
