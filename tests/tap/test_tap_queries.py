"""Several recorded queries, of which each sample has one: choosing, refusing, and what a choice out of range does."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from helpers import BACKENDS
from helpers_hosts import Host
from torch import Tensor, nn

from attbalance_ext import AttentionTap, MomentumTeacher, attention_map, attention_terms

BATCH, QUERIES, MEMORY = 3, 5, 7


@pytest.fixture
def host() -> Host:
    """Object queries that look at a memory, as a decoder's do."""
    return Host(batch_first=True)


def record(host: Host, tap: AttentionTap, tokens: Tensor, memory: Tensor) -> None:
    with tap.recording():
        host(tokens, memory)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, QUERIES, 16), torch.randn(BATCH, MEMORY, 16)


@pytest.mark.parametrize(
    ("query", "tokens"),
    [
        (slice(None), [0, 1, 2, 3, 4]),
        (slice(1, 4), [1, 2, 3]),
        (slice(-2, None), [3, 4]),
        ([4, 0], [4, 0]),
        ((-1, 1), [4, 1]),
        (range(2, 5), [2, 3, 4]),
        (torch.tensor([3, 1, 0]), [3, 1, 0]),
        (torch.tensor([True, False, False, True, True]), [0, 3, 4]),
        ([2], [2]),
    ],
    ids=str,
)
def test_each_sample_has_the_attention_of_its_query(
    host: Host, inputs: tuple[Tensor, Tensor], query: slice | Sequence[int] | Tensor, tokens: list[int]
) -> None:
    choice = torch.randint(len(tokens), (BATCH,))
    tap = AttentionTap(list(host.layers), query=query)
    record(host, tap, *inputs)
    chosen = attention_map(tap.attention(choice))
    for sample, number in enumerate(choice.tolist()):
        single = AttentionTap(list(host.layers), query=tokens[number])
        record(host, single, *inputs)
        torch.testing.assert_close(chosen[:, sample], attention_map(single.attention())[:, sample])
        single.remove()


def test_the_choice_may_follow_from_the_output(host: Host, inputs: tuple[Tensor, Tensor]) -> None:
    """As a matching does; and the teacher is asked about the same queries."""

    def make_tap(model: nn.Module) -> AttentionTap:
        return AttentionTap(list(model.layers), query=slice(None))

    tap, teacher = make_tap(host), MomentumTeacher(host, make_tap)
    with tap.recording():
        output = host(*inputs)
    matched = output.detach().norm(dim=-1).argmax(1)
    students, teachers = tap.attention(query=matched), teacher.attention(*inputs, query=matched)
    assert torch.equal(attention_map(students), attention_map(teachers))
    assert torch.equal(attention_map(teacher(*inputs, query=matched)), attention_map(teachers))
    terms = attention_terms(students, torch.rand(BATCH, MEMORY), teacher=teachers)
    assert terms.mrc.max() < 1e-12
    terms.rac.sum().backward()
    assert host.layers[0].in_proj_weight.grad.norm() > 0


def test_none_chosen_of_several(host: Host, inputs: tuple[Tensor, Tensor]) -> None:
    tap = AttentionTap(list(host.layers), query=[2, 0])
    record(host, tap, *inputs)
    with pytest.raises(TypeError, match=r"several queries, \(2, 0\).*attention\(query=\.\.\.\), int64 \(B,\)"):
        tap.attention()
    assert len(tap.attention(torch.zeros(BATCH, dtype=torch.int64)).key) == 2  # the recording was not lost


def test_one_chosen_of_one(host: Host, inputs: tuple[Tensor, Tensor]) -> None:
    tap = AttentionTap(list(host.layers), query=2)
    record(host, tap, *inputs)
    with pytest.raises(TypeError, match=r"one query, 2: attention\(\) takes no choice"):
        tap.attention(torch.zeros(BATCH, dtype=torch.int64))
    assert len(tap.attention().key) == 2


def test_a_teacher_passes_refusals_on(host: Host, inputs: tuple[Tensor, Tensor]) -> None:
    teacher = MomentumTeacher(host, lambda model: AttentionTap(list(model.layers), query=slice(None)))
    with pytest.raises(TypeError, match="several queries"):
        teacher.attention(*inputs)


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        (0, TypeError, "int64 tensor .* got int"),
        ([0, 1, 2], TypeError, "int64 tensor .* got list"),
        (torch.zeros(BATCH), TypeError, "int64 tensor .* got torch.float32"),
        (torch.zeros(BATCH, dtype=torch.int32), TypeError, "got torch.int32"),
        (torch.zeros(BATCH, 1, dtype=torch.int64), ValueError, r"\(B,\) = \(3,\), got shape \(3, 1\)"),
        (torch.zeros(2, dtype=torch.int64), ValueError, r"\(B,\) = \(3,\), got shape \(2,\)"),
        (torch.zeros(BATCH, dtype=torch.int64, device="meta"), ValueError, "must be on cpu .* got meta"),
    ],
    ids=["int", "list", "float", "int32", "rank", "batch", "device"],
)
def test_a_choice_of_another_kind(
    host: Host, inputs: tuple[Tensor, Tensor], choice: Tensor, error: type[Exception], message: str
) -> None:
    tap = AttentionTap(list(host.layers), query=slice(None))
    record(host, tap, *inputs)
    with pytest.raises(error, match=message):
        tap.attention(choice)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [-1, QUERIES, 2**40])
def test_a_choice_out_of_range_makes_its_own_sample_nan(
    host: Host, inputs: tuple[Tensor, Tensor], number: int, backend: str
) -> None:
    """Values never raise, and no other query is taken in silence."""
    tokens, memory = (x.requires_grad_() for x in inputs)
    tap = AttentionTap(list(host.layers), query=slice(None))
    record(host, tap, tokens, memory)
    attention = tap.attention(torch.tensor([1, number, 4]))
    terms = attention_terms(attention, torch.rand(BATCH, MEMORY), backend=backend)
    assert terms.rac.isnan().any(0).tolist() == [False, True, False]
    terms.rac.sum().backward()
    assert memory.grad[[0, 2]].isfinite().all()
    assert memory.grad[1].isnan().any()


def test_a_slice_that_names_no_query(host: Host, inputs: tuple[Tensor, Tensor]) -> None:
    tap = AttentionTap(list(host.layers), query=slice(8, 9))
    record(host, tap, *inputs)
    with pytest.raises(ValueError, match=r"slice\(8, 9, None\) names none of the layer's query tokens"):
        tap.attention(torch.zeros(BATCH, dtype=torch.int64))


def test_a_choice_is_differentiated_under_no_grad_too(host: Host, inputs: tuple[Tensor, Tensor]) -> None:
    """The graph is that of the forward pass."""
    tap = AttentionTap(list(host.layers), query=slice(None), visual=[4, 2])
    record(host, tap, *inputs)
    with torch.no_grad():
        attention = tap.attention(torch.zeros(BATCH, dtype=torch.int64))
    assert all(query.requires_grad for query in attention.query)


def test_no_more_than_the_recorded_queries_are_folded(host: Host, inputs: tuple[Tensor, Tensor]) -> None:
    tap = AttentionTap(list(host.layers), query=[3, 1])
    record(host, tap, *inputs)
    assert [record.query.shape for record in tap._records] == [(BATCH, 2, 16)] * 2
