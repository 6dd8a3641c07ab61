"""The attention that a network itself uses, against a softmax per head over all tokens, computed in the open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers_models import WORDS, problem
from torch import Tensor, nn

from attbalance_ext.grounding.evaluate import Evaluation, evaluate
from attbalance_ext.grounding.models import GroundingModel, build_model
from attbalance_ext.grounding.train import Trainer
from attbalance_ext.grounding.used_attention import UsedAttention

TINY = ("transvg-tiny", "vltvg-tiny", "qrnet-tiny")


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> GroundingModel:
    return build_model(request.param, vocabulary_size=WORDS, image_size=32, max_words=8).eval()


class Inputs:
    """Query, key and key padding mask of every call of the modules, first to last."""

    def __init__(self, modules: list[nn.MultiheadAttention]) -> None:
        self.seen: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.handles = [module.register_forward_pre_hook(self.keep, with_kwargs=True) for module in modules]

    def keep(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen.append((args[0], args[1], kwargs["key_padding_mask"]))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def attention_in_the_open(module: nn.MultiheadAttention, query: Tensor, key: Tensor, padding: Tensor | None) -> Tensor:
    """(B, all tokens) of the first query, heads averaged after their softmax."""
    weight_q, weight_k, _ = module.in_proj_weight.split(module.embed_dim)
    bias_q, bias_k, _ = module.in_proj_bias.split(module.embed_dim)
    q = (query[0] @ weight_q.T + bias_q).unflatten(-1, (module.num_heads, -1))
    k = (key @ weight_k.T + bias_k).unflatten(-1, (module.num_heads, -1))
    scores = torch.einsum("bhd,nbhd->bhn", q, k) / q.shape[-1] ** 0.5
    if padding is not None:
        scores = scores.masked_fill(padding[:, None], -torch.inf)
    return scores.softmax(-1).mean(1)


def hooks(model: GroundingModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_it_is_a_softmax_per_head_over_all_tokens(model: GroundingModel) -> None:
    modules, visual = model.object_attention()
    with torch.no_grad():
        for module in modules:
            module.in_proj_weight.mul_(4)  # attention that is far from even
            nn.init.normal_(module.in_proj_bias)
    used, inputs = UsedAttention(model), problem(model)
    opened = Inputs(modules)
    with torch.no_grad(), used.recording():
        model(*inputs)
    opened.close()
    found = used.weights()
    tokens = sum(height * width for height, width in model.grids)
    assert found.shape == (model.layers, 2, tokens)
    for layer, module in enumerate(modules):
        expected = attention_in_the_open(module, *opened.seen[layer])
        torch.testing.assert_close(found[layer], expected[:, visual])
        words = expected[:, : expected.shape[1] - tokens].sum(1)
        torch.testing.assert_close(found[layer].sum(1) + words, torch.ones(2))
        assert (words > 0).all() if expected.shape[1] > tokens else (words == 0).all()
        padding = opened.seen[layer][2]
        assert padding is not None
        assert found[layer][padding[:, visual]].eq(0).all()
    assert found.std(-1).mean() > 0.02


def test_it_changes_no_box_and_leaves_no_hook(model: GroundingModel) -> None:
    inputs, before = problem(model), hooks(model)
    used = UsedAttention(model)
    with torch.no_grad():
        boxes = model(*inputs)
        with used.recording():
            assert hooks(model) == before + model.layers
            assert torch.equal(model(*inputs), boxes)
        assert hooks(model) == before
        first = used.weights()
        model(*inputs)  # not recorded
        with pytest.raises(RuntimeError, match="no forward pass was recorded"):
            used.weights()
        with used.recording():
            model(*inputs)
        assert torch.equal(used.weights(), first)
    with pytest.raises(TypeError), used.recording():
        model()
    assert hooks(model) == before


def test_the_evaluation_sums_it_in_the_box_and_over_the_image(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer()
    trainer.advance()
    model, split = trainer.model, trainer.split
    found = evaluate(model, split, rule="coverage")
    count = len(split)
    assert found.used.shape == found.used_visual.shape == (model.layers, count)
    used = UsedAttention(model.eval())
    batch = split.batch(torch.arange(count))
    with torch.no_grad(), used.recording():
        model(*batch.inputs)
    maps = used.weights()
    ((height, width),) = model.grids
    for index in range(count):
        cx, cy, w, h = batch.boxes[index].tolist()
        across, down = (
            [max(0.0, min(high, cell + 1) - max(low, cell)) for cell in range(cells)]
            for low, high, cells in (
                ((cx - w / 2) * width, (cx + w / 2) * width, width),
                ((cy - h / 2) * height, (cy + h / 2) * height, height),
            )
        )
        region = torch.outer(torch.tensor(down), torch.tensor(across)).flatten()
        torch.testing.assert_close(found.used[:, index], (maps[:, index] * region).sum(-1))
    torch.testing.assert_close(found.used_visual, maps.sum(-1))
    assert (found.used_visual < 1).all()  # words take a part
    assert not torch.allclose(found.used, found.in_box, atol=1e-3)
    assert torch.equal(found.box_ratio, split.box_ratio)
    metrics = found.metrics()
    assert metrics["used_in_box"] == pytest.approx(found.used.mean(1).tolist())
    assert metrics["used_visual"] == pytest.approx(found.used_visual.mean(1).tolist())


def test_accuracy_by_size_takes_thirds_by_the_true_box() -> None:
    ratio = torch.tensor([0.5, 0.1, 0.3, 0.9, 0.2, 0.3, 0.7])  # smallest three; next two; last two
    iou = torch.tensor([0.5, 0.6, 0.4, 0.9, 0.1, 0.8, 0.3])
    none = torch.zeros(1, 7)
    found = Evaluation(torch.zeros(7, 4), iou, none, iou > 0, ratio, none, none)
    sizes = found.accuracy_by_size()
    assert sizes == pytest.approx({"small": 1 / 3, "medium": 1.0, "large": 0.5})
    assert found.accuracy_by_size(0.85) == pytest.approx({"small": 0.0, "medium": 0.0, "large": 0.5})


def test_metrics_are_of_all_boxes_and_attention_of_those_that_cover_a_token() -> None:
    iou = torch.tensor([0.5, 0.7, 0.2, 0.9])
    valid = torch.tensor([True, True, True, False])
    in_box = torch.tensor([[0.2, 0.6, 0.1, 0.0], [0.3, 0.1, 0.8, 0.0]])
    found = Evaluation(torch.zeros(4, 4), iou, in_box, valid, iou, in_box / 2, in_box * 3 / 4).metrics()
    assert (found["samples"], found["valid"]) == (4, 3)
    assert (found["acc50"], found["acc70"]) == (0.75, 0.5)  # an IoU of exactly the threshold is a hit
    assert found["miou"] == pytest.approx(0.575)
    assert found["in_box"] == pytest.approx([0.3, 0.4])
    assert found["used_in_box"] == pytest.approx([0.15, 0.2])
    assert found["used_visual"] == pytest.approx([0.225, 0.3])
    assert found["rho"] == pytest.approx([1.0, -1.0])
