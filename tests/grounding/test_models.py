"""The models: what their docstrings promise."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers_models import assert_attention_only_shows_the_same

from attbalance_ext import AttentionTap, attention_map
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.models import GroundingModel, build_model
from attbalance_ext.grounding.models.base import PARTS
from attbalance_ext.grounding.models.layers import EncoderLayer, sine_positions
from attbalance_ext.grounding.pretrain import cell_targets


@pytest.fixture
def model() -> GroundingModel:
    return build_model("transvg-tiny", vocabulary_size=20, image_size=32, max_words=8)


def inputs(model: GroundingModel, batch: int = 3) -> tuple[torch.Tensor, None, torch.Tensor, torch.Tensor]:
    images = torch.randint(0, 256, (batch, 3, 32, 32)).to(torch.uint8)
    words = torch.randint(2, 20, (batch, 6))
    padding = torch.arange(6) >= torch.tensor([[6], [3], [1]])[:batch]
    return model.prepare(images), None, words, padding


def test_unknown_model_says_what_exists() -> None:
    with pytest.raises(UserError, match="'nope'; there is: transvg-tiny"):
        build_model("nope", vocabulary_size=3, image_size=64)


def test_boxes_do_not_depend_on_padded_words(model: GroundingModel) -> None:
    model.eval()
    prepared, _, words, padding = inputs(model)
    boxes = model(prepared, None, words, padding)
    assert boxes.shape == (3, 4)
    assert ((boxes > 0) & (boxes < 1)).all()
    other = torch.where(padding, 7, words)
    torch.testing.assert_close(model(prepared, None, other, padding), boxes)
    torch.testing.assert_close(model(prepared[1:2], None, words[1:2, :3], padding[1:2, :3]), boxes[1:2])


def test_the_tap_reads_the_attention_to_the_visual_tokens(model: GroundingModel) -> None:
    """Against per-head projections of the layer's own input, computed in the open."""
    model.eval()
    seen: list[torch.Tensor] = []
    layer = model.fusion[-1]
    layer.norm_attention.register_forward_hook(lambda module, args, output: seen.append(output))
    tap = model.make_tap()
    with tap.recording():
        model(*inputs(model))
    maps = attention_map(tap.attention())
    tokens = seen[0].transpose(0, 1)
    dim, heads = tokens.shape[-1], layer.attention.num_heads
    weight_q, weight_k, _ = layer.attention.in_proj_weight.split(dim)
    bias_q, bias_k, _ = layer.attention.in_proj_bias.split(dim)
    q = (tokens[:, 0] @ weight_q.T + bias_q).unflatten(-1, (heads, -1))
    k = (tokens[:, -16:] @ weight_k.T + bias_k).unflatten(-1, (heads, -1))
    scores = torch.einsum("bhd,bnhd->bnh", q, k).mean(-1) / (dim // heads) ** 0.5
    assert maps.shape == (len(model.supervised), 3, 16)
    torch.testing.assert_close(maps[-1], scores.softmax(-1))


def test_every_layer_can_be_tapped_and_the_supervised_ones_are_the_last_three(model: GroundingModel) -> None:
    assert model.supervised == (1, 2, 3)
    taps = {every: model.make_tap(every_layer=every) for every in (False, True)}
    prepared = inputs(model)
    layers = {}
    for every, tap in taps.items():
        assert isinstance(tap, AttentionTap)
        with tap.recording():
            model(*prepared)
        layers[every] = len(tap.attention().key)
    assert layers == {False: 3, True: 4}


def test_the_first_layers_query_has_not_seen_the_image(model: GroundingModel) -> None:
    """Why layer 0 is not supervised."""
    prepared, _, words, padding = inputs(model)
    tap = model.make_tap(every_layer=True)
    queries = []
    for image in (prepared, prepared.flip(0)):
        with tap.recording():
            model(image, None, words, padding)
        queries.append(tap.attention().query)
    torch.testing.assert_close(queries[0][0], queries[1][0])
    assert not torch.allclose(queries[0][1], queries[1][1], atol=1e-3)


def test_padding_of_the_canvas_reaches_the_tap(model: GroundingModel) -> None:
    model.eval()
    prepared, _, words, word_padding = inputs(model)
    padding = torch.zeros(3, 32, 32, dtype=torch.bool)
    padding[1, :, 20:] = True
    tap = model.make_tap()
    with tap.recording():
        model(prepared, padding, words, word_padding)
    recorded = tap.attention().padding
    assert recorded is not None
    assert torch.equal(recorded.unflatten(1, (4, 4))[1], torch.tensor([[False, False, False, True]] * 4))
    assert not recorded[[0, 2]].any()


def test_a_teacher_stops_when_all_have_attended(model: GroundingModel) -> None:
    ran = []
    model.box_head.register_forward_hook(lambda *_: ran.append("box head"))
    taps = model.make_tap()
    with taps.recording():
        assert model(*inputs(model), attention_only=True).numel() == 0
    assert len(taps.attention().key) == 3
    assert not ran


def test_what_a_teacher_shows_is_the_same(model: GroundingModel) -> None:
    assert_attention_only_shows_the_same(model.eval(), inputs(model), model.fusion[-1].attention)


def test_every_trainable_parameter_is_in_one_part(model: GroundingModel) -> None:
    parts = model.parts()
    assert set(parts) == set(PARTS)
    listed = [id(parameter) for parameters in parts.values() for parameter in parameters]
    assert sorted(listed) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)


def test_the_frozen_encoder_stays_in_evaluation_mode(model: GroundingModel) -> None:
    model.train()
    assert not model.image_encoder.training
    assert model.text_encoder.training
    assert not any(parameter.requires_grad for parameter in model.image_encoder.parameters())
    before = copy.deepcopy(model.image_encoder.state_dict())
    inputs(model)
    assert all(torch.equal(value, before[name]) for name, value in model.image_encoder.state_dict().items())


def test_a_layer_asked_for_some_tokens_gives_them_as_it_gives_all() -> None:
    layer = EncoderLayer(16, 4, 32).eval()
    tokens, padding = torch.randn(7, 2, 16), torch.arange(7) >= torch.tensor([[7], [5]])
    torch.testing.assert_close(layer(tokens, padding, queries=2), layer(tokens, padding)[:2])


def test_sine_positions_tell_every_cell_apart() -> None:
    positions = sine_positions(8, 8, 64)
    distance = torch.cdist(positions, positions) + 10 * torch.eye(64)
    assert distance.min() > 0.1
    with pytest.raises(ValueError, match="multiple of 4"):
        sine_positions(2, 2, 6)


def test_cells_know_their_object() -> None:
    from attbalance_ext.grounding.data import Objects

    boxes = torch.tensor([[[0.25, 0.25, 0.5, 0.5], [0.9, 0.9, 0.05, 0.05], [0.0, 0.0, 0.0, 0.0]]])
    labels = torch.zeros(1, 3, dtype=torch.long)
    objects = Objects(boxes, torch.tensor([[True, True, False]]), labels, labels, labels, labels)
    expected = torch.tensor([[0, 0, -1, -1], [0, 0, -1, -1], [-1, -1, -1, -1], [-1, -1, -1, 1]])
    assert torch.equal(cell_targets(objects, (4, 4)), expected.reshape(1, 16))
