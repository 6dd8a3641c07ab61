"""What a backend is wrong by on a problem: over the bound, and in the plain relative measure."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from helpers_attention import Problem, Solution, Truth, offset_gradients, solve
from helpers_exact import exact
from helpers_loss import LossProblem, LossSolution, literal_loss, literal_rho, solve_loss
from torch import Tensor

from attbalance_ext import AttBalanceConfig, AttBalanceOutput
from tests.emulation import emulated_cuda
from tests.numerics import stress
from tests.numerics.bounds import ATTENTION, LOSS, attention_bounds, loss_bounds

Found = dict[str, Tensor]


@functools.cache
def attention_problem(name: str, dtype: torch.dtype) -> tuple[Problem, Truth]:
    problem = stress.ATTENTION[name](dtype)
    return problem, exact(problem)


@contextmanager
def runnable(backend: str) -> Iterator[None]:
    """Backend "cuda" on the emulated device."""
    with emulated_cuda() if backend == "cuda" else nullcontext():
        yield


def attention_results(problem: Problem, backend: str) -> Found:
    """By quantity; (L, B) or with N and D behind."""
    with runnable(backend):
        solution = solve(problem, backend)
        found = _of(solution)
        if backend != "reference":  # which has no factors
            found["dot"] = torch.stack(offset_gradients(problem, backend, [True] * len(problem.key))[0])
    return found


def attention_truth(truth: Truth) -> Found:
    assert truth.grad_dot is not None
    return {**_of(truth), "dot": truth.grad_dot}


def _of(solution: Solution) -> Found:
    terms = solution.terms
    key, query = torch.stack(solution.grad_key), torch.stack(solution.grad_query)
    return {"in_box": terms.in_box, "rac": terms.rac, "mrc": terms.mrc, "key": key, "query": query}


def attention_shares(name: str, dtype: torch.dtype, backend: str, *, flushed: bool = False) -> dict[str, float]:
    """For each quantity, its largest error as a share of the bound: at most 1."""
    problem, truth = attention_problem(name, dtype)
    allowed = attention_bounds(problem, truth, backend, flushed=flushed)
    return shares(attention_results(problem, backend), attention_truth(truth), allowed, ATTENTION)


def attention_errors(name: str, dtype: torch.dtype, backend: str) -> dict[str, float]:
    """For each quantity, the largest norm(error) / norm(truth) of a (layer, sample)."""
    problem, truth = attention_problem(name, dtype)
    results, expected = attention_results(problem, backend), attention_truth(truth)
    found = {}
    for quantity in results.keys() & ATTENTION.keys():
        actual, wanted = (values[quantity].double()[..., None].flatten(2) for values in (results, expected))
        found[quantity] = ((actual - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()
    return found


@functools.cache
def loss_problem(name: str) -> tuple[LossProblem, AttBalanceConfig]:
    make, config = stress.LOSS[name]
    return make(), config


def loss_shares(name: str, backend: str, *, flushed: bool = False) -> dict[str, float]:
    """The same of `balanced_loss`. rho is judged by the bits of A_in and IoU that it was made of: it is not
    continuous."""
    problem, config = loss_problem(name)
    with runnable(backend):
        solution = solve_loss(problem, config, backend)
    rho = literal_rho(config.rho, problem.in_box.double(), solution.output.iou.double(), problem.valid)
    truth = literal_loss(problem, replace(config, rho=tuple(rho.tolist())))
    allowed = loss_bounds(problem, config, truth, flushed=flushed)
    return shares(_of_loss(solution), _of_loss(truth), allowed, LOSS)


def _of_loss(solution: LossSolution) -> Found:
    names = [*AttBalanceOutput._fields, "grad_rac", "grad_mrc", "grad_pred"]
    return dict(zip(names, solution.tensors(), strict=True))


def shares(results: Found, truth: Found, allowed: Found, quantities: Mapping[str, object]) -> dict[str, float]:
    found = {}
    for name in quantities:
        if name not in results:
            continue
        actual, expected = results[name].double(), truth[name]
        assert actual.shape == expected.shape, name
        if not (actual.isfinite().all() and expected.isfinite().all()):
            found[name] = float("inf")
            continue
        error = (actual - expected).abs()
        found[name] = torch.where(error == 0, 0, error / allowed[name]).max().item()
    return found
