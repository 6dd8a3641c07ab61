"""The short form of `make sanitize`: the emulated CUDA kernels on the small suite."""

from __future__ import annotations

import pytest

from tests.sanitised import process


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_emulated_kernels_pass_under_the_sanitisers() -> None:
    try:
        process.preload(process.ADDRESS)
    except process.NoSanitiser as reason:
        pytest.skip(str(reason))
    process.compile_emulation()
    done = process.run_tests(
        process.ADDRESS, "tests/emulation/test_emulator.py", "tests/sanitised/suite.py", "-k", "not cpu"
    )
    assert done.returncode == 0, done.stdout
