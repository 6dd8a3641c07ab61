"""Writes the tables of docs/numerics.md: the bounds as the tests assert them, and what was measured against them.

    python -m scripts.numerics

A table stands between `<!-- numerics: NAME -->` and `<!-- end -->`. The CUDA kernels run on the emulated device,
Triton's through its interpreter. The problems are those of tests/numerics/stress.py.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # the helpers

from helpers import BACKENDS, DOUBLE
from helpers_triton import prepare_interpreter

from attbalance_ext.grounding.files import write_text
from tests.numerics import measure, stress
from tests.numerics.bounds import ATTENTION, DEFINITIONS, LOSS, LOSS_DEFINITIONS, PARTIAL_SUM_TEXT, Bound

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "numerics.md"
TABLE = re.compile(r"(<!-- numerics: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
STORAGE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
EVERY = (*BACKENDS, "triton")


def table(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heading = list(heading)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heading, ["---"] * len(heading), *rows])


def bounds(definitions: Mapping[str, str], quantities: Mapping[str, Bound]) -> str:
    """The expressions that the tests evaluate."""
    rows = [(bound.title, f"`{bound.rounding}`", f"`{bound.underflow}`") for bound in quantities.values()]
    names = [(f"`{name}`", f"`{expression}`") for name, expression in definitions.items()]
    return f"{table(('quantity', 'rounding', 'underflow'), rows)}\n\n{table(('where', 'is'), names)}"


def partial_sums() -> str:
    return table(("backend", "`n`"), [(backend, f"`{text}`") for backend, text in PARTIAL_SUM_TEXT.items()])


def worst(found: Iterable[Mapping[str, float]]) -> dict[str, float]:
    largest: dict[str, float] = {}
    for shares in found:
        for quantity, share in shares.items():
            largest[quantity] = max(share, largest.get(quantity, 0))
    return largest


def measured_terms() -> str:
    cells: dict[tuple[str, torch.dtype, str], str] = {}
    for dtype in STORAGE:
        for backend in DOUBLE if dtype == torch.float64 else EVERY:
            shares = worst(measure.attention_shares(name, dtype, backend) for name in stress.ATTENTION)
            errors = worst(measure.attention_errors(name, dtype, backend) for name in stress.RANDOM)
            for quantity, share in shares.items():
                cells[quantity, dtype, backend] = f"{errors[quantity]:.1e} ({percent(share)})"
            print(backend, STORAGE[dtype], flush=True)
    rows = [
        (ATTENTION[quantity].title, name, *(cells.get((quantity, dtype, backend), "") for backend in EVERY))
        for quantity in ATTENTION
        for dtype, name in STORAGE.items()
    ]
    return f"{table(('quantity', 'stored in', *EVERY), rows)}\n\n{environment()}"


def measured_loss() -> str:
    found = {backend: worst(measure.loss_shares(name, backend) for name in stress.LOSS) for backend in EVERY}
    rows = [(bound.title, *(percent(found[backend][name]) for backend in EVERY)) for name, bound in LOSS.items()]
    return table(("quantity", *EVERY), rows)


def percent(share: float) -> str:
    """Rounded up, so that 100 % is within the bound."""
    return f"{max(-(-share * 100 // 0.1) * 0.1, 0):.1f} %"


def environment() -> str:
    import triton

    return f"PyTorch {torch.__version__}, Triton {triton.__version__}, {torch.backends.cpu.get_cpu_capability()}"


TABLES: dict[str, Callable[[], str]] = {
    "partial-sums": partial_sums,
    "terms": lambda: bounds(DEFINITIONS, ATTENTION),
    "terms-measured": measured_terms,
    "loss": lambda: bounds(LOSS_DEFINITIONS, LOSS),
    "loss-measured": measured_loss,
}
MEASURED = ("terms-measured", "loss-measured")


def with_tables(text: str, *, measure_again: bool) -> str:
    """The page with its tables made anew; those that are measured only if asked for."""

    def made(match: re.Match[str]) -> str:
        name = match[2]
        return match[0] if name in MEASURED and not measure_again else f"{match[1]}\n{TABLES[name]()}\n\n{match[4]}"

    return TABLE.sub(made, text)


def main() -> None:
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")  # NumPy's, about infinities
    torch.set_num_threads(1)
    prepare_interpreter()
    write_text(PAGE, with_tables(PAGE.read_text(encoding="utf-8"), measure_again=True))
    print(f"{PAGE.relative_to(ROOT)}: written")


if __name__ == "__main__":
    main()
