"""The command line: `python -m tests.fuzz --help`."""

from __future__ import annotations

import argparse
import os
import sys

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels run on CPU tensors

import numpy as np
from helpers import poisoned_memory
from helpers_triton import prepare_interpreter

from tests.fuzz.kinds import BACKENDS, draw, judge
from tests.fuzz.session import State, device, load, run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description="Random calls of both ops on the reference and one backend, judged by the equations in float64. "
        "The same seed gives the same cases; a run goes on where the last one of its seed and backend stopped "
        "(build/fuzz/). What fails is shrunk and saved in tests/fuzz/corpus/, which the tests replay.",
    )
    parser.add_argument("--backend", choices=BACKENDS, default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="stop after this time (with neither limit: 60)")
    parser.add_argument("--cases", type=int, help="stop when this many are done, those of earlier runs included")
    parser.add_argument("--fresh", action="store_true", help="start again from the first case")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="show and judge this one case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.backend == "triton":
        prepare_interpreter()
        np.seterr(all="ignore")  # the interpreter's infinities are the kernels'
    if options.only is not None:
        return only(options.backend, options.seed, options.only)
    state = State(options.backend, options.seed) if options.fresh else load(options.backend, options.seed)
    seconds = 60.0 if options.seconds is None and options.cases is None else options.seconds
    state = run(state, cases=options.cases, seconds=seconds, say=lambda text: print(text, flush=True))
    print(state)
    for fault, count in state.faults.items():
        print(f"{count:6} {fault}")
    return 1 if state.faults else 0


def only(backend: str, seed: int, number: int) -> int:
    kind, case = draw(seed, number, BACKENDS[backend])
    print(kind, case, flush=True)
    with device(backend), poisoned_memory():
        wrong = judge(kind, case, ["reference", BACKENDS[backend].name])
    print("\n".join(wrong) or "nothing is wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
