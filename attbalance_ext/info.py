"""What is installed, which backends can run, whether they agree with the reference, and what to do where not.

    python -m attbalance_ext.info [--json] [--require BACKEND]

The same as ``attbalance info``; needs the library alone. Exit code 1 when a backend disagrees with the reference, or
when one that ``--require`` or ``ATTBALANCE_BACKEND`` names cannot run here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata

import torch

from attbalance_ext.attention import QueryAttention
from attbalance_ext.kernels import ops
from attbalance_ext.kernels.build_info import build_info
from attbalance_ext.kernels.choose import BACKENDS, ENVIRONMENT, preferred
from attbalance_ext.kernels.problem import build
from attbalance_ext.loss import AttBalanceLoss
from attbalance_ext.region import BoxRegion
from attbalance_ext.terms import attention_terms

_TOLERANCE = 2e-5


@dataclass(frozen=True)
class Library:
    """A native library: its file, how it was built, whether it is loaded."""

    name: str
    folder: str
    size: int  # bytes; 0: it was not built
    built: dict[str, str]
    loaded: bool


@dataclass(frozen=True)
class Check:
    """One backend against the reference on a small problem; ``error`` is the worst relative error of a value or
    gradient. ``failure`` says what happened where there is no result."""

    backend: str
    error: float
    passed: bool
    seconds: float = 0.0
    failure: str = ""


@dataclass(frozen=True)
class Finding:
    """A problem with a library, a backend or ATTBALANCE_BACKEND. A fault makes the exit code 1."""

    about: str
    reason: str
    remedy: str
    fault: bool = False


@dataclass(frozen=True)
class Report:
    """All that there is to say. ``auto`` is the backend that "auto" takes, by the device of the tensors."""

    environment: dict[str, str]
    libraries: list[Library]
    checks: list[Check]
    auto: dict[str, str]
    findings: list[Finding]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether nothing found is a fault."""
        return not any(finding.fault for finding in self.findings)

    def as_json(self) -> str:
        """The report as JSON; an error that is no number is null."""
        found = {"passed": self.passed, **asdict(self)}
        for check in found["checks"]:
            check["error"] = check["error"] if math.isfinite(check["error"]) else None
        return json.dumps(found, indent=2)

    def as_text(self) -> str:
        """The report for people: what there is to do stands under what it is about."""
        lines = [f"{name:15} {value}" for name, value in self.environment.items()]
        lines += ["", f"libraries in {self.libraries[0].folder}"]
        for library in self.libraries:
            lines += self._about(library.name, f"  {library.name:22} {_facts(library)}")
        lines += ["", "backends, with the worst relative error of any value or gradient against float64:"]
        checks = {check.backend: check for check in self.checks}
        for name in BACKENDS:
            result = "cannot run here"
            if name in checks:
                verdict = "ok" if checks[name].passed else "WRONG"
                result = f"{checks[name].error:.1e}  {verdict}, {checks[name].seconds:.2f} s"
            lines += self._about(name, f"  {name:10} {result}")
        auto = (f"{backend} for tensors on {device}" for device, backend in self.auto.items())
        lines += ["", *self._about(ENVIRONMENT, f'"auto" takes {", ".join(auto)}')]
        return "\n".join(lines)

    def _about(self, what: str, line: str) -> list[str]:
        findings = [finding for finding in self.findings if finding.about == what]
        if findings:
            line += f": {'; '.join(finding.reason for finding in findings)}"
        return [line, *(f"{'':12} -> {finding.remedy}" for finding in findings)]


def environment() -> dict[str, str]:
    """Versions and hardware, in the order to print them."""
    found = {
        "attbalance_ext": _version("attbalance_ext"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    found["triton"] = _version("triton")
    found["platform"] = f"{platform.system()} {platform.machine()}"
    found["cpu threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found["gpu"] = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    else:
        found["gpu"] = "none that PyTorch can use"
    return found


def libraries() -> list[Library]:
    """The native libraries, built or not."""
    return [
        Library(path.name, str(path.parent), path.stat().st_size if path.exists() else 0, build_info(path), loaded)
        for path, loaded in ops.loaded_libraries().items()
    ]


def self_check() -> list[Check]:
    """Run every backend that can run here against the float64 reference, forward and backward."""
    truth = _run("reference", torch.float64)
    return [_check(name, truth) for name, backend in BACKENDS.items() if not backend.problems()]


def report(require: Sequence[str] = ()) -> Report:
    """Look at everything. ``require`` names backends that must be able to run."""
    start = time.perf_counter()
    found, checks = libraries(), self_check()
    findings = [*_old(found), *_unusable(require), *_wrong(checks), *_named()]
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    auto = {device: preferred(device) for device in devices}
    return Report(environment(), found, checks, auto, findings, time.perf_counter() - start)


def print_report(require: Sequence[str] = (), as_json: bool = False) -> bool:
    """Print the report; False where it has a fault."""
    found = report(require)
    print(found.as_json() if as_json else found.as_text())
    return found.passed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives back the exit code."""
    parser = argparse.ArgumentParser(
        prog="attbalance info", description="Say what is installed, which backends run here, and what to do."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--require", action="append", default=[], choices=list(BACKENDS), help="exit code 1 if it cannot run here"
    )
    options = parser.parse_args(arguments)
    return 0 if print_report(options.require, options.json) else 1


# --- findings --------------------------------------------------------------------------------------------------------


def _old(found: Sequence[Library]) -> Iterator[Finding]:
    """Libraries that another version left behind."""
    installed = _version("attbalance_ext")
    for library in found:
        built = library.built.get("version", installed)
        if built != installed:
            yield Finding(library.name, f"was built for attbalance_ext {built}, this is {installed}", build())


def _unusable(require: Sequence[str]) -> Iterator[Finding]:
    for name, backend in BACKENDS.items():
        for problem in backend.problems():
            yield Finding(name, *problem, fault=name in require)


def _wrong(checks: Sequence[Check]) -> Iterator[Finding]:
    remedy = f"report this with the output of 'attbalance info --json'; until then set {ENVIRONMENT}=reference"
    for check in checks:
        if not check.passed:
            yield Finding(check.backend, check.failure or "disagrees with the reference", remedy, fault=True)


def _named() -> Iterator[Finding]:
    """What is wrong with ATTBALANCE_BACKEND."""
    named = os.environ.get(ENVIRONMENT, "auto")
    if named in BACKENDS:
        for problem in BACKENDS[named].problems():
            reason = f"{ENVIRONMENT}={named}, which cannot run here: {problem.reason}"
            yield Finding(ENVIRONMENT, reason, f"unset {ENVIRONMENT}, or: {problem.remedy}", fault=True)
    elif named != "auto":
        reason = f"{ENVIRONMENT}={named} names no backend"
        yield Finding(ENVIRONMENT, reason, f"unset it, or set it to one of auto, {', '.join(BACKENDS)}", fault=True)


def _facts(library: Library) -> str:
    if not library.size:
        return "not built"
    facts = [f"{library.size / 1e6:.1f} MB", "loaded" if library.loaded else "not loaded"]
    built = library.built
    if built:
        facts.append(f"for PyTorch >= {built['abi']}, compiled with {built['pytorch']} by {built['compiler']}")
    if "cuda" in built:
        facts.append(f"CUDA {built['cuda']} for {built['architectures']}")
    return ", ".join(facts)


# --- self-check ------------------------------------------------------------------------------------------------------


def _check(backend: str, truth: list[torch.Tensor]) -> Check:
    start = time.perf_counter()
    try:
        values = _run(backend, torch.float32)
    except Exception as error:  # the other backends are still to be looked at
        failure = f"fails: {type(error).__name__}: {' '.join(str(error).split())}"
        return Check(backend, math.nan, False, time.perf_counter() - start, failure)
    errors = [(value.double() - true).norm() / true.norm() for value, true in zip(values, truth, strict=True)]
    worst = torch.stack(errors).max().item()  # NaN if one is
    return Check(backend, worst, worst <= _TOLERANCE, time.perf_counter() - start)


def _run(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Terms, loss and gradients of a fixed problem: L=2, B=3, N=100 (a 10 x 10 grid), D=64. Returned on the CPU."""
    device = (BACKENDS[backend].devices or ("cpu",))[0]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    query = [normal(3, 64).requires_grad_() for _ in range(2)]
    key = [normal(3, 100, 64).requires_grad_() for _ in range(2)]
    teacher = QueryAttention([normal(3, 64) for _ in range(2)], [normal(3, 100, 64) for _ in range(2)], 0.1)
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.6], [0.2, 0.3, 0.2, 0.2], [0.8, 0.7, 0.3, 0.5]]).to(device, dtype)
    padding = torch.zeros(3, 100, dtype=torch.bool, device=device)
    padding[1, 80:] = True
    pred = (boxes + 0.05 * normal(3, 4)).requires_grad_()
    student = QueryAttention(query, key, 0.1, padding)
    terms = attention_terms(student, BoxRegion(boxes, (10, 10)), teacher=teacher, backend=backend)
    output = AttBalanceLoss(backend=backend)(terms, pred, boxes)
    output.loss.backward()
    gradients = [t.grad for t in (*query, *key, pred) if t.grad is not None]
    return [tensor.detach().cpu() for tensor in (*terms[:3], output.loss, *gradients)]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    raise SystemExit(main())
