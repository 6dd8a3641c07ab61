"""What comes in and goes out of the backward pass: subsets, layouts, repeats, threads, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import BACKENDS, DOUBLE, NATIVE, poisoned_memory, same_bits, threads
from helpers_attention import LAYOUTS, Problem, arrange, assert_solves, literal, make_problem, solve
from torch import Tensor

from attbalance_ext import QueryAttention, attention_terms


def loss_of(problem: Problem, query: list[Tensor], key: list[Tensor], backend: str) -> Tensor:
    terms = attention_terms(problem.student(query, key), problem.region, teacher=problem.teacher, backend=backend)
    return sum((g * term).sum() for g, term in zip(problem.incoming, terms[:3], strict=True))


SUBSETS: dict[str, Callable[[str, int], bool]] = {
    "query only": lambda kind, layer: kind == "query",
    "key only": lambda kind, layer: kind == "key",
    "one layer": lambda kind, layer: layer == 1,
    "query of one, key of another": lambda kind, layer: (kind, layer) in {("query", 0), ("key", 2)},
    "every other": lambda kind, layer: layer % 2 == (kind == "key"),
}


@pytest.mark.parametrize("wanted", SUBSETS.values(), ids=SUBSETS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_subsets(backend: str, wanted: Callable[[str, int], bool]) -> None:
    """What is not asked for is None; what is has the bits of the whole gradient."""
    problem = make_problem(layers=4, tokens=401, padded=True, layout="sequence_first")
    whole = solve(problem, backend)
    query, key = (
        [t.detach().requires_grad_(wanted(kind, layer)) for layer, t in enumerate(getattr(problem, kind))]
        for kind in ("query", "key")
    )
    loss_of(problem, query, key, backend).backward()
    for kind, leaves, expected in (("query", query, whole.grad_query), ("key", key, whole.grad_key)):
        for layer, (leaf, gradient) in enumerate(zip(leaves, expected, strict=True)):
            if wanted(kind, layer):
                assert same_bits(leaf.grad, gradient)
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_asked_for(backend: str) -> None:
    problem = make_problem()
    terms = attention_terms(problem.student(), problem.region, teacher=problem.teacher, backend=backend)
    assert not any(term.requires_grad for term in terms)
    key = [k.requires_grad_() for k in problem.key]
    with torch.inference_mode():
        inference = attention_terms(problem.student(key=key), problem.region, teacher=problem.teacher, backend=backend)
    assert all(map(same_bits, terms, inference))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mrc_without_a_teacher_pulls_at_nothing(backend: str) -> None:
    problem = make_problem(teacher_dtype=None)
    key = [k.detach().requires_grad_() for k in problem.key]
    terms = attention_terms(problem.student(key=key), problem.region, backend=backend)
    for gradient in torch.autograd.grad(terms.mrc.sum(), key):
        assert not gradient.any()


@pytest.mark.parametrize("used", ["in_box", "rac", "mrc"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_term_alone(backend: str, used: str) -> None:
    """The other terms' incoming gradients are then undefined, not zero tensors."""
    problem = make_problem(padded=True)
    zero = torch.zeros(2, 3)
    incoming = dict.fromkeys(("in_box", "rac", "mrc"), zero) | {used: torch.randn(2, 3)}
    problem = replace(problem, incoming=tuple(incoming.values()))
    key = [k.detach().requires_grad_() for k in problem.key]
    terms = attention_terms(problem.student(key=key), problem.region, teacher=problem.teacher, backend=backend)
    (incoming[used] * getattr(terms, used)).sum().backward()
    solution = solve(problem, backend)
    assert_solves(solution, literal(problem))
    for k, expected in zip(key, solution.grad_key, strict=True):
        torch.testing.assert_close(k.grad, expected, rtol=1e-5, atol=1e-8)


def expanded(shape: tuple[int, int]) -> Tensor:
    return torch.tensor(0.7).expand(shape)


def transposed(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape[1], shape[0]).t()


def strided(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape[0], 2 * shape[1])[:, ::2]


@pytest.mark.parametrize("make", [expanded, transposed, strided])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_of_incoming_gradients(backend: str, make: Callable[[tuple[int, int]], Tensor]) -> None:
    problem = make_problem(layers=3, batch=4)
    query, key = ([t.detach().requires_grad_() for t in kind] for kind in (problem.query, problem.key))
    terms = attention_terms(problem.student(query, key), problem.region, teacher=problem.teacher, backend=backend)
    incoming = tuple(make((3, 4)) for _ in range(3))
    found = torch.autograd.grad(terms[:3], [*query, *key], incoming)
    problem = replace(problem, incoming=tuple(g.clone(memory_format=torch.contiguous_format) for g in incoming))
    expected = solve(problem, backend)
    assert_solves(expected, literal(problem))
    for actual, truth in zip(found, [*expected.grad_query, *expected.grad_key], strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice(backend: str) -> None:
    problem = make_problem(tokens=401, padded=True)
    query, key = ([t.detach().requires_grad_() for t in kind] for kind in (problem.query, problem.key))
    loss = loss_of(problem, query, key, backend)
    first = torch.autograd.grad(loss, [*query, *key], retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, [*query, *key])
    assert all(map(same_bits, kept, second))
    assert all(map(same_bits, kept, first))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, [*query, *key])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_never_written(backend: str, layout: str) -> None:
    problem = make_problem(tokens=400, padded=True, layout=layout, region="weights", key_dtype=(torch.bfloat16,))
    inputs = [
        *problem.query,
        *problem.key,
        problem.region,
        problem.padding,
        *problem.teacher.query,
        *problem.teacher.key,
        *problem.incoming,
    ]
    storages = [torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()) for t in inputs]
    before = [storage.clone() for storage in storages]
    solve(problem, backend)
    assert all(map(torch.equal, storages, before))


@pytest.mark.parametrize(("layers", "batch"), [(1, 1), (4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_on_every_run(backend: str, dtype: torch.dtype, layers: int, batch: int) -> None:
    problem = make_problem(layers=layers, batch=batch, tokens=1369, width=64, key_dtype=(dtype,), padded=True)
    first = solve(problem, backend).tensors()
    for _ in range(3):
        assert all(map(same_bits, first, solve(problem, backend).tensors()))


@pytest.mark.parametrize(("layers", "batch", "tokens"), [(1, 1, 1369), (1, 3, 401), (4, 8, 500)])
@pytest.mark.parametrize("layout", ["batch_first", "sequence_first"])
@pytest.mark.parametrize("backend", NATIVE)
def test_same_bits_for_any_number_of_threads(backend: str, layout: str, layers: int, batch: int, tokens: int) -> None:
    problem = make_problem(layers=layers, batch=batch, tokens=tokens, width=40, padded=True, layout=layout)
    solutions = []
    for count in (1, 2, 3):
        with threads(count):
            solutions.append(solve(problem, backend).tensors())
    assert all(map(same_bits, solutions[0], solutions[1]))
    assert all(map(same_bits, solutions[0], solutions[2]))


@pytest.mark.parametrize("layout", ["batch_first", "sequence_first"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tokens", [1, 31, 500])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_output_is_written(backend: str, tokens: int, padded: bool, layout: str) -> None:
    problem = make_problem(tokens=tokens, padded=padded, layout=layout, width=19, key_dtype=(torch.bfloat16,))
    clean = solve(problem, backend)
    with poisoned_memory():
        poisoned = solve(problem, backend)
    assert all(map(same_bits, clean.tensors(), poisoned.tensors()))
    assert all(tensor.isfinite().all() for tensor in poisoned.tensors())


@pytest.mark.parametrize("layout", ["sequence_first", "sequence_first_slice"])
@pytest.mark.parametrize("backend", NATIVE)
def test_sequence_first_keys_get_sequence_first_gradients(backend: str, layout: str) -> None:
    """In the storage order of the host model, so that no transposing copy follows."""
    for gradient in solve(make_problem(tokens=401, layout=layout), backend).grad_key:
        assert gradient.transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("width", [16, 19])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_in_layouts_of_their_own(backend: str, width: int) -> None:
    problem = make_problem(layers=len(LAYOUTS), tokens=40, width=width, padded=True)
    problem.key = [arrange(k, layout) for k, layout in zip(problem.key, LAYOUTS, strict=True)]
    assert_solves(solve(problem, backend), literal(problem))


@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("backend", NATIVE)
def test_memory_kept_for_the_backward_pass(backend: str, with_teacher: bool) -> None:
    """Beyond the inputs, at the host models' N=400 and D=256: at most 2 % of the keys."""
    problem = make_problem(tokens=400, width=256, teacher_dtype=torch.float32 if with_teacher else None, padded=True)
    query, key = ([t.detach().requires_grad_() for t in kind] for kind in (problem.query, problem.key))
    inputs = {t.untyped_storage().data_ptr() for t in (*query, *key)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = attention_terms(problem.student(query, key), problem.region, teacher=problem.teacher, backend=backend)
    assert terms.rac.requires_grad
    assert kept
    assert sum(kept.values()) <= 0.02 * sum(k.untyped_storage().nbytes() for k in key)


@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("region", ["coverage", "weights", "bool"])
@pytest.mark.parametrize("backend", DOUBLE)
def test_gradcheck(backend: str, region: str, with_teacher: bool) -> None:
    problem = make_problem(
        layers=2,
        batch=3,
        tokens=6,
        width=4,
        query_dtype=(torch.float64,),
        key_dtype=(torch.float64,),
        teacher_dtype=torch.float64 if with_teacher else None,
        region=region,
        padded=True,
        seed=3,
    )
    for k in problem.key:
        k.nan_to_num_(0.3)
    if with_teacher:
        teacher = problem.teacher
        problem.teacher = QueryAttention(teacher.query, [k.nan_to_num(0.3) for k in teacher.key], teacher.scale)

    def terms(*leaves: Tensor) -> tuple[Tensor, ...]:
        student = problem.student(list(leaves[:2]), list(leaves[2:]))
        found = attention_terms(student, problem.region, teacher=problem.teacher, backend=backend)
        return found[:3] if with_teacher else found[:2]

    leaves = [t.detach().clone().requires_grad_() for t in (*problem.query, *problem.key)]
    assert torch.autograd.gradcheck(terms, leaves)


@pytest.mark.parametrize("backend", NATIVE)
def test_double_backward_is_refused(backend: str) -> None:
    problem = make_problem()
    query, key = ([t.detach().requires_grad_() for t in kind] for kind in (problem.query, problem.key))
    loss = loss_of(problem, query, key, backend)
    gradients = torch.autograd.grad(loss, [*query, *key], create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="differentiated once"):
            gradient.square().sum().backward()


def test_double_backward_of_the_reference() -> None:
    problem = make_problem(
        tokens=6, width=4, query_dtype=(torch.float64,), key_dtype=(torch.float64,), region="weights"
    )
    leaves = [t.detach().requires_grad_() for t in (*problem.query, *problem.key)]
    assert torch.autograd.gradgradcheck(
        lambda *leaves: loss_of(problem, list(leaves[:2]), list(leaves[2:]), "reference"), leaves
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_reach_per_head_tensors(backend: str) -> None:
    """`from_heads`: the score is the mean over heads of q_h . k_jh / sqrt(d), before softmax."""
    batch, heads, tokens, width = 2, 4, 10, 8
    query = torch.randn(batch, heads, width, requires_grad=True)
    key = torch.randn(batch, tokens, heads, width, requires_grad=True)
    weights = torch.rand(batch, tokens)
    attention = QueryAttention.from_heads(query, key.transpose(1, 2))
    terms = attention_terms(attention, weights, backend=backend)
    found = torch.autograd.grad(terms.rac.sum(), [query, key])

    q, k = query.detach().double().requires_grad_(), key.detach().double().requires_grad_()
    rac = torch.zeros((), dtype=torch.float64)
    for b in range(batch):
        per_head = [k[b, :, h] @ q[b, h] / width**0.5 for h in range(heads)]
        p = torch.stack(per_head).mean(0).softmax(0)
        rac = rac - 2 * (p * weights[b]).sum().log()
    expected = torch.autograd.grad(rac, [q, k])
    torch.testing.assert_close(terms.rac.sum().double(), rac, rtol=1e-6, atol=0)
    for actual, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(actual.double(), truth, rtol=1e-4, atol=1e-7)
