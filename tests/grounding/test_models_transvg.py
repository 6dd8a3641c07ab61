"""TransVG at its published size, and the two branches it shares with others."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_models import (
    CANVAS,
    WORDS,
    assert_attention_is_fused,
    assert_attention_only_shows_the_same,
    assert_padding_is_invisible,
    assert_tap_reads,
    parameters_without_gradient,
    problem,
)
from torch import nn

from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.models import build_model

pytest.importorskip("transformers")
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
)
from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d
from transformers.models.resnet.modeling_resnet import ResNetConvLayer, ResNetShortCut

from attbalance_ext.grounding.models.folded import FoldedConvolution, fold
from attbalance_ext.grounding.models.text_branch import BERT_BASE, TextBranch
from attbalance_ext.grounding.models.transvg import Fusion, TransVG
from attbalance_ext.grounding.models.visual_branch import DEPTHS, DETR, OWN_BACKBONE, RESNET, VisualBranch


@pytest.fixture(scope="module")
def model() -> TransVG:
    torch.manual_seed(0)
    return build_model("transvg-r50", vocabulary_size=WORDS, image_size=CANVAS).eval()  # type: ignore[return-value]


def test_padding_changes_no_box(model: TransVG) -> None:
    assert_padding_is_invisible(model)


def test_the_tap_reads_regs_attention_to_the_visual_tokens(model: TransVG) -> None:
    assert_tap_reads(model, model.fusion.layers[-1].attention, slice(-9, None))
    assert model.grids == ((3, 3),)
    assert model.supervised == (2, 3, 4, 5)


def test_every_layer_can_be_tapped(model: TransVG) -> None:
    tap = model.make_tap(every_layer=True)
    with tap.recording(), torch.no_grad():
        model(*problem(model))
    assert len(tap.attention().key) == 6
    tap.remove()


def test_gradients_reach_every_parameter(model: TransVG) -> None:
    assert parameters_without_gradient(model) == []


def test_attention_is_fused(model: TransVG) -> None:
    assert_attention_is_fused(model)


def test_a_teacher_stops_when_all_have_attended(model: TransVG) -> None:
    ran = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in [("head", model.fusion.box_head), ("feed-forward", model.fusion.layers[-1].feedforward)]
    ]
    tap = model.make_tap()
    with tap.recording(), torch.no_grad():
        assert model(*problem(model), attention_only=True).numel() == 0
    assert len(tap.attention().key) == 4
    assert not ran
    for handle in [*handles, tap]:
        handle.remove()


def test_what_a_teacher_shows_is_the_same(model: TransVG) -> None:
    assert_attention_only_shows_the_same(model, problem(model), model.fusion.layers[-1].attention)


def test_only_reg_asks_in_the_last_layer_and_nothing_is_lost(model: TransVG) -> None:
    """Against the fusion run in full, as the paper has it."""
    fusion = model.fusion
    text, visual = torch.randn(2, 5, 768), torch.randn(2, 9, 256)
    no_words, no_image = torch.zeros(2, 5, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.bool)
    no_words[0, 3:] = no_image[1, 6:] = True
    ignored = torch.cat([torch.zeros(2, 1, dtype=torch.bool), no_words, no_image], dim=1)
    with torch.no_grad():
        tokens = torch.cat(
            [fusion.reg.expand(2, 1, -1), fusion.text_projection(text), fusion.visual_projection(visual)], dim=1
        )
        tokens = tokens.transpose(0, 1)
        positions = torch.cat([fusion.positions[:6], fusion.positions[-9:]])[:, None]
        for layer in fusion.layers:
            tokens = layer(tokens, positions, ignored)
        expected = fusion.box_head(tokens[0]).sigmoid()
        torch.testing.assert_close(fusion(text, no_words, visual, no_image), expected)


def test_positions_are_in_queries_and_keys_and_not_in_values() -> None:
    fusion = Fusion(max_words=4, visual_tokens=4, text_dim=8, visual_dim=8, dim=8, heads=2, hidden=8, layers=2).eval()
    seen: list[tuple[torch.Tensor, ...]] = []
    for layer in fusion.layers:
        layer.attention.register_forward_pre_hook(lambda module, args: seen.append(args[:3]))
    fusion(torch.randn(1, 2, 8), torch.zeros(1, 2, dtype=torch.bool), torch.randn(1, 4, 8), None)
    used = torch.cat([fusion.positions[:3], fusion.positions[5:]])
    for query, key, value in seen:
        torch.testing.assert_close(key[:, 0] - value[:, 0], used)
        torch.testing.assert_close(query, key[: len(query)])
    assert [len(query) for query, _, _ in seen] == [7, 1]


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def resnet_parameters(blocks: list[int]) -> int:
    """Convolutions of a ResNet of bottlenecks; its batch norms are frozen and count as constants."""
    total, width = 3 * 64 * 49, 64
    for stage, repeated in enumerate(blocks):
        inner = 64 * 2**stage
        first = width * inner + 9 * inner * inner + inner * 4 * inner + width * 4 * inner
        width = 4 * inner
        total += first + (repeated - 1) * (2 * width * inner + 9 * inner * inner)
    return total


POST_NORM_LAYER = 4 * linear(256, 256) + linear(256, 2048) + linear(2048, 256) + 4 * 256
BERT = 768 * (30522 + 512 + 2 + 2) + 12 * (4 * linear(768, 768) + linear(768, 3072) + linear(3072, 768) + 4 * 768)


@pytest.mark.parametrize(("name", "blocks"), [("transvg-r50", [3, 4, 6, 3]), ("transvg-r101", [3, 4, 23, 3])])
def test_parameter_counts_are_the_papers(name: str, blocks: list[int]) -> None:
    with torch.device("meta"):
        vision = resnet_parameters(blocks) + linear(2048, 256) + 6 * POST_NORM_LAYER
        model = build_model(name, vocabulary_size=30522, image_size=640)
    text_and_head = linear(768, 256) + linear(256, 256) + 2 * linear(256, 256) + linear(256, 4)
    fusion = text_and_head + 256 * (1 + 1 + 20 + 400) + 6 * POST_NORM_LAYER
    assert count(model.visual_branch) == vision
    assert count(model.text_branch) == BERT
    assert count(model.fusion) == fusion
    pooler = linear(768, 768)
    published = {"transvg-r50": 149.7e6, "transvg-r101": 149.7e6 + 18.94e6}[name]  # ResNet-101 has 18.94 million more
    assert count(model) + pooler == pytest.approx(published, rel=0.005)


def test_parts_leave_out_what_detr_freezes(model: TransVG) -> None:
    parts = model.parts()
    listed = [id(parameter) for parameters in parts.values() for parameter in parameters]
    assert sorted(listed) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    resnet = model.visual_branch.resnet
    frozen = {name for name, parameter in resnet.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert all(name.startswith(("embedder.", "encoder.stages.0.")) for name in frozen)
    assert frozen == {
        name for name, _ in resnet.named_parameters() if name.startswith(("embedder", "encoder.stages.0"))
    }


def test_batch_norm_is_frozen(model: TransVG) -> None:
    before = {name: buffer.clone() for name, buffer in model.visual_branch.resnet.named_buffers()}
    model.train()
    with torch.no_grad():
        model.visual_branch(*problem(model)[:2])
    model.eval()
    assert len(before) == 4 * 53
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.visual_branch.resnet.named_buffers())


@pytest.mark.parametrize("stride", [1, 2])
def test_a_folded_norm_is_the_norm(stride: int) -> None:
    """Of both kinds of layer: values, gradients, and the names of their state."""
    layers = nn.ModuleList([ResNetConvLayer(4, 6, stride=stride), ResNetShortCut(4, 6, stride=stride)]).double()
    for layer in layers:
        norm = DetrFrozenBatchNorm2d(6).double()
        for buffer in norm.buffers():
            buffer.uniform_(0.5, 1.5)
        layer.normalization = norm
    folded = copy.deepcopy(layers)
    fold(folded)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for layer, other in zip(layers, folded, strict=True):
        assert isinstance(other, FoldedConvolution)
        assert layer.state_dict().keys() == other.state_dict().keys()
        results = []
        for module in (layer, other):
            given = x.clone().requires_grad_()
            output = module(given)
            (output * torch.arange(output.numel()).view_as(output)).sum().backward()
            results.append((output, given.grad, module.convolution.weight.grad))
        torch.testing.assert_close(*results)


def test_maps_stay_in_low_precision_under_autocast(model: TransVG) -> None:
    seen = []
    hooks = [
        module.register_forward_hook(lambda _, args, output: seen.extend((args[0].dtype, output.dtype)))
        for stage in model.visual_branch.resnet.encoder.stages
        for module in stage.modules()
    ]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.visual_branch(*problem(model)[:2])
    for hook in hooks:
        hook.remove()
    assert set(seen) == {torch.bfloat16}


def test_random_resnet_features_keep_their_size() -> None:
    """Frozen batch norm without statistics does not normalise; 33 blocks would make of 1 what no half holds."""
    branch = VisualBranch(depth=101, image_size=CANVAS)
    images = torch.randint(0, 256, (2, 3, CANVAS, CANVAS)).to(torch.uint8)
    with torch.no_grad():
        features = branch.resnet(branch.normalise(images, None)).feature_maps[-1]
    assert 0.01 < features.std() < 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 100}, "image_size must be a multiple of 32 for a ResNet, got 100"),
        ({"image_size": 64, "max_words": 600}, "max_words must be at most 512 for BERT, got 600"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=message):
        build_model("transvg-r50", vocabulary_size=WORDS, **options)


def test_forward_at_true_size() -> None:
    model = build_model("transvg-r50", vocabulary_size=30522, image_size=640, max_words=20).eval()
    images = torch.randint(0, 256, (1, 3, 640, 640)).to(torch.uint8)
    padding = torch.zeros(1, 640, 640, dtype=torch.bool)
    padding[:, 480:] = True
    words = torch.randint(0, 30522, (1, 20))
    tap = model.make_tap()
    with tap.recording(), torch.no_grad():
        boxes = model(images, padding, words, words > 30000)
    attention = tap.attention()
    assert boxes.shape == (1, 4)
    assert attention.key[0].shape == (1, 400, 256)
    assert attention.padding is not None
    assert int(attention.padding.sum()) == 100


# Weights from folders. Every folder is written by transformers itself.


def detr_config(depth: int = 50, **changes: Any) -> DetrConfig:
    backbone = ResNetConfig(**RESNET, depths=DEPTHS[depth], out_features=["stage4"])
    return DetrConfig(**{**DETR, "num_queries": 3, "backbone_config": backbone, **OWN_BACKBONE, **changes})


@pytest.fixture(scope="module")
def detr(tmp_path_factory: pytest.TempPathFactory) -> tuple[DetrForObjectDetection, Path]:
    """A DETR as it is published, with heads, whose weights and statistics are nothing that a fresh model has."""
    torch.manual_seed(1)
    model = DetrForObjectDetection(detr_config()).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_var", "normalization.weight")):
            tensor.uniform_(0.5, 0.9)
        elif tensor.dim() == 1 and tensor.is_floating_point():
            tensor.add_(0.1 * torch.randn_like(tensor))
    folder = tmp_path_factory.mktemp("detr")
    model.save_pretrained(folder)
    return model, folder


def test_visual_branch_is_detrs_encoder(model: TransVG, detr: tuple[DetrForObjectDetection, Path]) -> None:
    """Weights, frozen statistics, positions and padding: the same tokens as transformers' DETR."""
    original, folder = detr
    branch = VisualBranch(depth=50, image_size=CANVAS, weights=str(folder)).eval()
    images, padding, _, _ = problem(model)
    padding[1, :, 60:64] = False  # DETR asks one pixel of a token, this branch all of them
    with torch.no_grad():
        expected = original(
            pixel_values=branch.normalise(images, padding), pixel_mask=(~padding).long()
        ).encoder_last_hidden_state
        visual = branch(images, padding)
        nowhere = branch(images, None)
        open_everywhere = branch(images, torch.zeros_like(padding))
    assert visual.padding is not None
    torch.testing.assert_close(visual.tokens[~visual.padding], expected[~visual.padding], rtol=1e-4, atol=1e-4)
    assert nowhere.padding is None
    torch.testing.assert_close(nowhere.tokens, open_everywhere.tokens, rtol=1e-4, atol=1e-4)
    assert visual.positions.shape == (2, 9, 256)


def bert_config(**changes: Any) -> BertConfig:
    return BertConfig(**{**BERT_BASE, "vocab_size": WORDS, **changes})


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[BertModel, Path]:
    """A BERT as it is published: with a head on top, its own weights under a prefix."""
    torch.manual_seed(2)
    model = BertForMaskedLM(bert_config()).eval()
    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    return model.bert, folder


@pytest.mark.parametrize("last_layers", [1, 4])
def test_text_branch_is_bert(model: TransVG, bert: tuple[BertModel, Path], last_layers: int) -> None:
    original, folder = bert
    branch = TextBranch(vocabulary_size=WORDS, max_words=20, weights=str(folder), last_layers=last_layers).eval()
    _, _, words, padding = problem(model)
    with torch.no_grad():
        outputs = original(words, attention_mask=(~padding).long(), output_hidden_states=True)
        features = branch(words, padding)
    expected = sum(outputs.hidden_states[-last_layers:]) / last_layers
    torch.testing.assert_close(features[~padding], expected[~padding], rtol=1e-4, atol=1e-5)
    assert features.dtype == torch.float32


def test_a_model_takes_weights_by_folder(
    detr: tuple[DetrForObjectDetection, Path], bert: tuple[BertModel, Path]
) -> None:
    model = build_model(
        "transvg-r50",
        vocabulary_size=WORDS,
        image_size=CANVAS,
        vision_weights=str(detr[1]),
        text_weights=str(bert[1]),
    )
    assert torch.equal(
        model.text_branch.bert.embeddings.word_embeddings.weight, bert[0].embeddings.word_embeddings.weight
    )
    assert torch.equal(model.visual_branch.projection.weight, detr[0].model.input_projection.weight)


def test_half_precision_weights_become_float32(bert: tuple[BertModel, Path], tmp_path: Path) -> None:
    copy.deepcopy(bert[0]).half().save_pretrained(tmp_path)
    branch = TextBranch(vocabulary_size=WORDS, max_words=20, weights=str(tmp_path))
    assert {parameter.dtype for parameter in branch.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("config", "option", "message"),
    [
        (
            BertConfig(vocab_size=WORDS, **{**BERT_BASE, "num_hidden_layers": 6}),
            "text_weights",
            "num_hidden_layers 6; .*wants 12",
        ),
        (BertConfig(vocab_size=30522, **BERT_BASE), "text_weights", f"vocab_size 30522; .*wants {WORDS}"),
        (detr_config(), "text_weights", "is a detr model; wanted: bert"),
        (detr_config(101), "vision_weights", r"depths \[3, 4, 23, 3\]; .*wants \[3, 4, 6, 3\]"),
        (detr_config(encoder_ffn_dim=1024), "vision_weights", "encoder_ffn_dim 1024; .*wants 2048"),
        (DetrConfig(), "vision_weights", "backbone of type .*revision no_timm"),
        (bert_config(), "vision_weights", "is a bert model; wanted: detr"),
    ],
)
def test_weights_of_another_design_are_refused(config: Any, option: str, message: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with torch.device("meta"), pytest.raises(UserError, match=f"{option}: .*{message}"):
        build_model("transvg-r50", vocabulary_size=WORDS, image_size=CANVAS, **{option: str(tmp_path)})


@pytest.mark.parametrize("option", ["vision_weights", "text_weights"])
def test_a_folder_without_a_model_is_refused(option: str, tmp_path: Path) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=f"{option}: .* is no folder or hub id"):
        build_model("transvg-r50", vocabulary_size=WORDS, image_size=CANVAS, **{option: str(tmp_path)})


def test_missing_weights_are_named_and_never_left_random(bert: tuple[BertModel, Path], tmp_path: Path) -> None:
    whole = bert[0].state_dict()
    lost = "encoder.layer.7.output.dense.weight"
    bert[0].save_pretrained(tmp_path, state_dict={name: value for name, value in whole.items() if name != lost})
    with pytest.raises(UserError, match=f"text_weights: .* lacks 1 of the model's weights: {lost}"):
        TextBranch(vocabulary_size=WORDS, max_words=20, weights=str(tmp_path))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    bert_config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"text_weights: the weights of .* cannot be read"):
        TextBranch(vocabulary_size=WORDS, max_words=20, weights=str(tmp_path))


def test_weights_can_name_a_revision(tmp_path: Path) -> None:
    from attbalance_ext.grounding.hub import address

    (tmp_path / "a@b").mkdir()
    assert address("facebook/detr-resnet-50@no_timm") == ("facebook/detr-resnet-50", "no_timm")
    assert address("bert-base-uncased") == ("bert-base-uncased", None)
    assert address(str(tmp_path / "a@b")) == (str(tmp_path / "a@b"), None)
