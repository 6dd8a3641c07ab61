"""QRNet and its tiny counterpart: what their docstrings promise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers_models import assert_attention_only_shows_the_same
from torch import nn

from attbalance_ext import AttBalanceLoss, BoxRegion, attention_map, attention_terms
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.models import GroundingModel, build_model
from attbalance_ext.grounding.models.base import PARTS
from attbalance_ext.grounding.models.dynamic_attention import DynamicAttention, DynamicLinear
from attbalance_ext.grounding.models.neck import LevelTokens, QueryModulatedNeck, level_padding
from attbalance_ext.grounding.models.qrnet_tiny import ModulatedStages


def test_a_dynamic_linear_layer_is_the_product_of_its_factors() -> None:
    layer = DynamicLinear(5, 7, sentence_dim=11, rank=3).double()
    x, sentence = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 11, dtype=torch.float64)
    y = layer(x, sentence)
    for sample in range(2):
        left = (layer.factor.weight @ sentence[sample] + layer.factor.bias).reshape(6, 3)
        weight, bias = (left @ layer.basis)[:5], (left @ layer.basis)[5]
        torch.testing.assert_close(y[sample], x[sample] @ weight + bias, rtol=1e-13, atol=1e-13)


def test_fresh_dynamic_weights_vary_as_those_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    dynamic, linear = DynamicLinear(256, 64, sentence_dim=128, rank=30), torch.nn.Linear(256, 64)
    sentences, basis = torch.randn(64, 128), torch.eye(256)
    made = dynamic(basis.expand(64, -1, -1), sentences) - dynamic(torch.zeros(64, 1, 256), sentences)
    assert made.std().item() == pytest.approx(linear.weight.std().item(), rel=0.1)


def test_gates_lie_between_0_and_1_and_follow_the_sentence() -> None:
    attention = DynamicAttention(32, sentence_dim=16, rank=4)
    tokens, sentences = 3 * torch.randn(2, 10, 32), torch.randn(2, 16)
    channels, places = attention.channel_gate(tokens, sentences), attention.spatial_gate(tokens, sentences)
    assert channels.shape == (2, 1, 32)
    assert places.shape == (2, 10, 1)
    for gate in (channels, places):
        assert ((gate > 0) & (gate < 1)).all()
        assert gate.std() > 1e-3
    assert not torch.allclose(attention.channel_gate(tokens, sentences.flip(0)), channels, atol=1e-3)
    assert not torch.allclose(attention.spatial_gate(tokens, sentences.flip(0)), places, atol=1e-3)
    gated = tokens * channels
    expected = gated * attention.spatial_gate(gated, sentences)
    torch.testing.assert_close(attention(tokens, sentences), expected)


def test_the_channel_gate_sums_what_the_mean_and_the_maximum_give() -> None:
    attention = DynamicAttention(32, sentence_dim=16, rank=4).double()
    tokens, sentence = torch.randn(1, 10, 32, dtype=torch.float64), torch.randn(1, 16, dtype=torch.float64)

    def mlp(pooled: torch.Tensor) -> torch.Tensor:
        return attention.excite(F.relu(attention.squeeze(pooled[:, None], sentence)), sentence)

    expected = torch.sigmoid(mlp(tokens.mean(1)) + mlp(tokens.max(1).values))
    torch.testing.assert_close(attention.channel_gate(tokens, sentence), expected)


def test_the_neck_by_hand() -> None:
    """Two levels: coarse comes down by repetition, fine goes up gated and averaged over 2 x 2."""
    neck = QueryModulatedNeck((6, 10), 8, sentence_dim=16, rank=4).double()
    fine, coarse = torch.randn(2, 6, 4, 8, dtype=torch.float64), torch.randn(2, 10, 2, 4, dtype=torch.float64)
    sentence = torch.randn(2, 16, dtype=torch.float64)
    low, high = neck([fine, coarse], sentence)
    top = neck.lateral[1](coarse)
    down = top.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    expected_low = neck.smooth[0](neck.lateral[0](fine) + down)
    torch.testing.assert_close(low, expected_low)
    gated = neck.attention[0](low.permute(0, 2, 3, 1).flatten(1, 2), sentence).unflatten(1, (2, 2, 4, 2))
    up = gated.mean(dim=(2, 4)).permute(0, 3, 1, 2)
    torch.testing.assert_close(high, neck.smooth[1](top) + up)


def test_level_tokens_come_level_after_level_row_by_row() -> None:
    mark = LevelTokens(2, 3)
    fine, coarse = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 1, 2)
    tokens = mark([fine, coarse])
    assert tokens.shape == (2, 10, 3)
    torch.testing.assert_close(tokens[:, 5], fine[:, :, 1, 1] + mark.embedding[0])
    torch.testing.assert_close(tokens[:, 9], coarse[:, :, 0, 1] + mark.embedding[1])


def test_each_level_has_its_own_padding() -> None:
    padding = torch.zeros(1, 8, 8, dtype=torch.bool)
    padding[:, :, 3:] = True
    padded = level_padding(padding, ((4, 4), (2, 2)))
    assert padded is not None
    assert padded[0, :16].unflatten(0, (4, 4)).tolist() == [[False, False, True, True]] * 4
    assert padded[0, 16:].tolist() == [False, True, False, True]
    assert level_padding(None, ((4, 4),)) is None


def test_the_tiny_models_second_level_merges_patches_of_2_by_2(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = ModulatedStages((4, 6), 8, heads=2, hidden=16)
    for ungated in (stages.fine, stages.coarse, stages.layer):
        monkeypatch.setattr(ungated, "forward", lambda tokens, *_: tokens)
    tokens = torch.randn(2, 24, 8)
    fine, coarse = stages(tokens, torch.randn(2, 8))
    assert fine.shape == (2, 8, 4, 6)
    assert coarse.shape == (2, 16, 2, 3)
    torch.testing.assert_close(fine[:, :, 1, 2], stages.norms[0](tokens[:, 8]))
    patch = tokens[:, [14, 15, 20, 21]].flatten(1)  # rows 2 and 3, columns 2 and 3
    torch.testing.assert_close(coarse[:, :, 1, 1], stages.norms[1](stages.merging(patch)))


# Both models.


class Case(NamedTuple):
    """A model and what its forward pass takes: three sentences, one of them padded; no padding of the canvas."""

    model: GroundingModel
    images: torch.Tensor
    words: torch.Tensor
    word_padding: torch.Tensor

    def inputs(
        self, padding: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        return self.model.prepare(self.images), padding, self.words, self.word_padding

    def right_part(self) -> torch.Tensor:
        """The padding of a canvas whose second image ends at five eighths of the width."""
        side = self.model.canvas
        padding = torch.zeros(len(self.images), side, side, dtype=torch.bool)
        padding[1, :, side * 5 // 8 :] = True
        return padding


def make_case(model: GroundingModel) -> Case:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (3, 3, model.canvas, model.canvas), generator=generator).to(torch.uint8)
    words = torch.randint(2, 50, (3, 6), generator=generator)
    return Case(model.eval(), images, words, torch.arange(6) >= torch.tensor([[6], [3], [6]]))


@pytest.fixture(scope="module")
def tiny() -> Case:
    torch.manual_seed(1)
    return make_case(build_model("qrnet-tiny", vocabulary_size=50, image_size=64, max_words=8))


@pytest.fixture(scope="module")
def full() -> Case:
    """The published widths and depths on a small canvas: 8 x 8 and 4 x 4 tokens."""
    pytest.importorskip("transformers")
    torch.manual_seed(1)
    return make_case(build_model("qrnet-swin-s", vocabulary_size=50, image_size=256, max_words=8))


@pytest.fixture(params=["tiny", "full"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    chosen = request.getfixturevalue(request.param)
    yield chosen
    chosen.model.zero_grad(set_to_none=True)


def host_attention(case: Case) -> list[nn.MultiheadAttention]:
    """The fusion's attention modules, first to last."""
    fusion = case.model.fusion
    layers = fusion if isinstance(fusion, nn.ModuleList) else fusion.layers
    return [layer.attention for layer in layers]


@torch.no_grad()
def test_boxes_lie_on_the_canvas_and_follow_the_sentence(case: Case) -> None:
    assert case.model.grids == ((8, 8), (4, 4))
    images, padding, words, word_padding = case.inputs()
    boxes = case.model(images, padding, words, word_padding)
    assert boxes.shape == (3, 4)
    assert ((boxes > 0) & (boxes < 1)).all()
    assert not torch.allclose(case.model(images, padding, words.flip(1), word_padding), boxes, atol=1e-4)


@torch.no_grad()
def test_padded_words_do_not_change_the_boxes(case: Case) -> None:
    images, padding, words, word_padding = case.inputs(case.right_part())
    boxes = case.model(images, padding, words, word_padding)
    other = torch.where(word_padding, 7, words)
    torch.testing.assert_close(case.model(images, padding, other, word_padding), boxes)
    alone = case.model(images[1:2], padding[1:2], words[1:2, :3], word_padding[1:2, :3])
    torch.testing.assert_close(alone, boxes[1:2], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_lies_in_the_padding_does_not_change_the_boxes(case: Case) -> None:
    """Pixels of the full-size model, prepared tokens of the tiny one."""
    images, padding, words, word_padding = case.inputs(case.right_part())
    boxes = case.model(images, padding, words, word_padding)
    hidden = padding[:, None] if case.model.image_encoder is None else level_padding(padding, ((8, 8),))[..., None]
    other = images.masked_fill(hidden, 3)
    assert not torch.equal(other, images)
    torch.testing.assert_close(case.model(other, padding, words, word_padding), boxes)
    assert not torch.allclose(case.model(other, None, words, word_padding), boxes, atol=1e-4)


@torch.no_grad()
def test_padding_of_the_canvas_reaches_the_tap_on_both_grids(case: Case) -> None:
    tap = case.model.make_tap()
    with tap.recording():
        case.model(*case.inputs(case.right_part()))
    recorded = tap.attention().padding
    tap.remove()
    assert recorded is not None
    fine, coarse = recorded.split([64, 16], dim=1)
    assert fine[1].unflatten(0, (8, 8)).tolist() == [[False] * 5 + [True] * 3] * 8
    assert coarse[1].unflatten(0, (4, 4)).tolist() == [[False] * 3 + [True]] * 4
    assert not recorded[[0, 2]].any()


@torch.no_grad()
def test_the_tap_reads_the_attention_to_the_tokens_of_both_grids(case: Case) -> None:
    """Against per-head projections of what the attention modules were given, computed in the open."""
    given: list[tuple[torch.Tensor, ...]] = []
    modules = [host_attention(case)[index] for index in case.model.supervised]
    hooks = [module.register_forward_pre_hook(lambda _, args: given.append(args)) for module in modules]
    tap = case.model.make_tap()
    with tap.recording():
        case.model(*case.inputs())
    maps = attention_map(tap.attention())
    tap.remove()
    for hook in hooks:
        hook.remove()
    assert maps.shape == (len(modules), 3, 80)
    for module, (query, key, *_), seen in zip(modules, given, maps, strict=True):
        dim, heads = module.embed_dim, module.num_heads
        weight_q, weight_k, _ = module.in_proj_weight.split(dim)
        bias_q, bias_k, _ = module.in_proj_bias.split(dim)
        q = (query[0] @ weight_q.T + bias_q).unflatten(-1, (heads, -1))
        k = (key[-80:] @ weight_k.T + bias_k).unflatten(-1, (heads, -1))
        scores = torch.einsum("bhd,nbhd->bnh", q, k).mean(-1) / (dim // heads) ** 0.5
        torch.testing.assert_close(seen, scores.softmax(-1))


@torch.no_grad()
def test_every_layer_can_be_tapped(case: Case) -> None:
    layers = {}
    for every in (False, True):
        tap = case.model.make_tap(every_layer=every)
        with tap.recording():
            case.model(*case.inputs())
        layers[every] = len(tap.attention().key)
        tap.remove()
    assert layers == {False: len(case.model.supervised), True: case.model.layers}


@torch.no_grad()
def test_a_teacher_stops_when_all_have_attended(case: Case) -> None:
    fusion = case.model.fusion
    head = case.model.box_head if isinstance(fusion, nn.ModuleList) else fusion.box_head
    ran = []
    hook = head.register_forward_hook(lambda *_: ran.append("box head"))
    tap = case.model.make_tap()
    with tap.recording():
        assert case.model(*case.inputs(), attention_only=True).numel() == 0
    hook.remove()
    assert len(tap.attention().key) == len(case.model.supervised)
    tap.remove()
    assert not ran


def test_what_a_teacher_shows_is_the_same(case: Case) -> None:
    assert_attention_only_shows_the_same(case.model, case.inputs(), host_attention(case)[-1])


def test_every_trainable_parameter_is_in_one_part_and_gets_a_gradient(case: Case) -> None:
    """Of the whole AttBalance loss, every term on."""
    model, inputs = case.model, case.inputs()
    parts = model.parts()
    assert set(parts) == set(PARTS)
    assert all(parts.values())
    listed = [id(parameter) for parameters in parts.values() for parameter in parameters]
    assert sorted(listed) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    tap = model.make_tap()
    with torch.no_grad(), tap.recording():
        model(*case.inputs()[:2], case.words.flip(1), case.word_padding)
    teacher = tap.attention()
    with tap.recording():
        predicted = model(*inputs)
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.6, 0.3, 0.2], [0.5, 0.3, 0.4, 0.4]])
    terms = attention_terms(tap.attention(), BoxRegion(boxes, model.grids), teacher=teacher)
    tap.remove()
    assert (terms.mrc > 0).all()
    AttBalanceLoss()(terms, predicted, boxes).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            # the softmax does not see what adds the same to all scores: a key's bias
            assert parameter.grad.any() or name.endswith(("k_proj.bias", "key.bias")), name


def test_image_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="image_size must be a multiple of 16 for QRNet, got 72"):
        build_model("qrnet-tiny", vocabulary_size=50, image_size=72)
    qrnet = pytest.importorskip("attbalance_ext.grounding.models.qrnet")
    for wrong in (672, 192):
        with pytest.raises(UserError, match=f"multiple of 64 and at least 256 for QRNet, got {wrong}"):
            qrnet.ModulatedVision(image_size=wrong, sentence_dim=768)


# The tiny model.


def test_only_the_image_encoder_is_frozen(tiny: Case) -> None:
    tiny.model.train()
    assert not tiny.model.image_encoder.training
    assert tiny.model.stages.training
    tiny.model.eval()
    frozen = {id(parameter) for parameter in tiny.model.parameters() if not parameter.requires_grad}
    assert frozen == {id(parameter) for parameter in tiny.model.image_encoder.parameters()}
    assert tiny.model.prepare(tiny.images).shape == (3, 64, 64)


def test_the_tiny_neck_starts_by_passing_on() -> None:
    model = build_model("qrnet-tiny", vocabulary_size=50, image_size=64)
    level = torch.randn(2, 64, 8, 8)
    for smooth in model.neck.smooth:
        torch.testing.assert_close(smooth(level), level)


# The full-size model.


@torch.no_grad()
def test_all_attention_is_fused(full: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    full.model(*full.inputs())
    assert len(calls) == 12 + (2 + 2 + 18 + 2) + 6  # BERT, Swin, fusion


@torch.no_grad()
def test_without_gates_the_stages_are_swins(full: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against transformers' own forward pass."""
    modulated = full.model.visual_branch.swin
    for attention in modulated.attention:
        monkeypatch.setattr(attention, "forward", lambda tokens, sentence: tokens)
    pixels = torch.randn(2, 3, 256, 256)
    levels = modulated(pixels, torch.randn(2, 768))
    embedded, size = modulated.swin.embeddings(pixels)
    expected = modulated.swin.encoder(
        embedded, size, output_hidden_states=True, output_hidden_states_before_downsampling=True
    ).reshaped_hidden_states[1:]
    assert [level.shape[1:] for level in levels] == [(96, 64, 64), (192, 32, 32), (384, 16, 16), (768, 8, 8)]
    for level, plain, norm in zip(levels, expected, [*modulated.norms, modulated.swin.layernorm], strict=True):
        torch.testing.assert_close(level, norm(plain.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_each_stage_sees_the_gated_features_of_the_one_before(full: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    modulated = full.model.visual_branch.swin
    pixels, sentence = torch.randn(1, 3, 256, 256), torch.randn(1, 768)
    for number, attention in enumerate(modulated.attention):
        gated = modulated(pixels, sentence)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "forward", lambda tokens, sentence: tokens)
            without = modulated(pixels, sentence)
        changed = [not torch.allclose(a, b, atol=1e-3) for a, b in zip(gated, without, strict=True)]
        assert changed == [level >= number for level in range(4)]


@torch.no_grad()
def test_the_second_grid_is_every_other_row_and_column_of_the_first(full: Case) -> None:
    vision = full.model.visual_branch
    tokens = vision(full.images[:1], None, torch.randn(1, 768))
    fine, coarse = tokens.split([64, 16], dim=1)
    fine, coarse = fine - vision.tokens.embedding[0], coarse - vision.tokens.embedding[1]
    torch.testing.assert_close(coarse.unflatten(1, (4, 4)), fine.unflatten(1, (8, 8))[:, ::2, ::2])


def test_parameter_counts_are_the_designs(full: Case) -> None:
    """Worked out from the formulas of the layers."""

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    def dynamic(inputs: int, outputs: int) -> int:
        return linear(768, (inputs + 1) * 30) + 30 * outputs

    def gates(dim: int) -> int:
        return dynamic(dim, dim // 16) + dynamic(dim // 16, dim) + dynamic(dim, 1)

    def transformer_layer(dim: int, hidden: int) -> int:
        return 4 * linear(dim, dim) + linear(dim, hidden) + linear(hidden, dim) + 2 * 2 * dim

    dims, depths, heads = (96, 192, 384, 768), (2, 2, 18, 2), (3, 6, 12, 24)
    blocks = sum(n * (transformer_layer(d, 4 * d) + 13 * 13 * h) for n, d, h in zip(depths, dims, heads, strict=True))
    merging = sum(2 * 4 * dim + 4 * dim * 2 * dim for dim in dims[:-1])
    swin = linear(3 * 4 * 4, 96) + 2 * 96 + blocks + merging + 2 * 768
    modulators = sum(gates(dim) for dim in dims) + 2 * sum(dims[:-1])
    neck = sum(linear(dim, 256) for dim in dims) + 4 * linear(9 * 256, 256) + 3 * gates(256)
    bert = (50 + 512 + 2) * 768 + 2 * 768 + 12 * transformer_layer(768, 3072)
    head = 2 * linear(256, 256) + linear(256, 4)
    fusion = linear(768, 256) + linear(256, 256) + 256 + (1 + 8 + 80) * 256 + 6 * transformer_layer(256, 2048) + head
    counts = {part: sum(p.numel() for p in parameters) for part, parameters in full.model.parts().items()}
    assert counts == {"vision": swin + modulators + neck + 2 * 256, "text": bert, "fusion": fusion}
    assert swin == pytest.approx(48.8e6, rel=1e-3)  # Swin-S has 49.6 M, 0.77 M of them its classifier
    published = sum(counts.values()) + (30522 - 50) * 768 + (521 - 89) * 256  # BERT's vocabulary, 20 words, 500 tokens
    assert published == pytest.approx(273e6, rel=0.02)


@pytest.mark.slow
@torch.no_grad()
def test_the_published_canvas_gives_500_tokens() -> None:
    """Stage 1 has 160 x 160 patches, no multiple of the window."""
    pytest.importorskip("transformers")
    model = build_model("qrnet-swin-s", vocabulary_size=50, image_size=640).eval()
    assert model.grids == ((20, 20), (10, 10))
    tap = model.make_tap()
    words = torch.randint(2, 50, (1, model.max_words))
    padding = torch.zeros(1, 640, 640, dtype=torch.bool)
    padding[:, 480:] = True
    images = torch.randint(0, 256, (1, 3, 640, 640)).to(torch.uint8)
    with tap.recording():
        boxes = model(images, padding, words, torch.zeros_like(words, dtype=torch.bool))
    attention = tap.attention()
    assert boxes.isfinite().all()
    assert [tuple(key.shape) for key in attention.key] == [(1, 500, 256)] * 4
    assert attention.padding is not None
    assert attention.padding.sum() == 5 * 20 + 2 * 10


# Weights. Once, 200 MB on the disk.


def test_pretrained_swin_weights_are_taken_whole_or_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    from attbalance_ext.grounding.models.swin import SWIN_S, load_swin

    published = transformers.SwinForImageClassification(transformers.SwinConfig(**SWIN_S))
    published.save_pretrained(tmp_path)
    expected = published.swin.state_dict()
    loaded = load_swin(str(tmp_path)).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())

    config = json.loads((tmp_path / "config.json").read_text())
    del config["num_heads"]  # the default, which transformers has as a tuple
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_swin(str(tmp_path)).state_dict().keys() == expected.keys()

    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if "layers.2.blocks.5" in name)
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"vision_weights: .* lacks 1 of the model's weights: encoder\.layers\.2"):
        load_swin(str(tmp_path))


def test_weights_of_another_design_are_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from attbalance_ext.grounding.models.swin import load_swin

    transformers.SwinConfig().save_pretrained(tmp_path / "swin-t")
    with pytest.raises(UserError, match=r"depths \[2, 2, 6, 2\]; this model wants \[2, 2, 18, 2\]"):
        load_swin(str(tmp_path / "swin-t"))
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match=r"vision_weights: .* is a bert model; wanted: swin"):
        load_swin(str(tmp_path / "bert"))
    with pytest.raises(UserError, match=r"vision_weights: .* is no folder or hub id"):
        load_swin(str(tmp_path / "nothing"))
