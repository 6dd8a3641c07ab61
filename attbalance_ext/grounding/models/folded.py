"""Convolutions with the frozen batch norm behind them folded into their weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.resnet.modeling_resnet import ResNetConvLayer, ResNetShortCut

EPSILON = 1e-5
"""Of DETR's frozen batch norm."""


class FoldedConvolution(nn.Module):
    """Convolution, frozen batch norm and activation of one of transformers' ResNet layers, with its names of state.

    Frozen, the norm multiplies each channel by a constant and adds another. Both go into the convolution's weights in
    every forward pass, which are far smaller than the maps. On its own the norm would pass each map three times (twice
    forward, once backward) and, its constants being float32, turn all maps to float32 under autocast.
    """

    def __init__(self, layer: ResNetConvLayer | ResNetShortCut) -> None:
        super().__init__()
        if isinstance(layer.normalization, nn.BatchNorm2d):
            raise TypeError("a batch norm that is not frozen cannot be folded")
        self.convolution: nn.Conv2d = layer.convolution
        self.normalization = layer.normalization
        self.activation: nn.Module = getattr(layer, "activation", nn.Identity())  # a short cut has none

    def forward(self, x: Tensor) -> Tensor:
        norm, convolution = self.normalization, self.convolution
        scale = norm.weight * (norm.running_var + EPSILON).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        weight = convolution.weight * scale[:, None, None, None]
        return self.activation(F.conv2d(x, weight, bias, convolution.stride, convolution.padding))


def fold(module: nn.Module) -> None:
    """Fold every norm inside of ``module``."""
    for name, child in module.named_children():
        if isinstance(child, ResNetConvLayer | ResNetShortCut):
            module.add_module(name, FoldedConvolution(child))
        else:
            fold(child)
