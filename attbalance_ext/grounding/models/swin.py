"""Swin-S (Liu et al., ICCV 2021) on transformers' parts, its stages modulated by a sentence as in QRNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import SwinConfig, SwinModel

from attbalance_ext.grounding.models.dynamic_attention import DynamicAttention
from attbalance_ext.grounding.models.pretrained import load, read_config, require_design

SWIN_S: dict[str, Any] = {
    "num_channels": 3,
    "patch_size": 4,
    "embed_dim": 96,
    "depths": [2, 2, 18, 2],
    "num_heads": [3, 6, 12, 24],
    "window_size": 7,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "use_absolute_embeddings": False,
}
"""What fixes Swin-S's parameters and what they mean."""


class ModulatedSwin(nn.Module):
    """Swin-S with query-aware dynamic attention after each stage, before patch merging.

    Attention is PyTorch's scaled_dot_product_attention where transformers' Swin offers it (5.17 does, 5.0 does not).
    Stages whose maps are no multiple of the window (160 at 640 pixels) are padded inside transformers. In front of
    the neck each stage's output is normalised, as in every detector on Swin; the last one by Swin's own last norm.

    weights: a folder or hub id of a transformers Swin checkpoint with the design of :data:`SWIN_S`; None: random.

    Raises:
        UserError: the weights are of another design or not whole.
    """

    channels = (96, 192, 384, 768)

    def __init__(self, *, sentence_dim: int, weights: str | None = None, rank: int = 30) -> None:
        super().__init__()
        self.swin = load_swin(weights)
        self.attention = nn.ModuleList(
            DynamicAttention(dim, sentence_dim=sentence_dim, rank=rank) for dim in self.channels
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in self.channels[:-1])

    def forward(self, pixels: Tensor, sentence: Tensor) -> list[Tensor]:
        """pixels (B, 3, S, S) normalised, sentence (B, sentence_dim) -> maps (B, C, H, W) of strides 4, 8, 16, 32."""
        tokens, size = self.swin.embeddings(pixels)
        levels = []
        stages = self.swin.encoder.layers
        for stage, attention, norm in zip(stages, self.attention, [*self.norms, self.swin.layernorm], strict=True):
            for block in stage.blocks:
                tokens = block(tokens, size)[0]
            tokens = attention(tokens, sentence)
            levels.append(norm(tokens).transpose(1, 2).unflatten(2, size))
            if stage.downsample is not None:
                tokens = stage.downsample(tokens, size)
                size = (size[0] // 2, size[1] // 2)
        return levels


def load_swin(weights: str | None) -> SwinModel:
    """Swin-S without classifier and pooling, from a folder or hub id, or random (None)."""
    if weights is None:
        return SwinModel(SwinConfig(**SWIN_S), add_pooling_layer=False)
    config = read_config("vision_weights", weights, "swin")
    config.depths, config.num_heads = list(config.depths), list(config.num_heads)  # defaults are tuples
    require_design("vision_weights", weights, config, SWIN_S)
    return load("vision_weights", weights, SwinModel, config, add_pooling_layer=False)
