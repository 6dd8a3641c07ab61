"""The registered ops: schemas, fakes, gradients, and what implements them.

The only file that knows ``torch.ops``. Schemas are defined here alone; the native libraries only register
implementations (defining a schema twice aborts the process), so that importing works with no library built. One
overload per backend. Triton is imported at the first call of an op that it implements.
The gradient is an ``autograd.Function`` outside the op, cheaper per call than ``torch.library.register_autograd``.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import re
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attbalance_ext.kernels.attention_terms.reference import AttentionTerms
from attbalance_ext.kernels.balanced_loss.reference import SAMPLE_ROWS, Objective
from attbalance_ext.kernels.dtypes import DTYPES
from attbalance_ext.kernels.elf import is_cut_short
from attbalance_ext.kernels.problem import Problem, build

BACKENDS = ("cpu", "triton", "cuda")
TRITON = (3, 6)  # the oldest that the kernels run with
# Triton on CPU tensors, one program after another; Triton reads the variable when it is imported.
TRITON_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "on", "true")
CPU_LIBRARY, CUDA_LIBRARY = (Path(__file__).parent / "lib" / f"libattbalance_{name}.so" for name in ("cpu", "cuda"))

MAX_GRIDS = 16  # of one region: what the arguments of a CUDA launch hold

_definitions = torch.library.Library("attbalance_ext", "DEF")


def _load(path: Path, compiler: str = "a C++ compiler") -> list[Problem]:
    """Load a native library; why it could not be loaded, or []."""
    if not path.exists():
        return [Problem(f"{path.name} was not built", f"with PyTorch, CMake and {compiler} installed, {build()}")]
    if is_cut_short(path):
        return [Problem(f"{path.name} is cut short, at {path.stat().st_size} bytes", build())]
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = " ".join(str(error).split())
        return [Problem(f"{path.name} does not load with PyTorch {torch.__version__} ({reason})", build())]
    return []


def _load_cuda(path: Path) -> list[Problem]:
    """The same for the library that names CUDA symbols, which PyTorch without CUDA does not have."""
    if torch.version.cuda:
        return _load(path, "the CUDA toolkit (nvcc)")
    here = "is here" if path.exists() else "was not built either"
    reason = f"PyTorch {torch.__version__} was built without CUDA"
    return [Problem(reason, f"install a build of it with CUDA; {path.name} {here}")]


def loaded_libraries() -> dict[Path, bool]:
    """Where the native libraries are, or would be, and whether they are loaded."""
    return {CPU_LIBRARY: not _cpu_problems, CUDA_LIBRARY: not _cuda_problems}


def cpu_library_problems() -> list[Problem]:
    """Why the C++ kernels cannot run here; [] when they can."""
    return list(_cpu_problems)


def cuda_library_problems() -> list[Problem]:
    """Why the CUDA kernels cannot run here; [] when they can."""
    return _cuda_problems + _device_problems() or _kernel_problems()


@functools.cache
def _device_problems() -> list[Problem]:
    # Asked when somebody needs to know, not on import: looking for a device spoils CUDA for processes forked later.
    return [] if torch.cuda.is_available() or not torch.version.cuda else [_NO_DEVICE]


@functools.cache
def _kernel_problems() -> list[Problem]:
    """Whether the library has code for the current device that its driver can run (csrc/cuda/probe.cu)."""
    problem = ctypes.CDLL(str(CUDA_LIBRARY)).attbalance_cuda_problem
    problem.restype = ctypes.c_char_p
    message = problem()
    if not message:
        return []
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    remedy = build(TORCH_CUDA_ARCH_LIST=capability)
    if b"driver version is insufficient" in message:
        remedy = f"update the driver, or build with the CUDA toolkit that it knows: {remedy}"
    device = f"{torch.cuda.get_device_name()} (compute capability {capability})"
    return [Problem(f"{CUDA_LIBRARY.name} on {device}: {message.decode()}", remedy)]


@functools.cache
def _installed_triton_problems() -> tuple[Problem, ...]:
    """Looks at what is installed, without importing it."""
    remedy = f"pip install 'triton>={'.'.join(map(str, TRITON))}'"
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return (Problem("Triton is not installed", remedy),)
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < TRITON:
        return (Problem(f"Triton {version} is too old", remedy),)
    return ()


@functools.cache
def _triton_compiler_problems() -> tuple[Problem, ...]:
    """At its first launch Triton compiles some C against Python's headers, unless its cache has the result."""
    named = os.environ.get("CC")
    compiler = shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_path("include", "posix_prefix")) / "Python.h"
    if compiler and headers.exists():
        return ()
    try:
        importlib.import_module("triton.runtime").driver.active.utils  # noqa: B018 made when it is asked for
    except Exception as error:
        if not compiler:
            remedy = "install a C compiler (Debian, Ubuntu: apt install gcc) or name one: CC=..."
        else:
            remedy = "install Python's headers (Debian, Ubuntu: apt install python3-dev)"
        return (Problem(f"Triton cannot compile its launcher ({' '.join(str(error).split())})", remedy),)
    return ()


def triton_problems() -> list[Problem]:
    """Why the Triton kernels cannot run here; [] when they can."""
    installed = list(_installed_triton_problems())
    if TRITON_IS_INTERPRETED:
        return installed
    if not torch.cuda.is_available():
        return [*installed, _NO_DEVICE]
    return installed or list(_triton_compiler_problems())


_ASK_THE_DRIVER = "see what nvidia-smi says, and CUDA_VISIBLE_DEVICES"
_NO_DEVICE = Problem(
    "PyTorch finds no CUDA device", _ASK_THE_DRIVER if torch.version.cuda else "install a build of PyTorch with CUDA"
)


# --- attention_terms -------------------------------------------------------------------------------------------------

for _backend in BACKENDS:
    _definitions.define(
        f"attention_terms.{_backend}(Tensor[] query, Tensor[] key, float[] scale, Tensor region, int[] grids, "
        "int rule, Tensor? padding, Tensor[] teacher_query, Tensor[] teacher_key, float[] teacher_scale, "
        "bool need_key_means) -> (Tensor in_box, Tensor rac, Tensor mrc, Tensor valid, Tensor scores, "
        "Tensor teacher_scores, Tensor stats, Tensor key_means)"
    )
    _definitions.define(
        f"attention_terms_backward.{_backend}(Tensor grad_in_box, Tensor grad_rac, Tensor grad_mrc, Tensor[] query, "
        "float[] scale, Tensor region, int[] grids, int rule, Tensor? padding, Tensor in_box, Tensor scores, "
        "Tensor teacher_scores, Tensor stats, Tensor key_means, int[] key_dtype, bool[] sequence_first, "
        "bool[] need_query, bool[] need_key, bool need_dot) -> "
        "(Tensor[] grad_query, Tensor[] grad_key, Tensor grad_dot)"
    )


def _attention_terms_fake(
    query: list[Tensor],
    key: list[Tensor],
    scale: Sequence[float],
    region: Tensor,
    grids: Sequence[int],
    rule: int,
    padding: Tensor | None,
    teacher_query: list[Tensor],
    teacher_key: list[Tensor],
    teacher_scale: Sequence[float],
    need_key_means: bool,
) -> tuple[Tensor, ...]:
    layers, (batch, tokens, width) = len(key), key[0].shape
    per_sample = [query[0].new_empty(layers, batch) for _ in range(3)]
    scores = query[0].new_empty(layers, batch, tokens)
    return (
        *per_sample,
        query[0].new_empty(batch, dtype=torch.bool),
        scores,
        torch.empty_like(scores) if teacher_key else scores.new_empty(0),
        scores.new_empty(layers, batch, 4),
        scores.new_empty(layers, batch, 3, width) if need_key_means else scores.new_empty(0),
    )


def _attention_terms_backward_fake(
    grad_in_box: Tensor,
    grad_rac: Tensor,
    grad_mrc: Tensor,
    query: list[Tensor],
    scale: Sequence[float],
    region: Tensor,
    grids: Sequence[int],
    rule: int,
    padding: Tensor | None,
    in_box: Tensor,
    scores: Tensor,
    teacher_scores: Tensor,
    stats: Tensor,
    key_means: Tensor,
    key_dtype: Sequence[int],
    sequence_first: Sequence[bool],
    need_query: Sequence[bool],
    need_key: Sequence[bool],
    need_dot: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    _, batch, tokens = scores.shape
    width = query[0].shape[1]
    grad_query = [torch.empty_like(q) for q, needed in zip(query, need_query, strict=True) if needed]
    grad_key = []
    for code, tokens_first, needed in zip(key_dtype, sequence_first, need_key, strict=True):
        if not needed:
            continue
        if tokens_first:
            grad_key.append(scores.new_empty(tokens, batch, width, dtype=DTYPES[code]).transpose(0, 1))
        else:
            grad_key.append(scores.new_empty(batch, tokens, width, dtype=DTYPES[code]))
    return grad_query, grad_key, torch.empty_like(scores) if need_dot else scores.new_empty(0)


Gradients = tuple[Tensor | None, ...]


def _differentiable_once(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Make second derivatives, which the kernels do not compute, an error.

    PyTorch's `once_differentiable` refuses them only where the incoming gradient requires one; these gradients depend
    on the op's inputs too, and would silently pass for constants.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *incoming: Tensor | None) -> Gradients:
        with torch.no_grad():
            gradients = backward(ctx, *incoming)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return gradients
        return tuple(
            None if gradient is None else _NoSecondDerivative.apply(gradient.requires_grad_()) for gradient in gradients
        )

    return wrapper


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _incoming: Tensor) -> Tensor:
        raise RuntimeError("attbalance_ext's native ops can be differentiated once; use backend='reference' for more")


class AttentionSpec(NamedTuple):
    """What is constant in one `attention_terms` call; `grids` is flat, and empty when the region is given as
    weights."""

    backend: str
    scale: tuple[float, ...]
    grids: tuple[int, ...]
    rule: int
    teacher_scale: tuple[float, ...]


def attention_terms(
    spec: AttentionSpec,
    region: Tensor,
    padding: Tensor | None,
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    teacher_query: Sequence[Tensor],
    teacher_key: Sequence[Tensor],
    offset: Sequence[Tensor | None],
) -> AttentionTerms:
    """Run a registered backend, differentiable in query, key and offset.

    query: L x (B, D) in the arithmetic's dtype, contiguous, L >= 1. key: L x (B, N, D), last dimension contiguous.
    region: boxes (B, 4) float32 when ``spec.grids``, else weights (B, N) in the arithmetic's dtype; contiguous.
    padding: (B, N) bool, contiguous. The teacher's lists are L long or empty.
    offset: L x (B, N) zeros in the arithmetic's dtype, or None; never read. They stand in for what is added to
    ``query . key``, and get the gradient by it.
    """
    tensors = [*query, *key, *teacher_query, *teacher_key]
    if torch.compiler.is_compiling():  # refuses one tensor twice, and layers may share one: a decoder's memory
        tensors = [tensor.view_as(tensor) for tensor in tensors]
    return AttentionTerms(*_AttentionTerms.apply(spec, region, padding, *offset, *tensors))


class _AttentionTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spec: AttentionSpec, region: Tensor, padding: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, ...]:
        layers = len(spec.scale)
        _, query, key, teacher_query, teacher_key = (list(tensors[i * layers : (i + 1) * layers]) for i in range(5))
        needed = ctx.needs_input_grad[3:]
        ctx.need_dot, ctx.need_query, ctx.need_key = (list(needed[i * layers : (i + 1) * layers]) for i in range(3))
        forward = getattr(torch.ops.attbalance_ext.attention_terms, spec.backend)
        in_box, rac, mrc, valid, *kept = forward(
            query,
            key,
            spec.scale,
            region,
            spec.grids,
            spec.rule,
            padding,
            teacher_query,
            teacher_key,
            spec.teacher_scale,
            any(ctx.need_query),
        )
        ctx.set_materialize_grads(False)
        ctx.spec = spec
        ctx.teachers = len(teacher_query) + len(teacher_key)
        ctx.key_dtype = [DTYPES.index(k.dtype) for k in key]
        ctx.sequence_first = [k.stride(0) < k.stride(1) for k in key]
        ctx.save_for_backward(region, padding, in_box, *kept, *query)
        ctx.mark_non_differentiable(valid)
        return in_box, rac, mrc, valid

    @staticmethod
    @_differentiable_once
    def backward(
        ctx: Any, grad_in_box: Tensor | None, grad_rac: Tensor | None, grad_mrc: Tensor | None, _valid: None
    ) -> Gradients:
        region, padding, in_box, scores, teacher_scores, stats, key_means, *query = ctx.saved_tensors
        spec: AttentionSpec = ctx.spec
        backward = getattr(torch.ops.attbalance_ext.attention_terms_backward, spec.backend)
        incoming = [
            torch.zeros_like(in_box) if gradient is None else gradient.contiguous()
            for gradient in (grad_in_box, grad_rac, grad_mrc)
        ]
        grad_query, grad_key, grad_dot = backward(
            *incoming,
            query,
            spec.scale,
            region,
            spec.grids,
            spec.rule,
            padding,
            in_box,
            scores,
            teacher_scores,
            stats,
            key_means,
            ctx.key_dtype,
            ctx.sequence_first,
            ctx.need_query,
            ctx.need_key,
            any(ctx.need_dot),
        )
        student = (*_place(grad_query, ctx.need_query), *_place(grad_key, ctx.need_key))
        dots = (grad_dot[layer] if needed else None for layer, needed in enumerate(ctx.need_dot))
        return None, None, None, *dots, *student, *(None,) * ctx.teachers


def _place(gradients: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    remaining = iter(gradients)
    return [next(remaining) if flag else None for flag in needed]


# --- balanced_loss ---------------------------------------------------------------------------------------------------

for _backend in BACKENDS:
    _definitions.define(
        f"balanced_loss.{_backend}(Tensor in_box, Tensor rac, Tensor mrc, Tensor valid, Tensor pred, Tensor target, "
        "Tensor box_ratio, Tensor? rho, float alpha_ar, float alpha_l1, float alpha_giou, float weight_rac, "
        "float weight_mrc, int difficulty_from, bool detach_difficulty, bool adw, bool odw, bool plain) -> "
        "(Tensor loss, Tensor samples, Tensor rho, Tensor grad_rac, Tensor grad_mrc, Tensor grad_pred)"
    )


def _balanced_loss_fake(
    in_box: Tensor,
    rac: Tensor,
    mrc: Tensor,
    valid: Tensor,
    pred: Tensor,
    target: Tensor,
    box_ratio: Tensor,
    rho: Tensor | None,
    alpha_ar: float,
    alpha_l1: float,
    alpha_giou: float,
    weight_rac: float,
    weight_mrc: float,
    difficulty_from: int,
    detach_difficulty: bool,
    adw: bool,
    odw: bool,
    plain: bool,
) -> tuple[Tensor, ...]:
    return (
        pred.new_empty(()),
        pred.new_empty(len(SAMPLE_ROWS), target.shape[0]),
        pred.new_empty(0 if plain else in_box.shape[0]),
        torch.empty_like(rac),
        torch.empty_like(mrc),
        torch.empty_like(pred),
    )


class Weights(NamedTuple):
    """The numbers of one `balanced_loss` call, in the order of the schema."""

    alpha_ar: float
    alpha_l1: float
    alpha_giou: float
    weight_rac: float
    weight_mrc: float
    difficulty_from: int
    detach_difficulty: bool
    adw: bool
    odw: bool
    plain: bool


def balanced_loss(
    backend: str,
    weights: Weights,
    in_box: Tensor,
    rac: Tensor,
    mrc: Tensor,
    valid: Tensor,
    pred: Tensor,
    target: Tensor,
    box_ratio: Tensor,
    rho: Tensor | None,
) -> Objective:
    """Run a registered backend; tensors contiguous, in the arithmetic's dtype; differentiable in rac, mrc and pred."""
    return Objective(*_BalancedLoss.apply(backend, weights, in_box, rac, mrc, valid, pred, target, box_ratio, rho))


class _BalancedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        weights: Weights,
        in_box: Tensor,
        rac: Tensor,
        mrc: Tensor,
        valid: Tensor,
        pred: Tensor,
        target: Tensor,
        box_ratio: Tensor,
        rho: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        forward = getattr(torch.ops.attbalance_ext.balanced_loss, backend)
        loss, samples, rho, *gradients = forward(in_box, rac, mrc, valid, pred, target, box_ratio, rho, *weights)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(samples, rho)
        return loss, samples, rho

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, grad_loss: Tensor | None, _samples: None, _rho: None) -> Gradients:
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        needed = [ctx.needs_input_grad[i] for i in (3, 4, 6)]
        wanted = [gradient for gradient, flag in zip(ctx.saved_tensors, needed, strict=True) if flag]
        rac, mrc, pred = _place(torch._foreach_mul(wanted, grad_loss), needed)  # one launch
        return None, None, None, rac, mrc, None, pred, None, None, None


# --- registration ----------------------------------------------------------------------------------------------------

_FAKES: dict[str, Callable[..., Any]] = {
    "attention_terms": _attention_terms_fake,
    "attention_terms_backward": _attention_terms_backward_fake,
    "balanced_loss": _balanced_loss_fake,
}
for _backend in BACKENDS:
    for _name, _fake in _FAKES.items():
        torch.library.register_fake(f"attbalance_ext::{_name}.{_backend}", _fake, lib=_definitions)


def _triton_implementation(stem: str, name: str) -> Callable[..., Any]:
    def implementation(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"attbalance_ext.kernels.{stem}.triton"), name)(*arguments)

    return implementation


for _key in ("CUDA", "CPU") if TRITON_IS_INTERPRETED else ("CUDA",):
    for _stem, _name in (
        ("attention_terms", "attention_terms"),
        ("attention_terms", "attention_terms_backward"),
        ("balanced_loss", "balanced_loss"),
    ):
        _definitions.impl(f"{_name}.triton", _triton_implementation(_stem, _name), _key)

_cpu_problems = _load(CPU_LIBRARY)
_cuda_problems = _load_cuda(CUDA_LIBRARY)
