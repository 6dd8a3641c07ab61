"""Where a measurement was made: everything a reader needs to judge or repeat it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Clock

ROOT = Path(__file__).resolve().parent.parent


_LOAD = round(os.getloadavg()[0], 2)  # as this process starts: later it counts itself


def environment(device: torch.device, clock: Clock, allocator: str) -> dict[str, Any]:
    commit, modified = _commit()
    return {
        "device": device.type,
        "cpu": _cpu_model(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cache": clock.cache,
        "washed": clock.washed,
        "allocator": allocator,
        "load": _LOAD,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": {name: _version(name) for name in ("triton", "scipy", "transformers", "liger_kernel")},
        "cuda": torch.version.cuda,
        "commit": commit,
        "modified": modified,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> tuple[str | None, bool]:
    """The commit measured, and whether anything but results differs from it. (None, True) outside a checkout."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return None, True
    return commit, bool(changes)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()
