"""What the tests of several models ask, on a canvas of 3 x 3 visual tokens."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attbalance_ext import AttBalanceLoss, BoxRegion, MomentumTeacher, attention_terms
from attbalance_ext.grounding.models import GroundingModel

WORDS = 40
"""Size of the vocabulary."""

CANVAS = 96
"""Of the full-size models: 3 tokens of 32 pixels."""


def problem(model: GroundingModel) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """prepared images, their padding, words and theirs; in the second sample the third column of tokens is padding."""
    side = model.canvas
    images = model.prepare(torch.randint(0, 256, (2, 3, side, side)).to(torch.uint8))
    padding = torch.zeros(2, side, side, dtype=torch.bool)
    padding[1, :, side * 5 // 8 :] = True
    words = torch.randint(1, WORDS, (2, 7))
    word_padding = torch.zeros(2, 7, dtype=torch.bool)
    word_padding[1, 4:] = True
    return images, padding, words, word_padding


def assert_padding_is_invisible(model: GroundingModel) -> None:
    """Neither what padded words and pixels (or prepared tokens) hold nor how many words are padded changes a box."""
    images, padding, words, word_padding = problem(model)
    hidden = padding[:, None] if model.image_encoder is None else (torch.arange(9) % 3 == 2)[None, :, None]
    changed = images.masked_fill(hidden, 77)
    changed[0] = images[0]
    with torch.no_grad():
        boxes = model(images, padding, words, word_padding)
        other = model(changed, padding, words.masked_fill(word_padding, 9), word_padding)
        shorter = model(images[1:], padding[1:], words[1:, :4], word_padding[1:, :4])
        unpadded = model(images, None, words, word_padding)
    assert not torch.equal(changed, images)
    assert ((boxes > 0) & (boxes < 1)).all()
    torch.testing.assert_close(other, boxes)
    torch.testing.assert_close(shorter, boxes[..., 1:, :])
    torch.testing.assert_close(unpadded[..., 0, :], boxes[..., 0, :])
    assert not torch.allclose(unpadded[..., 1, :], boxes[..., 1, :], atol=1e-4)


def assert_tap_reads(model: GroundingModel, attention: nn.MultiheadAttention, visual: slice) -> None:
    """The last supervised map against per-head projections of the layer's own input, computed in the open."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = attention.register_forward_pre_hook(lambda module, args: seen.append((args[0], args[1])))
    tap = model.make_tap()
    inputs = problem(model)
    with torch.no_grad(), tap.recording():
        model(*inputs)
    record = tap.attention()
    handle.remove()
    tap.remove()
    assert len(record.key) == len(model.supervised)
    scores = torch.einsum("bd,bnd->bn", record.query[-1], record.key[-1]) * record.scale[-1]
    query, key = seen[0][0][0], seen[0][1].transpose(0, 1)[:, visual]
    weight_q, weight_k, _ = attention.in_proj_weight.split(attention.embed_dim)
    bias_q, bias_k, _ = attention.in_proj_bias.split(attention.embed_dim)
    q = (query @ weight_q.T + bias_q).unflatten(-1, (attention.num_heads, -1))
    k = (key @ weight_k.T + bias_k).unflatten(-1, (attention.num_heads, -1))
    open_scores = torch.einsum("bhd,bnhd->bnh", q, k).mean(-1) / q.shape[-1] ** 0.5
    torch.testing.assert_close(scores.softmax(-1), open_scores.softmax(-1))
    assert record.padding is not None
    expected = torch.tensor([[False] * 9, [False, False, True] * 3])
    assert torch.equal(record.padding, expected)


def assert_attention_only_shows_the_same(
    model: GroundingModel, inputs: tuple[Any, ...], last: nn.MultiheadAttention
) -> None:
    """A forward pass that stops early gives a tap the bits of a whole one; its last attention attends to nothing."""
    tap = model.make_tap()
    forward, ran = nn.MultiheadAttention.forward, []

    def counted(module: nn.MultiheadAttention, *args: Any, **options: Any) -> Any:
        ran.append(module)
        return forward(module, *args, **options)

    records = []
    with torch.no_grad(), mock.patch.object(nn.MultiheadAttention, "forward", counted):
        for attention_only in (False, True):
            ran.clear()
            with tap.recording():
                model(*inputs, attention_only=attention_only)
            records.append(tap.attention())
            assert (last in ran) is not attention_only
    tap.remove()
    whole, early = records
    assert len(early.key) == len(model.supervised)
    for name in ("query", "key"):
        assert all(map(torch.equal, getattr(early, name), getattr(whole, name)))
    assert early.scale == whole.scale
    paddings = [record.padding for record in records if record.padding is not None]
    assert len(paddings) != 1
    assert not paddings or torch.equal(*paddings)


def parameters_without_gradient(model: GroundingModel) -> list[str]:
    """Names of trainable parameters that a step of AttBalance leaves without a gradient, key biases aside.

    A key's bias moves all scores of a query alike, which the softmax does not see.
    """
    teacher = MomentumTeacher(model, lambda module: module.make_tap())
    tap = model.make_tap()
    inputs = problem(model)
    targets = torch.tensor([[0.4, 0.5, 0.3, 0.6], [0.3, 0.3, 0.4, 0.2]])
    with tap.recording():
        boxes = model(*inputs)
    terms = attention_terms(
        tap.attention(), BoxRegion(targets, model.grids), teacher=teacher.attention(*inputs, attention_only=True)
    )
    AttBalanceLoss()(terms, boxes, targets).loss.backward()
    tap.remove()
    trained = {id(parameter) for parameters in model.parts().values() for parameter in parameters}
    names = []
    for name, parameter in model.named_parameters():
        if id(parameter) in trained and not name.endswith(("key.bias", "k_proj.bias")):
            gradient = parameter.grad
            if gradient is None or not gradient.isfinite().all() or not gradient.any():
                names.append(name)
    model.zero_grad(set_to_none=True)
    return names


class Operations(TorchDispatchMode):
    """Which operations run, and the shapes of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        self.shapes |= {tuple(item.shape) for item in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(item)}
        return result


def assert_attention_is_fused(model: GroundingModel) -> None:
    """No softmax of its own, and no tensor of tokens by tokens."""
    with torch.no_grad(), Operations() as ran:
        model(*problem(model))
    assert any("scaled_dot_product" in name for name in ran.names)
    assert not any("softmax" in name for name in ran.names)
    assert not [shape for shape in ran.shapes if len(shape) > 2 and shape[-2:] == (9, 9)]
