"""Which code made a result, on which machine."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def cpu_model() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def commit(*results: str) -> tuple[str | None, bool]:
    """The commit of this checkout, and whether anything but the folders ``results`` differs from it.

    (None, True) outside a checkout.
    """
    if not (ROOT / ".git").exists():  # installed, perhaps below somebody else's checkout
        return None, True
    try:
        found = _git("rev-parse", "--short=12", "HEAD")
        changes = _git("status", "--porcelain", "--", ".", *(f":!{folder}" for folder in results))
    except (OSError, subprocess.CalledProcessError):
        return None, True
    return found, bool(changes)


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
