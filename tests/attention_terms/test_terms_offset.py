"""The gradient by `query . key` in place of the keys': what a tap multiplies out later."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import NATIVE, poisoned_memory, same_bits
from helpers_attention import assert_solves, literal, make_problem, multiplied_out, offset_gradients, solve

from attbalance_ext import QueryAttention
from attbalance_ext.attention import with_offset
from attbalance_ext.kernels.choose import BACKENDS as REGISTERED

ALL = [*NATIVE, *(["triton"] if "cpu" in REGISTERED["triton"].devices else [])]

CASES = {
    "teacher": {},
    "no teacher": {"teacher_dtype": None},
    "padded, two launches": {"padded": True, "key_dtype": (torch.float32, torch.bfloat16)},
    "sequence first": {"layout": "sequence_first_slice", "region": "weights"},
    "no samples": {"batch": 0},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", ALL)
def test_times_the_query_it_is_the_keys_gradient(backend: str, case: dict) -> None:
    problem = make_problem(layers=3, **case)
    whole, taken = solve(problem, backend), [True, False, True]
    with poisoned_memory():
        factors, grad_key, grad_query = offset_gradients(problem, backend, taken)
    assert all(map(same_bits, grad_query, whole.grad_query))
    assert [g is None for g in grad_key] == taken
    assert same_bits(grad_key[1], whole.grad_key[1])
    grad_key = [
        grad if factor is None else multiplied_out(factor, query, key)
        for grad, factor, query, key in zip(grad_key, factors, problem.query, problem.key, strict=True)
    ]
    if backend in NATIVE:  # to the last bit, but for the sign of 0 at padding
        assert all(map(torch.equal, grad_key, whole.grad_key))
    assert_solves(replace(whole, grad_key=grad_key), literal(problem))


@pytest.mark.parametrize("backend", ALL)
def test_it_is_exactly_zero_at_padding(backend: str) -> None:
    problem = make_problem(padded=True)  # whose padded keys are NaN
    for factor in offset_gradients(problem, backend, [True, True])[0]:
        assert not factor[problem.padding].any()
        assert factor[~problem.padding].all()


def test_float64() -> None:
    problem = make_problem(padded=True).to(torch.float64)
    for factor, query, expected in zip(
        offset_gradients(problem, "cpu", [True, True])[0],
        problem.query,
        solve(problem, "reference").grad_key,
        strict=True,
    ):
        assert factor.dtype == torch.float64
        torch.testing.assert_close(factor[..., None] * query[:, None], expected, rtol=1e-9, atol=1e-14)


def test_the_reference_leaves_it_alone() -> None:
    problem = make_problem()
    factors, grad_key, _ = offset_gradients(problem, "reference", [True, True])
    assert factors == [None, None]
    assert all(map(same_bits, grad_key, solve(problem, "reference").grad_key))


def attention_with_offsets() -> QueryAttention:
    attention = QueryAttention([torch.zeros(2, 8)] * 3, [torch.zeros(2, 5, 8)] * 3, 1.0)
    return with_offset(attention, [None, torch.zeros(2, 5), torch.ones(2, 5)])


def test_the_last_layers_keep_theirs() -> None:
    attention = attention_with_offsets()
    assert attention.last(2).offset == attention.offset[1:]


def test_a_copy_with_another_query_or_key_has_none() -> None:
    """Whoever made the offset would multiply its gradient with the old query."""
    attention = attention_with_offsets()
    assert replace(attention, query=[2 * query for query in attention.query]).offset == (None,) * 3
