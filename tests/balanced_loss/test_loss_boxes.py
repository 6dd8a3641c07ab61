"""IoU, GIoU and L1: the same bits of IoU on every backend, and degenerate boxes."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import BACKENDS, DOUBLE, NATIVE, same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attbalance_ext import AttBalanceConfig, AttBalanceLoss, AttBalanceOutput

NAN, INF = float("nan"), float("inf")


def box_loss(pred: Tensor, target: Tensor, backend: str, **config: float) -> tuple[AttBalanceOutput, Tensor]:
    """The plain loss and its gradient; the loss is a mean, so the gradient is scaled back by B."""
    pred = pred.detach().clone().requires_grad_()
    output = AttBalanceLoss(AttBalanceConfig(**config), backend)(None, pred, target)
    (gradient,) = torch.autograd.grad(output.loss, pred)
    return output, gradient * len(target)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*((name, torch.float32) for name in NATIVE), *((name, torch.float64) for name in NATIVE if name in DOUBLE)],
)
def test_iou_has_the_reference_s_bits(backend: str, dtype: torch.dtype) -> None:
    """rho is discontinuous in IoU: backends that round it differently would give another loss."""
    pred, target = torch.rand(20_000, 4, dtype=dtype), torch.rand(20_000, 4, dtype=dtype)
    target[::3] = pred[::3] + 0.01 * torch.randn(len(pred[::3]), 4, dtype=dtype)
    pred[::7, 2:] *= 1e-3
    ours, reference = box_loss(pred, target, backend)[0], box_loss(pred, target, "reference")[0]
    assert same_bits(ours.iou, reference.iou)
    assert same_bits(ours.giou, reference.giou)
    assert ours.iou.unique().numel() > 5_000


number = st.one_of(st.floats(0, 1, width=32), st.floats(width=32), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
box = st.tuples(number, number, number, number)


@pytest.mark.parametrize("backend", NATIVE)
@given(boxes=st.lists(st.tuples(box, box), min_size=1, max_size=8))
def test_iou_of_any_boxes_has_the_reference_s_bits(backend: str, boxes: list[tuple]) -> None:
    """Inverted, infinite and NaN boxes included; NaN is compared as NaN, whatever its payload."""
    pred, target = torch.tensor(boxes).unbind(1)
    ours, reference = box_loss(pred, target, backend)[0], box_loss(pred, target, "reference")[0]
    assert torch.equal(ours.iou.isnan(), reference.iou.isnan())
    assert torch.equal(ours.iou.nan_to_num(), reference.iou.nan_to_num())


@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_boxes(backend: str) -> None:
    """IoU is 0 where the union is 0; the hull term is 0 where the hull is 0."""
    point, elsewhere = [0.5, 0.5, 0.0, 0.0], [0.25, 0.75, 0.0, 0.0]
    line, square = [0.5, 0.5, 0.0, 0.5], [0.5, 0.5, 0.5, 0.5]
    inverted = [0.5, 0.5, -0.5, 0.5]
    pairs = [
        (point, point, 0, 0),
        (line, line, 0, 0),
        (point, elsewhere, 0, -1),
        (point, square, 0, 0),  # inside: the hull is the square, all of it union
        (square, square, 1, 1),
        (inverted, inverted, 0, 0),
        (square, [0.75, 0.5, 0.5, 0.5], 1 / 3, 1 / 3),
        (square, [1.0, 0.5, 0.5, 0.5], 0, 0),  # touching
        (square, [1.5, 0.5, 0.5, 0.5], 0, -1 / 3),
    ]
    pred, target = (torch.tensor([pair[i] for pair in pairs]) for i in (0, 1))
    output, gradient = box_loss(pred, target, backend, alpha_l1=0.0)
    torch.testing.assert_close(output.iou, torch.tensor([float(pair[2]) for pair in pairs]))
    torch.testing.assert_close(output.giou, 1 - torch.tensor([float(pair[3]) for pair in pairs]))
    assert gradient.isfinite().all()


def tied_boxes() -> tuple[Tensor, Tensor]:
    """All pairs of boxes with corners on a grid of quarters: shared edges, shared corners, no size, inverted."""
    corners = [0.0, 0.25, 0.5, 0.75]
    x1, y1, x2, y2 = torch.tensor(list(itertools.product(corners, repeat=4))).unbind(1)
    boxes = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=1)
    return boxes.repeat_interleave(len(boxes), dim=0), boxes.repeat(len(boxes), 1)


@pytest.mark.parametrize("backend", NATIVE)
def test_subgradients_at_ties_are_the_reference_s(backend: str) -> None:
    pred, target = tied_boxes()
    for weights in ({"alpha_l1": 0.0}, {"alpha_giou": 0.0}, {}):
        ours, gradient = box_loss(pred, target, backend, **weights)
        reference, expected = box_loss(pred, target, "reference", **weights)
        assert same_bits(ours.iou, reference.iou)
        torch.testing.assert_close(ours.giou, reference.giou, rtol=0, atol=0)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)
    shared_edge = pred[:, 0] + pred[:, 2] / 2 == target[:, 0] + target[:, 2] / 2
    assert (shared_edge & (reference.iou > 0) & (reference.iou < 1)).sum() > 100


@pytest.mark.parametrize("backend", BACKENDS)
def test_l1_subgradient_at_equality_is_0(backend: str) -> None:
    boxes = torch.rand(5, 4) + 0.1
    assert (box_loss(boxes, boxes, backend, alpha_giou=0.0)[1] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_stages_are_summed_and_the_last_gives_the_iou(backend: str) -> None:
    stages, target = torch.rand(3, 7, 4) + 0.1, torch.rand(7, 4) + 0.1
    together, gradient = box_loss(stages, target, backend, alpha_l1=5.0, alpha_giou=2.0)
    alone = [box_loss(stage, target, backend, alpha_l1=5.0, alpha_giou=2.0) for stage in stages]
    for name in ("l1", "giou", "box"):
        torch.testing.assert_close(getattr(together, name), sum(getattr(output, name) for output, _ in alone))
    assert same_bits(together.iou, alone[-1][0].iou)
    torch.testing.assert_close(gradient, torch.stack([g for _, g in alone]))
