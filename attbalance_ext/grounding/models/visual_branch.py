"""The visual branch of TransVG and VLTVG: a ResNet and the encoder of DETR (Carion et al., ECCV 2020)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DetrConfig, DetrModel, PretrainedConfig, ResNetBackbone, ResNetConfig

from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.models.folded import fold
from attbalance_ext.grounding.models.layers import PostNormLayer, token_padding, trainable, xavier
from attbalance_ext.grounding.models.pixels import Normalisation
from attbalance_ext.grounding.models.pretrained import load, read_config, require_design

DEPTHS = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}
"""Bottleneck blocks per stage of each ResNet."""

DETR = {
    "d_model": 256,
    "encoder_layers": 6,
    "encoder_attention_heads": 8,
    "encoder_ffn_dim": 2048,
    "activation_function": "relu",
    "position_embedding_type": "sine",
}
RESNET = {
    "embedding_size": 64,
    "hidden_sizes": [256, 512, 1024, 2048],
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}
OWN_BACKBONE = {"use_timm_backbone": False, "use_pretrained_backbone": False}
"""What transformers 5.0 has to be told for a ResNet of its own that it is not to fetch weights for."""


class VisualTokens(NamedTuple):
    """An image as tokens on a grid, row-major."""

    tokens: Tensor
    """(B, N, D)"""
    positions: Tensor
    """(B or 1, N, D): the fixed positions that attention adds to queries and keys."""
    padding: Tensor | None
    """(B, N) bool, True = ignore; None: no token is padding."""


class Shared(NamedTuple):
    """Images on their way through the branch, as far as nothing trains."""

    features: Tensor
    """(B, C, H, W)"""
    done: int
    """How many of the branch's convolutional parts they have passed."""


class VisualBranch(nn.Module):
    """ResNet (stride 32), 1 x 1 convolution to 256 channels, six encoder layers.

    The ResNet is transformers', with DETR's frozen batch norm (folded into the convolutions, see
    :class:`FoldedConvolution`), and as in DETR its stem and first stage never train.
    The encoder layers are ours: those of transformers materialise attention weights in some versions, and ask the
    host in each layer whether everything is finite. They take the same weights.

    Args:
        depth: of the ResNet, 50 or 101.
        image_size: side of the canvas, a multiple of 32.
        weights: folder or hub id (``id@revision`` too) of a DETR checkpoint of this design whose backbone is
            transformers' own ResNet, not timm's: ``facebook/detr-resnet-50@no_timm`` is one. None: random weights.

    Raises:
        UserError: another image size, weights of another design or not whole.
    """

    dim = 256
    stride = 32

    def __init__(self, *, depth: int, image_size: int, weights: str | None = None, dropout: float = 0.1) -> None:
        super().__init__()
        if image_size <= 0 or image_size % self.stride:
            raise UserError(f"image_size must be a multiple of {self.stride} for a ResNet, got {image_size}")
        self.grid = (image_size // self.stride, image_size // self.stride)
        detr = _detr(depth, weights)
        self.normalise = Normalisation()
        self.resnet = getattr(detr.backbone, "conv_encoder", detr.backbone).model  # 5.0 has conv_encoder
        self.resnet.requires_grad_(True)
        self.resnet.embedder.requires_grad_(False)
        self.resnet.encoder.stages[0].requires_grad_(False)
        fold(self.resnet)
        self.projection = detr.input_projection
        self.layers = nn.ModuleList(PostNormLayer(self.dim, 8, 2048, dropout) for _ in detr.encoder.layers)
        if weights is None:
            _tame(self.resnet)
            xavier(self.layers)
        else:
            for layer, source in zip(self.layers, detr.encoder.layers, strict=True):
                layer.load_state_dict(_from_detr(source.state_dict()))

    def convolutions(self) -> list[nn.Module]:
        """The parts that images pass before the encoder layers. None of them knows training from evaluation."""
        return [self.resnet.embedder, *self.resnet.encoder.stages, self.projection]

    @torch.no_grad()
    def share(self, images: Tensor, padding: Tensor | None) -> Shared:
        """Images behind the last part before which, and in which, nothing trains; arguments as in :meth:`forward`."""
        features, done = self.normalise(images, padding), 0
        for part in self.convolutions():
            if trainable(part):
                break
            features, done = part(features), done + 1
        return Shared(features, done)

    def forward(self, images: Tensor | Shared, padding: Tensor | None) -> VisualTokens:
        """images (B, 3, S, S) uint8, or shared; padding (B, S, S) bool, True where there is no image, or None."""
        features, done = images if isinstance(images, Shared) else (self.normalise(images, padding), 0)
        for part in self.convolutions()[done:]:
            features = part(features)
        ignored = None if padding is None else token_padding(padding, self.grid)
        positions = detr_positions(ignored, self.grid, self.dim, features.device)
        tokens, along = features.flatten(2).permute(2, 0, 1), positions.transpose(0, 1)
        for layer in self.layers:
            tokens = layer(tokens, along, ignored)
        return VisualTokens(tokens.transpose(0, 1), positions, ignored)


def detr_positions(padding: Tensor | None, grid: tuple[int, int], dim: int, device: torch.device) -> Tensor:
    """DETR's fixed 2-D sine positions, (B, N, dim), or (1, N, dim) without padding (B, N).

    The first half of the channels says y, the other x, from 0 to 2 pi over the rows and columns that show the image;
    sine and cosine alternate, at wavelengths from 2 pi to 10000 * 2 pi.
    """
    height, width = grid
    shown = torch.ones(1, height, width, device=device) if padding is None else (~padding).float().unflatten(1, grid)
    frequency = 10000 ** (-torch.arange(0, dim // 2, 2, device=device) / (dim // 2))
    halves = []
    for axis in (1, 2):
        place = shown.cumsum(axis)
        last = place.select(axis, -1).unsqueeze(axis)
        angle = (place / (last + 1e-6) * 2 * math.pi)[..., None] * frequency
        halves.append(torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2))
    return torch.cat(halves, dim=-1).flatten(1, 2)


def _detr(depth: int, weights: str | None) -> DetrModel:
    """A DETR without decoder."""
    if weights is None:
        backbone = ResNetConfig(**RESNET, depths=DEPTHS[depth], out_features=["stage4"])
        return DetrModel(DetrConfig(**DETR, **OWN_BACKBONE, decoder_layers=0, backbone_config=backbone))
    config: PretrainedConfig = read_config("vision_weights", weights, "detr")
    require_design("vision_weights", weights, config, DETR)
    found = getattr(config.backbone_config, "model_type", None)
    if found != "resnet":
        raise UserError(
            f"vision_weights: {weights!r} has a backbone of type {found!r}; this model wants transformers' 'resnet', "
            "as the revision no_timm of the published DETR has it (facebook/detr-resnet-50@no_timm)"
        )
    require_design("vision_weights", weights, config.backbone_config, {**RESNET, "depths": DEPTHS[depth]})
    config.decoder_layers = 0
    config.use_pretrained_backbone = False
    return load("vision_weights", weights, DetrModel, config)


def _tame(resnet: ResNetBackbone) -> None:
    """Let random features keep their size: each residual branch adds a block's share of the variance.

    Frozen batch norm does not normalise what has no statistics yet, and the variance would double with every block.
    """
    blocks = [block for stage in resnet.encoder.stages for block in stage.layers]
    for block in blocks:
        block.layer[-1].normalization.weight.fill_(len(blocks) ** -0.5)


def _from_detr(source: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of transformers' DetrEncoderLayer as one of :class:`PostNormLayer`."""
    # transformers 5.0 says out_proj for o_proj, and has fc1 and fc2 outside of mlp
    source = {name.replace("out_proj", "o_proj").replace("mlp.", ""): value for name, value in source.items()}
    state = {}
    for kind in ("weight", "bias"):
        state[f"attention.in_proj_{kind}"] = torch.cat([source[f"self_attn.{part}_proj.{kind}"] for part in "qkv"])
        state[f"attention.out_proj.{kind}"] = source[f"self_attn.o_proj.{kind}"]
        state[f"norm_attention.{kind}"] = source[f"self_attn_layer_norm.{kind}"]
        state[f"feedforward.inner.{kind}"] = source[f"fc1.{kind}"]
        state[f"feedforward.outer.{kind}"] = source[f"fc2.{kind}"]
        state[f"feedforward.norm.{kind}"] = source[f"final_layer_norm.{kind}"]
    return state
