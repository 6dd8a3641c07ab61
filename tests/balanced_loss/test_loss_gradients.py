"""The backward pass of `balanced_loss`, its registration, and what comes out of it besides numbers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import BACKENDS, DOUBLE, NATIVE, poisoned_memory, same_bits, threads
from helpers_loss import LossProblem, make_loss_problem, solve_loss
from torch import Tensor

from attbalance_ext import AttBalanceConfig, AttBalanceLoss, AttBalanceOutput, AttentionTerms


def call(problem: LossProblem, backend: str, config: AttBalanceConfig | None = None) -> AttBalanceOutput:
    terms = AttentionTerms(problem.in_box, problem.rac, problem.mrc, problem.valid)
    return AttBalanceLoss(config, backend)(terms, problem.pred, problem.target, box_ratio=problem.box_ratio)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_subsets(backend: str, wanted: tuple[bool, bool, bool]) -> None:
    problem = make_loss_problem(stages=2)
    whole = solve_loss(problem, AttBalanceConfig(), backend)
    leaves = [
        t.clone().requires_grad_(flag) for t, flag in zip((problem.rac, problem.mrc, problem.pred), wanted, strict=True)
    ]
    call(replace(problem, rac=leaves[0], mrc=leaves[1], pred=leaves[2]), backend).loss.backward()
    for leaf, flag, expected in zip(leaves, wanted, (whole.grad_rac, whole.grad_mrc, whole.grad_pred), strict=True):
        if flag:
            assert same_bits(leaf.grad, expected)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_loss_carries_a_gradient(backend: str) -> None:
    problem = make_loss_problem()
    problem.rac.requires_grad_()
    output = call(problem, backend)
    assert output.loss.requires_grad
    assert not any(value.requires_grad for value in output[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_incoming_gradient_scales_and_backward_runs_twice(backend: str) -> None:
    problem = make_loss_problem()
    expected = solve_loss(problem, AttBalanceConfig(), backend)
    leaves = [t.requires_grad_() for t in (problem.rac, problem.mrc, problem.pred)]
    loss = call(problem, backend).loss * 1024
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, leaves)
    assert all(map(same_bits, kept, second))
    for gradient, wanted in zip(first, (expected.grad_rac, expected.grad_mrc, expected.grad_pred), strict=True):
        torch.testing.assert_close(gradient, 1024 * wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_boxes(backend: str, dtype: torch.dtype) -> None:
    """Computed in float32; the gradient comes back in the boxes' dtype."""
    problem = make_loss_problem(with_ratio=True)
    rounded = replace(
        problem,
        pred=problem.pred.to(dtype).float(),
        target=problem.target.to(dtype).float(),
        box_ratio=problem.box_ratio.to(dtype).float(),
    )
    expected = solve_loss(rounded, AttBalanceConfig(), backend)
    low = replace(rounded, **{name: getattr(rounded, name).to(dtype) for name in ("pred", "target", "box_ratio")})
    found = solve_loss(low, AttBalanceConfig(), backend)
    assert found.output.loss.dtype == torch.float32
    assert found.grad_pred.dtype == dtype
    assert all(map(same_bits, found.output, expected.output))
    assert same_bits(found.grad_pred, expected.grad_pred.to(dtype))


@pytest.mark.parametrize("config", [AttBalanceConfig(rho="off"), AttBalanceConfig(rho="off", difficulty_from="last")])
@pytest.mark.parametrize("backend", DOUBLE)
def test_gradcheck(backend: str, config: AttBalanceConfig) -> None:
    problem = make_loss_problem(layers=2, batch=3, stages=2, dtype=torch.float64, invalid=True)
    leaves = [t.requires_grad_() for t in (problem.rac, problem.mrc, problem.pred)]

    def loss(rac: Tensor, mrc: Tensor, pred: Tensor) -> Tensor:
        return call(replace(problem, rac=rac, mrc=mrc, pred=pred), backend, config).loss

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("backend", NATIVE)
def test_double_backward_is_refused(backend: str) -> None:
    problem = make_loss_problem()
    problem.pred.requires_grad_()
    (gradient,) = torch.autograd.grad(call(problem, backend).loss, problem.pred, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_output_is_written_and_no_input(backend: str, plain: bool) -> None:
    problem = make_loss_problem(batch=37, stages=3, with_ratio=True, invalid=True)
    inputs = [getattr(problem, name) for name in problem.__dataclass_fields__]
    before = [tensor.clone() for tensor in inputs]

    def run() -> list[Tensor]:
        if not plain:
            return solve_loss(problem, AttBalanceConfig(), backend).tensors()
        pred = problem.pred.clone().requires_grad_()
        output = AttBalanceLoss(backend=backend)(None, pred, problem.target)
        return [*(value.detach() for value in output), *torch.autograd.grad(output.loss, pred)]

    clean = run()
    with poisoned_memory():
        poisoned = run()
    assert all(map(same_bits, clean, poisoned))
    assert all(value.isfinite().all() for value in poisoned)
    assert all(map(same_bits, inputs, before))


@pytest.mark.parametrize("backend", NATIVE)
def test_same_bits_for_any_number_of_threads(backend: str) -> None:
    problem = make_loss_problem(layers=6, batch=3000, ties=True)
    solutions = []
    for count in (1, 2, 3, 1):
        with threads(count):
            solutions.append(solve_loss(problem, AttBalanceConfig(), backend).tensors())
    for other in solutions[1:]:
        assert all(map(same_bits, solutions[0], other))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    problem = make_loss_problem(with_ratio=True)
    plain = call(problem, backend)
    with torch.autocast("cpu", torch.bfloat16):
        cast = call(problem, backend)
    assert all(map(same_bits, plain, cast))


@pytest.mark.parametrize("rho", [None, "given"])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("layers", "batch", "stages"), [(4, 6, 1), (0, 3, 2), (2, 0, 1)])
@pytest.mark.parametrize("backend", NATIVE)
def test_opcheck(backend: str, layers: int, batch: int, stages: int, plain: bool, rho: str | None) -> None:
    problem = make_loss_problem(layers=layers, batch=batch, stages=stages, with_ratio=True)
    arguments = [
        problem.in_box,
        problem.rac,
        problem.mrc,
        problem.valid,
        problem.pred,
        problem.target,
        problem.box_ratio,
        torch.rand(layers) if rho else None,
    ]
    weights = [1.0, 5.0, 2.0, 1.0, 1.0, 0, False, True, True, plain]
    torch.library.opcheck(getattr(torch.ops.attbalance_ext.balanced_loss, backend), (*arguments, *weights))
