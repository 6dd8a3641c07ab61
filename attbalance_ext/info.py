"""What is installed, which backends can run, and whether they agree with the reference."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

import torch

from attbalance_ext.attention import QueryAttention
from attbalance_ext.kernels.choose import BACKENDS, available_backends
from attbalance_ext.loss import AttBalanceLoss
from attbalance_ext.region import BoxRegion
from attbalance_ext.terms import attention_terms

_TOLERANCE = 2e-5


@dataclass(frozen=True)
class Check:
    """One backend against the reference on a small problem; ``error`` is the worst relative error of a value or
    gradient."""

    backend: str
    error: float
    passed: bool


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
        found["gpu"] = torch.cuda.get_device_name()
    else:
        found["gpu"] = "none that PyTorch can use"
    return found


def self_check() -> list[Check]:
    """Run every backend that can run here against the float64 reference, forward and backward."""
    truth = _run("reference", torch.float64)
    checks = []
    for backend, reasons in available_backends().items():
        if reasons:
            continue
        values = _run(backend, torch.float32)
        error = max(
            ((value.double() - true).norm() / true.norm()).item() for value, true in zip(values, truth, strict=True)
        )
        checks.append(Check(backend, error, error <= _TOLERANCE))
    return checks


def print_report() -> bool:
    """Print the environment, the backends (or why they cannot run) and the self-check; False if a backend is wrong."""
    for name, value in environment().items():
        print(f"{name:15} {value}")
    checks = {check.backend: check for check in self_check()}
    print("\nbackends, with the worst relative error of any value or gradient against float64:")
    for name, reasons in available_backends().items():
        if name in checks:
            verdict = "ok" if checks[name].passed else "WRONG: please report this"
            print(f"  {name:10} {checks[name].error:.1e}  {verdict}")
        else:
            print(f"  {name:10} cannot run here: {'; '.join(reasons)}")
    return all(check.passed for check in checks.values())


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
