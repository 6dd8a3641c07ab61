"""The attention terms: in-box attention, RAC and MRC of every supervised layer and sample."""

from __future__ import annotations

import torch
from torch import Tensor

from attbalance_ext.attention import QueryAttention, accumulation_dtype, check_padding
from attbalance_ext.kernels import ops
from attbalance_ext.kernels.attention_terms import reference
from attbalance_ext.kernels.attention_terms.reference import RULES, AttentionTerms
from attbalance_ext.kernels.choose import choose
from attbalance_ext.region import BoxRegion

__all__ = ["AttentionTerms", "attention_terms"]


def attention_terms(
    student: QueryAttention,
    region: BoxRegion | Tensor,
    *,
    teacher: QueryAttention | None = None,
    key_padding_mask: Tensor | None = None,
    backend: str = "auto",
) -> AttentionTerms:
    """RAC, MRC and in-box attention of L layers in one call, unreduced (AttBalance, section 3).

    With p the softmax of the student's scores over tokens that are not padding, m the region and t the teacher's p::

        in_box = A_in = sum_j p_j m_j
        rac    = -2 log A_in
        mrc    = KL(t || p) = sum_j t_j (log t_j - log p_j)

    in log space, without clamp or epsilon, exact from A_in = 1e-30 to 1 - 1e-8.

    Args:
        student: the L supervised layers; gradients reach its queries and keys. (Where a tap recorded them, the kernels
            hand the keys' gradient to the tap, which adds it to that of the layer's input: ``student.key`` gets none.)
        region: a :class:`BoxRegion`, or weights (B, N), floating or bool, clamped to [0, 1]. No gradient.
        teacher: the momentum teacher's attention, the same L, B, N and D. No gradient.
        key_padding_mask: (B, N) bool, True = ignore; overrides ``student.padding``. It holds for student and teacher.
        backend: "auto" (``ATTBALANCE_BACKEND``, else the fastest that can run), "reference", "cpu", "triton" or "cuda".

    Returns:
        :class:`AttentionTerms` ``(in_box, rac, mrc, valid)``: the first three (L, B) float32 (float64 for float64
        inputs), differentiable once; ``valid`` (B,) bool is False where no token that is not padding has weight. There
        ``in_box`` and ``rac`` are 0 and give no gradient. ``mrc`` is 0 without a teacher. A score that is not finite
        makes its own (layer, sample) NaN and no other.

    Raises:
        TypeError, ValueError: wrong types, ranks, shapes, devices, unknown backend; the message names the argument.
        BackendUnavailable: an explicit backend that cannot run here.
    """
    if not isinstance(student, QueryAttention):
        raise TypeError(f"student must be a QueryAttention, got {type(student).__name__}")
    padding = student.padding
    if key_padding_mask is not None:
        check_padding("key_padding_mask", key_padding_mask, student.key)
        padding = key_padding_mask
    dtype = accumulation_dtype(student)
    weights, grids, rule = _region(region, student, dtype)
    if teacher is not None:
        _check_teacher(teacher, student)
    chosen = choose(backend, weights.device.type, dtype)
    if not student.key:
        empty = torch.zeros(0, weights.shape[0], device=weights.device)
        inside = reference.rasterise(weights, grids, RULES[rule]) if grids else weights
        if padding is not None:
            check_padding("padding", padding, [inside])
            inside = inside.masked_fill(padding, 0)
        return AttentionTerms(empty, empty.clone(), empty.clone(), (inside.clamp(0, 1) != 0).any(-1))

    query = [q if q.dtype == dtype else q.to(dtype) for q in student.query]
    if len(grids) > ops.MAX_GRIDS:
        weights, grids = reference.rasterise(weights, grids, RULES[rule]).to(dtype), ()
    if chosen == "reference":
        if grids:
            weights = reference.rasterise(weights, grids, RULES[rule])
        teachers = () if teacher is None else ([q.to(dtype) for q in teacher.query], teacher.key, teacher.scale)
        return reference.attention_terms(query, student.key, student.scale, weights.to(dtype), padding, *teachers)
    # Where an offset takes a key's gradient the key itself gets none. Not so above: a second derivative needs the keys.
    offset = [zeros if zeros is None else zeros.to(dtype) for zeros in student.offset]
    key = [k if zeros is None else k.detach() for k, zeros in zip(student.key, offset, strict=True)]
    return ops.attention_terms(
        ops.AttentionSpec(
            backend=chosen,
            scale=student.scale,
            grids=tuple(n for grid in grids for n in grid),
            rule=rule,
            teacher_scale=() if teacher is None else teacher.scale,
        ),
        weights.contiguous(),
        None if padding is None else padding.contiguous(),
        [q.contiguous() for q in query],
        [_readable(k, dtype) for k in key],
        [] if teacher is None else [_constant(q, dtype).contiguous() for q in teacher.query],
        [] if teacher is None else [_readable(_constant(k, k.dtype), dtype) for k in teacher.key],
        offset,
    )


def _readable(key: Tensor, dtype: torch.dtype) -> Tensor:
    """A key the kernels read in place: last dimension contiguous; float64 exactly when the arithmetic is."""
    if (dtype == torch.float64) != (key.dtype == torch.float64):
        key = key.to(dtype)
    if key.stride(-1) == 1:
        return key
    return key.clone(memory_format=torch.contiguous_format)  # contiguous() leaves the strides of an empty tensor


def _region(
    region: BoxRegion | Tensor, student: QueryAttention, dtype: torch.dtype
) -> tuple[Tensor, tuple[tuple[int, int], ...], int]:
    """(boxes float32, grids, rule code), or (weights, (), 0), checked against the student."""
    if isinstance(region, BoxRegion):
        tensor = region.boxes
        if student.key and (region.tokens != student.key[0].shape[1] or tensor.shape[0] != student.key[0].shape[0]):
            raise ValueError(
                f"region must cover the keys' (B, N) = {tuple(student.key[0].shape[:2])}: "
                f"got {tensor.shape[0]} boxes on grids {region.grids}, which give N = {region.tokens}"
            )
    elif isinstance(region, Tensor):
        tensor = region
        if tensor.dtype != torch.bool and not tensor.is_floating_point():
            raise TypeError(f"region weights must be floating or bool, got {tensor.dtype}")
        if tensor.dim() != 2 or (student.key and tensor.shape != student.key[0].shape[:2]):
            expected = f" = {tuple(student.key[0].shape[:2])}" if student.key else ""
            raise ValueError(f"region weights must be (B, N){expected}, got shape {tuple(tensor.shape)}")
    else:
        raise TypeError(f"region must be a BoxRegion or a tensor (B, N), got {type(region).__name__}")
    if student.key and tensor.device != student.key[0].device:
        raise ValueError(f"region must be on {student.key[0].device} like the keys, got {tensor.device}")
    if isinstance(region, BoxRegion):
        return _constant(tensor, torch.float32), region.grids, RULES.index(region.rule)
    return _constant(tensor, dtype), (), 0


def _constant(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.detach().to(dtype)`, without the two trips through the dispatcher where there is nothing to do."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _check_teacher(teacher: QueryAttention, student: QueryAttention) -> None:
    if not isinstance(teacher, QueryAttention):
        raise TypeError(f"teacher must be a QueryAttention, got {type(teacher).__name__}")
    if len(teacher.key) != len(student.key):
        raise ValueError(f"teacher must have the student's {len(student.key)} layers, got {len(teacher.key)}")
    if not student.key:
        return
    if teacher.key[0].shape != student.key[0].shape:
        raise ValueError(
            f"teacher must share the student's (B, N, D) = {tuple(student.key[0].shape)}, "
            f"got {tuple(teacher.key[0].shape)}"
        )
    if teacher.key[0].device != student.key[0].device:
        raise ValueError(f"teacher must be on {student.key[0].device} like the student, got {teacher.key[0].device}")
