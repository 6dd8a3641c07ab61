"""Who takes part in which suite, in the order of the tables."""

from __future__ import annotations

from benchmarks.providers import compiled, graph, liger, ours, step, tap, today
from benchmarks.task import Provider

_EAGER = "eager PyTorch (the reference)"
_COMPILE = "torch.compile of the reference"
_AUTOTUNE = "torch.compile of the reference, mode max-autotune"
_CPU, _CUDA = ("cpu",), ("cuda",)


def _ours(backend: str) -> str:
    return f"attbalance_ext, backend {backend}"


PROVIDERS: dict[str, tuple[Provider, ...]] = {
    "op": (
        Provider("eager", _EAGER, ours.op("reference")),
        Provider("compile", _COMPILE, compiled.op("default")),
        Provider("compile-max-autotune", _AUTOTUNE, compiled.op("max-autotune")),
        Provider("today", "as done today (projection redone, weights and masks materialised)", today.op, slack=3),
        Provider("liger", "PyTorch, with Liger-Kernel's KL divergence for MRC", liger.op, devices=_CUDA),
        Provider("ours-cpu", _ours("cpu"), ours.op("cpu"), devices=_CPU),
        Provider("ours-triton", _ours("triton"), ours.op("triton"), devices=_CUDA),
        Provider("ours-cuda", _ours("cuda"), ours.op("cuda"), devices=_CUDA),
        Provider("ours-cuda-graph", f"{_ours('cuda')}, replayed from a CUDA graph", graph.op, devices=_CUDA),
    ),
    "tail": (
        Provider("eager", _EAGER, ours.tail("reference")),
        Provider("compile", _COMPILE, compiled.tail("default")),
        Provider("compile-max-autotune", _AUTOTUNE, compiled.tail("max-autotune")),
        Provider("today", "as done today (SciPy's rho of each layer on the host)", today.tail),
        Provider("ours-cpu", _ours("cpu"), ours.tail("cpu"), devices=_CPU),
        Provider("ours-triton", _ours("triton"), ours.tail("triton"), devices=_CUDA),
        Provider("ours-cuda", _ours("cuda"), ours.tail("cuda"), devices=_CUDA),
    ),
    "tap": (
        Provider("plain", "the stack without attention terms", tap.plain, objective="plain"),
        Provider("today", "as done today (attention materialised, projections redone)", tap.today, objective="terms"),
        Provider("today-fused", "the same, the host's attention left fused", tap.today_fused, objective="terms"),
        Provider(
            "today-rewritten",
            "attention rewritten to hand out its scores (materialised, nothing done twice)",
            tap.today_rewritten,
            objective="terms",
        ),
        Provider("ours-reference", f"tap, {_ours('reference')}", tap.ours("reference"), objective="terms"),
        Provider("ours-cpu", f"tap, {_ours('cpu')}", tap.ours("cpu"), objective="terms", devices=_CPU),
        Provider("ours-triton", f"tap, {_ours('triton')}", tap.ours("triton"), objective="terms", devices=_CUDA),
        Provider("ours-cuda", f"tap, {_ours('cuda')}", tap.ours("cuda"), objective="terms", devices=_CUDA),
    ),
    "step": (
        Provider("plain", "without AttBalance", step.plain, objective="plain"),
        Provider("today", "AttBalance as done today", step.today, objective="complete"),
        Provider("today-fused", "the same, attention left fused", step.today_fused, objective="complete"),
        Provider(
            "today-without-teacher", "as done today, RAC alone", step.today_without_teacher, objective="without teacher"
        ),
        Provider("ours", "AttBalance by attbalance_ext", step.ours, objective="complete"),
        Provider(
            "ours-without-teacher",
            "attbalance_ext, RAC alone: the attention terms without the teacher's cost",
            step.ours_without_teacher,
            objective="without teacher",
        ),
        Provider("teacher-update", "the teacher's moving average alone", step.teacher_update, "update", part=True),
        Provider("teacher-forward", "the teacher's forward pass alone", step.teacher_forward, "teacher", part=True),
    ),
}


def on_device(suite: str, device: str) -> list[Provider]:
    """The providers of a suite that run on a type of device."""
    return [provider for provider in PROVIDERS[suite] if device in provider.devices]
