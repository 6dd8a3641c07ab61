"""Boxes in Triton, for `balanced_loss`: IoU, generalised IoU and its gradient.

The order of operations is the reference's, and NaN in is NaN out.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _minimum(a, b):
    return tl.where((a != a) | (a < b), a, b)


@triton.jit
def _maximum(a, b):
    return tl.where((a != a) | (a > b), a, b)


@triton.jit
def _positive_part(a):
    return tl.where(a < 0, 0.0, a)


@triton.jit
def _ratio(numerator, denominator):
    """0 where the denominator is 0."""
    zero = denominator == 0
    return tl.where(zero, 0.0, tl.div_rn(numerator, tl.where(zero, 1.0, denominator)))


@triton.jit
def _larger(a, b):
    """d maximum(a, b) / da, shared between both where they are equal."""
    return tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def load_box(boxes, sample, there):
    """cx, cy, w, h of boxes (B, 4)."""
    box = boxes + sample.to(tl.int64) * 4
    return (
        tl.load(box, mask=there, other=0.0),
        tl.load(box + 1, mask=there, other=0.0),
        tl.load(box + 2, mask=there, other=0.0),
        tl.load(box + 3, mask=there, other=0.0),
    )


@triton.jit
def _axis(center, size, target_center, target_size):
    """One axis of two boxes: their ends, and the lengths of both, of what they share and of the hull; not clamped."""
    lo, hi = center - size * 0.5, center + size * 0.5
    target_lo, target_hi = target_center - target_size * 0.5, target_center + target_size * 0.5
    shared = _minimum(hi, target_hi) - _maximum(lo, target_lo)
    hull = _maximum(hi, target_hi) - _minimum(lo, target_lo)
    return lo, hi, target_lo, target_hi, hi - lo, target_hi - target_lo, shared, hull


@triton.jit
def _areas(x_length, y_length, x_target, y_target, x_shared, y_shared):
    """(shared, union)."""
    area = _positive_part(x_length) * _positive_part(y_length)
    target_area = _positive_part(x_target) * _positive_part(y_target)
    shared = _positive_part(x_shared) * _positive_part(y_shared)
    return shared, area + target_area - shared


@triton.jit
def box_iou(pred, target, sample, there):
    """IoU of boxes (B, 4)."""
    cx, cy, w, h = load_box(pred, sample, there)
    tx, ty, tw, th = load_box(target, sample, there)
    _, _, _, _, x_length, x_target, x_shared, _ = _axis(cx, w, tx, tw)
    _, _, _, _, y_length, y_target, y_shared, _ = _axis(cy, h, ty, th)
    shared, union = _areas(x_length, y_length, x_target, y_target, x_shared, y_shared)
    return _ratio(shared, union)


@triton.jit
def _axis_gradient(ends, lengths, grad_length, grad_shared, grad_hull):
    """Gradients of center and size of the predicted box from those of the three lengths, which clamping cuts off."""
    lo, hi, target_lo, target_hi = ends
    length, shared, hull = lengths
    grad_length = tl.where(length >= 0, grad_length, grad_length * 0)
    grad_shared = tl.where(shared >= 0, grad_shared, grad_shared * 0)
    grad_hull = tl.where(hull >= 0, grad_hull, grad_hull * 0)
    grad_hi = grad_length + grad_shared * _larger(target_hi, hi) + grad_hull * _larger(hi, target_hi)
    grad_lo = -grad_length - grad_shared * _larger(lo, target_lo) - grad_hull * _larger(target_lo, lo)
    return grad_hi + grad_lo, (grad_hi - grad_lo) * 0.5


@triton.jit
def box_giou(cx, cy, w, h, tx, ty, tw, th):
    """IoU, generalised IoU (Rezatofighi et al. 2019), and the gradient of the latter in the first box."""
    x_lo, x_hi, tx_lo, tx_hi, x_length, x_target, x_shared, x_hull = _axis(cx, w, tx, tw)
    y_lo, y_hi, ty_lo, ty_hi, y_length, y_target, y_shared, y_hull = _axis(cy, h, ty, th)
    shared, union = _areas(x_length, y_length, x_target, y_target, x_shared, y_shared)
    hull = _positive_part(x_hull) * _positive_part(y_hull)
    iou, rest = _ratio(shared, union), _ratio(hull - union, hull)

    grad_hull = _ratio(rest - 1, hull)
    grad_union = _ratio(tl.full(hull.shape, 1.0, tl.float32), hull) - _ratio(iou, union)
    grad_shared = _ratio(tl.full(hull.shape, 1.0, tl.float32), union) - grad_union
    grad_x, grad_w = _axis_gradient(
        (x_lo, x_hi, tx_lo, tx_hi),
        (x_length, x_shared, x_hull),
        grad_union * _positive_part(y_length),
        grad_shared * _positive_part(y_shared),
        grad_hull * _positive_part(y_hull),
    )
    grad_y, grad_h = _axis_gradient(
        (y_lo, y_hi, ty_lo, ty_hi),
        (y_length, y_shared, y_hull),
        grad_union * _positive_part(x_length),
        grad_shared * _positive_part(x_shared),
        grad_hull * _positive_part(x_hull),
    )
    return iou, iou - rest, grad_x, grad_y, grad_w, grad_h


@triton.jit
def sign(a):
    """-1, 0 or 1; NaN stays NaN."""
    return tl.where(a > 0, 1.0, tl.where(a < 0, -1.0, a))
