"""`BoxRegion` against its rules written out cell by cell, and the kernels' rasterisers against `BoxRegion`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from helpers import BACKENDS, DOUBLE, same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attbalance_ext import BoxRegion, QueryAttention, attention_terms

RULES = ("touch", "center", "coverage", "nearest")
Grids = tuple[tuple[int, int], ...]


def axis_weight(lo: Any, hi: Any, j: Any, rule: str, number: Callable[[Any], Any]) -> Any:
    """Weight of cell [j, j + 1) for a box [lo, hi), both in cells."""
    if rule == "center":
        return number(1 if lo <= j + number(0.5) < hi else 0)
    if rule == "nearest":
        return number(1 if lo <= j < hi else 0)
    overlap = min(hi, j + number(1)) - max(lo, j)
    if rule == "touch":
        return number(1 if overlap > number(1e-3) else 0)
    return overlap if overlap > 0 else number(0)


def literal_mask(box: Sequence[float], grids: Grids, rule: str, number: Callable[[Any], Any]) -> Tensor:
    """Cell by cell; `number` makes the numbers whose arithmetic is used."""
    cx, cy, w, h = map(number, box)
    weights = []
    for height, width in grids:
        top, bottom = (cy - h / number(2)) * number(height), (cy + h / number(2)) * number(height)
        left, right = (cx - w / number(2)) * number(width), (cx + w / number(2)) * number(width)
        for row in range(height):
            for column in range(width):
                y = axis_weight(top, bottom, number(row), rule, number)
                weights.append(float(y * axis_weight(left, right, number(column), rule, number)))
    return torch.tensor(weights)


def sixty_fourths(low: int, high: int) -> st.SearchStrategy[float]:
    """Numbers that float32 treats exactly; cell borders and centers of 1, 2, 4, 8, 16 cells are among them."""
    return st.integers(low, high).map(lambda n: n / 64)


exact_boxes = st.tuples(sixty_fourths(-16, 80), sixty_fourths(-16, 80), sixty_fourths(-4, 80), sixty_fourths(-4, 80))
grid_lists = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=2).map(tuple)
any_number = st.one_of(
    st.floats(0, 1, width=32),
    st.floats(width=32),
    st.sampled_from([0.0, 0.5, 1.0, 0.05, 0.15, float("nan"), float("inf"), -float("inf")]),
)
any_boxes = st.tuples(any_number, any_number, any_number, any_number)


@pytest.mark.parametrize("rule", RULES)
@given(box=exact_boxes, grids=grid_lists)
def test_rules_in_exact_arithmetic(rule: str, box: tuple[float, ...], grids: Grids) -> None:
    found = BoxRegion(torch.tensor([box]), grids, rule).mask()
    assert found.dtype == torch.float32
    assert torch.equal(found[0], literal_mask(box, grids, rule, Fraction))


@pytest.mark.parametrize("rule", RULES)
@given(box=any_boxes)
def test_any_box_in_float32(rule: str, box: tuple[float, ...]) -> None:
    """NaN, infinite and inverted boxes included: never an error, always weights in [0, 1]."""
    grids = ((4, 5), (1, 3))
    found = BoxRegion(torch.tensor([box]), grids, rule).mask()[0]
    assert ((found >= 0) & (found <= 1)).all()
    with np.errstate(all="ignore"):
        assert torch.equal(found, literal_mask(box, grids, rule, np.float32))
    if not np.isfinite(box).all() and np.isnan(box).any():
        assert (found == 0).all()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("touch", [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]]),
        ("center", [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]),
        ("coverage", [[0, 0, 0, 0], [0, 0.5, 1, 0.25], [0, 0.5, 1, 0.25], [0, 0, 0, 0]]),
        ("nearest", [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]),
    ],
)
def test_rules_by_example(rule: str, expected: list[list[float]]) -> None:
    """On 4 x 4 cells: columns 1.5 to 3.25, rows 1 to 3."""
    box = torch.tensor([[(1.5 + 3.25) / 8, 0.5, 1.75 / 4, 0.5]])
    assert BoxRegion(box, (4, 4), rule).mask().view(4, 4).tolist() == expected


def test_rounding_of_an_edge_adds_no_cells() -> None:
    """Boxes whose edges are cell borders touch exactly their cells, however the edges round."""
    for n in (7, 10, 20, 37):
        for first in range(n):
            for last in range(first, n):
                center, size = (first + last + 1) / 2 / n, (last + 1 - first) / n
                columns = BoxRegion(torch.tensor([[center, 0.5, size, 1.0]]), (1, n)).mask()[0]
                assert columns.nonzero().flatten().tolist() == list(range(first, last + 1))


def test_grids_lie_end_to_end_row_major() -> None:
    boxes = torch.rand(5, 4)
    both = BoxRegion(boxes, ((20, 20), (10, 5)))
    assert both.tokens == 450
    mask = both.mask()
    assert torch.equal(mask[:, :400], BoxRegion(boxes, (20, 20)).mask())
    assert torch.equal(mask[:, 400:], BoxRegion(boxes, [[10, 5]]).mask())
    wide = BoxRegion(torch.tensor([[0.5, 0.1, 1.0, 0.2]]), (5, 3)).mask().view(5, 3)
    assert wide.tolist() == [[1, 1, 1]] + [[0, 0, 0]] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_boxes_of_other_dtypes_count_as_float32(dtype: torch.dtype) -> None:
    boxes = torch.rand(20, 4, dtype=dtype)
    mask = BoxRegion(boxes, (20, 20), "coverage").mask()
    assert mask.dtype == torch.float32
    assert torch.equal(mask, BoxRegion(boxes.float(), (20, 20), "coverage").mask())


def test_no_gradient() -> None:
    assert not BoxRegion(torch.rand(2, 4, requires_grad=True), (4, 4), "coverage").mask().requires_grad


def test_empty_batch() -> None:
    assert BoxRegion(torch.zeros(0, 4), (20, 20)).mask().shape == (0, 400)


# --- kernels ---------------------------------------------------------------------------------------------------------


def boxes_of_every_kind(grids: Grids) -> Tensor:
    """Random boxes, tiny ones, boxes with edges on cell borders and centers, outside, inverted, NaN, infinite."""
    generator = torch.Generator().manual_seed(5)
    center = torch.rand(24, 2, generator=generator)
    boxes = [torch.cat([center, torch.rand(24, 2, generator=generator) * scale], dim=1) for scale in (1.0, 0.05, -0.3)]
    for height, width in grids:
        cells = torch.tensor([width, height])
        edges = torch.randint(0, 2 * 20, (24, 2, 2), generator=generator) % (2 * cells[:, None] + 1) / 2
        lo, hi = (edges.amin(-1) / cells, edges.amax(-1) / cells)
        boxes.append(torch.cat([(lo + hi) / 2, hi - lo], dim=1))
    nan, inf = float("nan"), float("inf")
    boxes.append(torch.tensor([[2, 2, 1, 1], [0.5, 0.5, inf, inf], [inf, 0.5, 1, 1], [0.5, nan, 0.5, 0.5], [0.5] * 4]))
    boxes.append(torch.tensor([[0.5, 0.5, 1, 1], [0.5, 0.5, 0, 0], [0.5, 0.5, 0.2, nan], [-inf, 0.5, inf, 1]]))
    return torch.cat(boxes)


@pytest.mark.parametrize("rule", ["touch", "center", "nearest"])
@pytest.mark.parametrize("grids", [((20, 20),), ((7, 9), (4, 5), (1, 1))], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lone_token_reads_its_weight(backend: str, grids: Grids, rule: str) -> None:
    """Where all other tokens are padding, A_in is the weight of the one that is left."""
    region = BoxRegion(boxes_of_every_kind(grids)[::2], grids, rule)
    tokens, batch = region.tokens, len(region.boxes)
    everything_but = ~torch.eye(tokens, dtype=torch.bool).repeat(batch, 1)
    attention = QueryAttention(
        torch.zeros(batch * tokens, 1), torch.zeros(1, tokens, 1).expand(batch * tokens, -1, -1), 1
    )
    repeated = BoxRegion(region.boxes.repeat_interleave(tokens, dim=0), grids, rule)
    terms = attention_terms(attention, repeated, key_padding_mask=everything_but, backend=backend)
    assert torch.equal(terms.in_box.view(batch, tokens), region.mask())
    assert torch.equal(terms.valid.view(batch, tokens), region.mask() > 0)


def assert_box_is_its_mask(boxes: Tensor, grids: Grids, rule: str, backend: str, dtype: torch.dtype) -> None:
    """The op gives the same bits for a box as for the box's weights, forward and backward."""
    region = BoxRegion(boxes, grids, rule)
    generator = torch.Generator().manual_seed(0)
    results = []
    query = torch.randn(len(boxes), 3, generator=generator, dtype=dtype)
    key = torch.randn(len(boxes), region.tokens, 3, generator=generator, dtype=dtype, requires_grad=True)
    for form in (region, region.mask()):
        terms = attention_terms(QueryAttention(query, key, 0.5), form, backend=backend)
        (gradient,) = torch.autograd.grad(terms.rac.sum() + terms.in_box.sum(), key)
        results.append([*terms, gradient])
    assert all(map(same_bits, *results))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grids", [((20, 20), (10, 10)), ((1, 1),), ((37, 3), (2, 17), (5, 5))], ids=str)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*((name, torch.float32) for name in BACKENDS), *((name, torch.float64) for name in DOUBLE)],
    ids=str,
)
def test_a_box_is_its_mask(backend: str, grids: Grids, rule: str, dtype: torch.dtype) -> None:
    assert_box_is_its_mask(boxes_of_every_kind(grids), grids, rule, backend, dtype)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
@given(boxes=st.lists(any_boxes, min_size=1, max_size=4), grids=grid_lists)
def test_any_box_is_its_mask(backend: str, rule: str, boxes: list[tuple[float, ...]], grids: Grids) -> None:
    assert_box_is_its_mask(torch.tensor(boxes), grids, rule, backend, torch.float32)


# --- arguments -------------------------------------------------------------------------------------------------------

BOXES = torch.rand(2, 4)
WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "boxes are a list": (lambda: BoxRegion([[0.5] * 4], (4, 4)), TypeError, "boxes.*list"),
    "boxes of integers": (lambda: BoxRegion(torch.ones(2, 4, dtype=torch.int64), (4, 4)), TypeError, "boxes.*int64"),
    "one box without batch": (lambda: BoxRegion(BOXES[0], (4, 4)), ValueError, r"boxes.*\(B, 4\).*\(4,\)"),
    "boxes with score": (lambda: BoxRegion(torch.rand(2, 5), (4, 4)), ValueError, r"boxes.*\(B, 4\).*\(2, 5\)"),
    "unknown rule": (
        lambda: BoxRegion(BOXES, (4, 4), "overlap"),
        ValueError,
        "rule.*touch, center, coverage.*'overlap'",
    ),
    "grid of one number": (lambda: BoxRegion(BOXES, 20), ValueError, "grids.*20"),
    "no grids": (lambda: BoxRegion(BOXES, ()), ValueError, "grids"),
    "empty grid": (lambda: BoxRegion(BOXES, (0, 4)), ValueError, r"grids.*positive.*\(0, 4\)"),
    "negative grid": (lambda: BoxRegion(BOXES, ((4, 4), (4, -1))), ValueError, r"grids.*positive.*\(4, -1\)"),
    "grid of floats": (lambda: BoxRegion(BOXES, ((4.0, 4.0),)), ValueError, r"grids.*integers.*4\.0"),
    "grid of three": (lambda: BoxRegion(BOXES, ((4, 4, 4),)), ValueError, r"grids.*pairs.*\(4, 4, 4\)"),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_arguments_it_refuses(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
