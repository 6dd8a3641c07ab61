"""The supervised attention map."""

from __future__ import annotations

import pytest
import torch
from helpers_attention import make_problem, naive_softmax

from attbalance_ext import QueryAttention, attention_map, attention_terms


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_against_a_literal_softmax(dtype: torch.dtype, padded: bool) -> None:
    problem = make_problem(layers=3, query_dtype=(dtype,), key_dtype=(dtype,), padded=padded)
    found = attention_map(problem.student())
    assert found.shape == (3, 3, 31)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for layer in range(3):
        for b in range(3):
            keep = ~problem.padding[b] if padded else torch.ones(31, dtype=torch.bool)
            scores = problem.scale[layer] * (problem.key[layer][b, keep].double() @ problem.query[layer][b].double())
            torch.testing.assert_close(
                found[layer, b, keep].double(),
                naive_softmax(scores),
                rtol=1e-9 if dtype == torch.float64 else 1e-5,
                atol=0,
            )
            assert (found[layer, b, ~keep] == 0).all()


def test_all_padding_is_0_and_a_mask_overrides() -> None:
    problem = make_problem()
    mask = torch.zeros(3, 31, dtype=torch.bool)
    mask[1] = True
    found = attention_map(problem.student(), mask)
    assert (found[:, 1] == 0).all()
    torch.testing.assert_close(found[:, [0, 2]].sum(-1), torch.ones(2, 2))


def test_in_box_is_its_mass_in_the_region() -> None:
    problem = make_problem(tokens=500, padded=True)
    p = attention_map(problem.student())
    terms = attention_terms(problem.student(), problem.region, backend="reference")
    torch.testing.assert_close((p * problem.region.mask()).sum(-1), terms.in_box)


def test_gradient_reaches_query_and_key() -> None:
    problem = make_problem(query_dtype=(torch.float64,), key_dtype=(torch.float64,), tokens=6, width=3, padded=True)
    key = [k.nan_to_num(0.5).requires_grad_() for k in problem.key]
    query = [q.requires_grad_() for q in problem.query]
    assert torch.autograd.gradcheck(
        lambda *t: attention_map(QueryAttention(t[:2], t[2:], problem.scale, problem.padding)), [*query, *key]
    )
