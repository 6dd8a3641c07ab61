"""Recording in a model that `fully_shard` (FSDP2) has sharded, in a group of this one process.

Even then parameters are parts of themselves outside the forward and backward pass of their block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from helpers_hosts import Grounder, relative_error
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from attbalance_ext import AttBalanceLoss, AttentionTap, BoxRegion, MomentumTeacher, QueryAttention, attention_terms

BATCH = 3
VISUAL = torch.randn(BATCH, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
PADDING = torch.arange(17) >= torch.tensor([17, 15, 12])[:, None]
BOXES = torch.tensor([[0.3, 0.4, 0.5, 0.6], [0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.3, 0.4]])


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def grounder() -> Grounder:
    torch.manual_seed(0)
    return Grounder().double()


def tapped(model: Grounder) -> AttentionTap:
    return AttentionTap(model.attention_layers(), visual=slice(1, None))


def shard_blocks(model: Grounder, **options: bool) -> None:
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model)


def shard_whole(model: Grounder) -> None:
    fully_shard(model, reshard_after_forward=True)


def shard_attention(model: Grounder) -> None:
    for layer in model.attention_layers():
        fully_shard(layer)


def record(model: Grounder, tap: AttentionTap) -> tuple[Tensor, QueryAttention]:
    """The boxes and the recording."""
    with tap.recording():
        boxes = model(VISUAL, PADDING)
    return boxes, tap.attention()


def whole(parameters: list[Tensor]) -> list[Tensor]:
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(actual, expected, strict=True))


def gradients(model: Grounder, tap: AttentionTap, box_weight: float = 1.0) -> list[Tensor]:
    boxes, attention = record(model, tap)
    terms = attention_terms(attention, BoxRegion(BOXES, (4, 4)))
    loss = (terms.rac + terms.in_box).sum()
    if box_weight:
        loss = loss + AttBalanceLoss()(terms, boxes, BOXES).loss
    loss.backward()
    return whole([p.grad for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("tap_first", [True, False], ids=["tap_then_shard", "shard_then_tap"])
@pytest.mark.parametrize("shard", [shard_blocks, shard_whole, fully_shard])
def test_recording_and_gradients_are_those_of_the_whole_model(
    shard: Callable[[Grounder], None], tap_first: bool
) -> None:
    plain, model = grounder(), grounder()
    expected = gradients(plain, tapped(plain))
    if tap_first:
        tap = tapped(model)
        shard(model)
    else:
        shard(model)
        tap = tapped(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert_equal(gradients(model, tap), expected)
    assert all(isinstance(p, DTensor) for p in model.parameters())


def test_a_loss_of_attention_alone() -> None:
    """The gradient never comes to the last block's output, which is what gathers a block's parameters again."""
    plain, model = grounder(), grounder()
    shard_blocks(model, reshard_after_forward=False)
    assert_equal(gradients(model, tapped(model), box_weight=0), gradients(plain, tapped(plain), box_weight=0))


@pytest.mark.parametrize("tap_first", [True, False], ids=["tap_then_shard", "shard_then_tap"])
def test_a_layer_that_is_sharded_by_itself_is_refused(tap_first: bool) -> None:
    model = grounder()
    if tap_first:
        tap = tapped(model)
    shard_attention(model)
    if not tap_first:
        tap = tapped(model)
    with pytest.raises(ValueError, match="fully_shard was applied to a tapped layer by itself: apply it to the block"):
        record(model, tap)


def test_a_layer_that_is_sharded_by_itself_is_left_alone_outside_a_recording() -> None:
    model = grounder()
    shard_attention(model)
    tapped(model)
    model(VISUAL, PADDING).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# --- the teacher ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_teacher", [False, True], ids=["whole_teacher", "sharded_teacher"])
@pytest.mark.parametrize("shard", [shard_blocks, shard_whole, fully_shard])
def test_a_teacher_follows_a_sharded_model(shard: Callable[[Grounder], None], shard_teacher: bool) -> None:
    plain, model = grounder(), grounder()
    pairs = [(host, MomentumTeacher(host, tapped)) for host in (plain, model)]
    shard(model)
    if shard_teacher:
        shard(pairs[1][1].module)
    seen: list[list[Tensor]] = [[], []]
    for found, (host, teacher) in zip(seen, pairs, strict=True):
        tap = tapped(host)
        optimizer = torch.optim.SGD(host.parameters(), lr=0.1)
        for _ in range(3):
            teacher.update(host)
            attention = teacher.attention(VISUAL, PADDING)
            found += [*attention.query, *attention.key]
            optimizer.zero_grad()
            gradients(host, tap)
            optimizer.step()
            with torch.no_grad():  # after which a sharded model shows gathered parameters
                host(VISUAL, PADDING)
        found += whole(list(teacher.state_dict().values()))
    assert_equal(seen[1], seen[0])
    assert relative_error(seen[0][-1], plain.head.bias) > 1e-4  # the last one in the state: it lags behind


def test_a_sharded_model_is_refused() -> None:
    model = grounder()
    shard_blocks(model)
    with pytest.raises(ValueError, match="model is sharded, which has no copy: make the teacher first"):
        MomentumTeacher(model, tapped)
