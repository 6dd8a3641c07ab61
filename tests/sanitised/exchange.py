"""A pytest plugin: the C++ kernels are loaded from the library that the environment names.

Given to pytest with ``-p``, so that it comes before anything imports attbalance_ext.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

LIBRARY = "ATTBALANCE_SANITISED_LIBRARY"


def exchange() -> None:
    """From now on ``torch.ops.load_library`` takes the other library in place of libattbalance_cpu.so."""
    load, library = torch.ops.load_library, os.environ[LIBRARY]
    torch.ops.load_library = lambda path: load(library if Path(path).name == "libattbalance_cpu.so" else path)


if LIBRARY in os.environ:
    exchange()
