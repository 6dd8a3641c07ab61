"""VLTVG at its published size and its small preset: the parts against the paper's formulas, the wholes' promises."""

from __future__ import annotations

import pytest
import torch
from helpers_models import (
    CANVAS,
    WORDS,
    Operations,
    assert_attention_is_fused,
    assert_attention_only_shows_the_same,
    assert_padding_is_invisible,
    assert_tap_reads,
    parameters_without_gradient,
    problem,
)
from torch import Tensor, nn

from attbalance_ext.grounding.models import GroundingModel, build_model
from attbalance_ext.grounding.models.reasoning import DiscriminativeEncoder, Reasoning, Verification
from attbalance_ext.grounding.models.relative_attention import RelativeAttention


@pytest.fixture(scope="module")
def full() -> GroundingModel:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    return build_model("vltvg-r50", vocabulary_size=WORDS, image_size=CANVAS).eval()


@pytest.fixture(scope="module")
def tiny() -> GroundingModel:
    torch.manual_seed(0)
    return build_model("vltvg-tiny", vocabulary_size=WORDS, image_size=24, max_words=8).eval()


@pytest.fixture(params=["full", "tiny"])
def model(request: pytest.FixtureRequest) -> GroundingModel:
    return request.getfixturevalue(request.param)


def test_every_stage_gives_a_box(model: GroundingModel) -> None:
    with torch.no_grad():
        boxes = model(*problem(model))
    assert boxes.shape == (model.layers, 2, 4)
    assert (boxes[0] - boxes[-1]).abs().max() > 1e-3


def test_padding_changes_no_box(model: GroundingModel) -> None:
    assert_padding_is_invisible(model)


def test_the_tap_reads_the_querys_attention_to_the_visual_tokens(model: GroundingModel) -> None:
    assert_tap_reads(model, model.reasoning.stages[-1].visual_attention, slice(None))
    assert model.grids == ((3, 3),)
    assert model.supervised == {6: (2, 3, 4, 5), 4: (1, 2, 3)}[model.layers]


def test_every_stage_can_be_tapped(model: GroundingModel) -> None:
    tap = model.make_tap(every_layer=True)
    with tap.recording(), torch.no_grad():
        model(*problem(model))
    assert len(tap.attention().key) == model.layers
    tap.remove()


def test_gradients_reach_every_parameter(model: GroundingModel) -> None:
    assert parameters_without_gradient(model) == []


def test_attention_is_fused(model: GroundingModel) -> None:
    assert_attention_is_fused(model)


def test_a_teacher_stops_when_all_have_attended(model: GroundingModel) -> None:
    ran = []
    reasoning = model.reasoning
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in [("head", reasoning.box_head), ("feed-forward", reasoning.stages[-1].feedforward)]
    ]
    tap = model.make_tap()
    with tap.recording(), torch.no_grad():
        assert model(*problem(model), attention_only=True).numel() == 0
    assert len(tap.attention().key) == len(model.supervised)
    assert not ran
    for handle in [*handles, tap]:
        handle.remove()


def test_what_a_teacher_shows_is_the_same(model: GroundingModel) -> None:
    assert_attention_only_shows_the_same(model, problem(model), model.reasoning.stages[-1].visual_attention)


def test_every_trainable_parameter_is_in_one_part(model: GroundingModel) -> None:
    parts = model.parts()
    listed = [id(parameter) for parameters in parts.values() for parameter in parameters]
    assert sorted(listed) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    assert list(parts) == ["vision", "text", "fusion"]


def test_the_small_models_image_encoder_stays_frozen(tiny: GroundingModel) -> None:
    assert not tiny.train().image_encoder.training
    assert tiny.reasoning.training
    assert not tiny.eval().reasoning.training
    assert not any(parameter.requires_grad for parameter in tiny.image_encoder.parameters())


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


@pytest.mark.parametrize(("name", "published"), [("vltvg-r50", 152.2e6), ("vltvg-r101", 152.2e6 + 18.94e6)])
def test_parameter_counts_are_the_papers(name: str, published: float) -> None:
    """ResNet-101 has 18.94 million parameters more than ResNet-50. The paper counts BERT's pooler as well."""
    pytest.importorskip("transformers")
    with torch.device("meta"):
        model = build_model(name, vocabulary_size=30522, image_size=640)
    attention, norm = 4 * linear(256, 256), 2 * 256
    verification = attention + 2 * linear(256, 256) + 2
    encoder = verification + attention + (attention + 2 * 128 * 256) + 2 * norm
    stage = 2 * attention + linear(256, 2048) + linear(2048, 256) + 3 * norm
    head = norm + 2 * linear(256, 256) + linear(256, 4)
    fusion = linear(768, 256) + encoder + 2 * 256 + 6 * stage + head
    assert count(model.reasoning) == fusion
    assert count(model) + linear(768, 768) == pytest.approx(published, rel=0.005)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# The parts, in float64 against their formulas.


def open_attention(attention: nn.MultiheadAttention, query: Tensor, tokens: Tensor) -> Tensor:
    """query (N, D) attends to tokens (T, D), head by head."""
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q, k, v = (
        (x @ weight.T + bias).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
        for x, weight, bias in zip((query, tokens, tokens), weights, biases, strict=True)
    )
    attended = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v
    return attended.transpose(0, 1).flatten(1) @ attention.out_proj.weight.T + attention.out_proj.bias


def randomised(module: nn.Module) -> nn.Module:
    """In float64, with biases and norms that are not 0 and 1."""
    for parameter in module.double().parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return module.eval()


def test_relative_attention_knows_columns_and_rows() -> None:
    """Against scores computed pair by pair, on a grid that is wider than high, with a padded token."""
    height, width, heads, dim = 3, 4, 2, 8
    layer = randomised(RelativeAttention(dim, heads, (height, width), 0.0))
    x, value = torch.randn(2, height * width, 1, dim, dtype=torch.float64)
    padding = torch.zeros(1, height * width, dtype=torch.bool)
    padding[0, 5] = True
    projected = layer.query(x), layer.key(x), layer.value(value)
    q, k, v = (tokens[:, 0].unflatten(-1, (heads, -1)) for tokens in projected)
    frequency = 10000.0 ** (-torch.arange(0, dim // 2, 2, dtype=torch.float64) / (dim // 2))

    def relative(projection: nn.Linear, offset: int) -> Tensor:
        angle = offset * frequency
        return projection(torch.stack([angle.sin(), angle.cos()], -1).flatten()).unflatten(-1, (heads, -1))

    scores = torch.full((heads, height * width, height * width), -torch.inf, dtype=torch.float64)
    for i in range(height * width):
        for j in range(height * width):
            if not padding[0, j]:
                column = relative(layer.column_projection, j % width - i % width)
                row = relative(layer.row_projection, j // width - i // width)
                scores[:, i, j] = (q[i] * (k[j] + column + row)).sum(-1) / (dim // heads) ** 0.5
    expected = layer.out(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1))
    torch.testing.assert_close(layer(x, value, padding)[:, 0], expected, rtol=1e-6, atol=1e-6)


def test_relative_attention_makes_no_matrix_of_tokens_by_tokens() -> None:
    layer = RelativeAttention(32, 4, (6, 5), 0.0)
    x = torch.randn(30, 2, 32, requires_grad=True)
    with Operations() as ran:
        layer(x, x, torch.arange(30).expand(2, -1) >= 25).sum().backward()
    assert {shape[-1] for shape in ran.shapes if len(shape) == 4} >= {8, 8 + 5 + 6}
    assert not [shape for shape in ran.shapes if shape[-2:] == (30, 30)]
    assert not any("softmax" in name for name in ran.names)


def test_verification_is_the_papers_formula() -> None:
    layer = randomised(Verification(8, 2, 0.0))
    visual, words = torch.randn(6, 1, 8, dtype=torch.float64), torch.randn(3, 1, 8, dtype=torch.float64)
    nn.init.constant_(layer.scale, 1.3)
    nn.init.constant_(layer.sigma, 0.4)
    read = layer.language_projection(open_attention(layer.attention, visual[:, 0], words[:, 0]))
    seen = layer.visual_projection(visual[:, 0])
    cosine = torch.stack([torch.dot(r, s) / (r.norm() * s.norm()) for r, s in zip(read, seen, strict=True)])
    expected = 1.3 * torch.exp(-((1 - cosine) ** 2) / (2 * 0.4**2))
    got = layer(visual, words, torch.zeros(1, 3, dtype=torch.bool))
    torch.testing.assert_close(got[:, 0, 0], expected, rtol=1e-6, atol=1e-6)


def test_verification_starts_with_the_papers_scale_and_sigma() -> None:
    layer = Verification(8, 2, 0.0)
    assert (layer.scale.item(), layer.sigma.item()) == (1.0, 0.5)


def test_discriminative_features_are_the_papers_formula() -> None:
    layer = randomised(DiscriminativeEncoder(8, 2, (2, 3), 0.0))
    visual, words = torch.randn(6, 1, 8, dtype=torch.float64), torch.randn(3, 1, 8, dtype=torch.float64)
    no_words = torch.zeros(1, 3, dtype=torch.bool)
    guide = open_attention(layer.guidance, visual[:, 0], words[:, 0])[:, None]
    context = layer.context(visual + guide, visual, None)
    expected = layer.norm_visual(visual) + layer.norm_context(context)
    expected = expected * layer.verification(visual, words, no_words)
    torch.testing.assert_close(layer(visual, None, words, no_words), expected)


def test_stages_are_the_papers_formula() -> None:
    """Keys carry the second half and positions, values the first; the query starts at zero."""
    module = randomised(Reasoning(text_dim=6, dim=8, heads=2, hidden=16, stages=2, grid=(2, 3), dropout=0.0))
    text, visual = torch.randn(1, 3, 6, dtype=torch.float64), torch.randn(1, 6, 8, dtype=torch.float64)
    positions = torch.randn(1, 6, 8, dtype=torch.float64)
    no_words = torch.zeros(1, 3, dtype=torch.bool)
    seen: list[tuple[Tensor, ...]] = []
    for stage in module.stages:
        stage.visual_attention.register_forward_hook(
            lambda layer, args, output: seen.append((*(tensor[:, 0] for tensor in args[:3]), output[0][:, 0]))
        )
    boxes = module(text, no_words, visual, positions, None)
    words = module.text_projection(text[0])
    keys = module.encoder(visual.transpose(0, 1), None, words[:, None], no_words)[:, 0] + positions[0]
    query = torch.zeros(1, 8, dtype=torch.float64)
    for stage, box, (asked, key, value, attended) in zip(module.stages, boxes, seen, strict=True):
        read = stage.norm_text(open_attention(stage.text_attention, query + module.text_query, words))
        torch.testing.assert_close(asked, read + module.visual_query)
        torch.testing.assert_close(key, keys)
        torch.testing.assert_close(value, visual[0])
        query = stage.norm_visual(query + attended)
        inner = stage.feedforward
        query = inner.norm(query + inner.outer(inner.inner(query).relu()))
        torch.testing.assert_close(box, module.box_head(module.norm(query)).sigmoid())
