"""Where a measurement was made: everything a reader needs to judge or repeat it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from attbalance_ext.grounding.provenance import commit, cpu_model
from benchmarks.timing import Clock

_LOAD = round(os.getloadavg()[0], 2)  # as this process starts: later it counts itself


def environment(device: torch.device, clock: Clock, allocator: str) -> dict[str, Any]:
    revision, modified = commit("benchmarks/results")
    return {
        "device": device.type,
        "cpu": cpu_model(),
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
        "commit": revision,
        "modified": modified,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
