"""Small hosts built on `nn.MultiheadAttention`, and their supervised attention computed the explicit way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attbalance_ext import AttentionTerms


class Host(nn.Module):
    """Layers of x + attention(x), or x + attention(x, memory); batch-first outside whatever the layers are.

    Every parameter is random: PyTorch starts the projections' biases at zero, where a forgotten one would not show.
    """

    def __init__(
        self, *, width: int = 16, heads: int = 2, layers: int = 2, positional: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.positional = positional
        self.layers = nn.ModuleList(nn.MultiheadAttention(width, heads, **options) for _ in range(layers))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, tokens: Tensor, memory: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        """tokens (B, S, D), memory (B, M, E), padding (B, M or S) -> (B, S, D)."""
        sequence_first = not self.layers[0].batch_first
        if sequence_first:
            tokens = tokens.transpose(0, 1).contiguous()
            memory = None if memory is None else memory.transpose(0, 1).contiguous()
        for layer in self.layers:
            source = tokens if memory is None else memory
            if self.positional:
                attended, _ = layer(tokens, source, source, padding, False)
            else:
                attended, _ = layer(
                    query=tokens, key=source, value=source, key_padding_mask=padding, need_weights=False
                )
            tokens = tokens + attended
        return tokens.transpose(0, 1) if sequence_first else tokens


class Grounder(nn.Module):
    """A REG token over visual tokens through encoder layers, and a box: the smallest model one would ground with."""

    def __init__(
        self,
        *,
        tokens: int = 16,
        width: int = 16,
        heads: int = 2,
        layers: int = 2,
        dropout: float = 0.0,
        batch_first: bool = True,
        norm_first: bool = False,
    ) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.reg = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 1 + tokens, width) * 0.1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 2 * width, dropout, batch_first=batch_first, norm_first=norm_first)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 4)

    def attention_layers(self) -> list[nn.MultiheadAttention]:
        return [layer.self_attn for layer in self.layers]

    def forward(self, visual: Tensor, padding: Tensor | None = None) -> Tensor:
        """visual (B, N, D), padding (B, 1 + N) -> boxes (B, 4)."""
        tokens = torch.cat([self.reg.expand(visual.shape[0], -1, -1), visual], dim=1) + self.positions
        if not self.batch_first:
            tokens = tokens.transpose(0, 1)
        for layer in self.layers:
            tokens = layer(tokens, src_key_padding_mask=padding)
        return self.head(tokens[:, 0] if self.batch_first else tokens[0]).sigmoid()


class LayerInputs(NamedTuple):
    """The query and key tokens of one layer's call, as the layer got them."""

    query: Tensor
    key: Tensor


@contextmanager
def captured_inputs(layers: Sequence[nn.MultiheadAttention]) -> Iterator[list[LayerInputs]]:
    """Collects what the host calls the layers with, before any tap, in the order of the calls."""
    inputs: list[LayerInputs] = []

    def capture(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        query = args[0] if args else kwargs["query"]
        key = args[1] if len(args) > 1 else kwargs["key"]
        inputs.append(LayerInputs(query, key))

    handles = [layer.register_forward_pre_hook(capture, with_kwargs=True, prepend=True) for layer in layers]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def explicit_scores(layer: nn.MultiheadAttention, inputs: LayerInputs, query: int) -> Tensor:
    """The head-averaged scores (B, S) of one query token: project every token, split heads, q . k / sqrt(d), mean."""
    tokens, keys = inputs
    if not layer.batch_first:
        tokens, keys = tokens.transpose(0, 1), keys.transpose(0, 1)
    if layer.in_proj_weight is None:
        weight_q, weight_k = layer.q_proj_weight, layer.k_proj_weight
    else:
        weight_q, weight_k, _ = layer.in_proj_weight.chunk(3)
    bias_q, bias_k = (None, None) if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)[:2]
    q = F.linear(tokens, weight_q, bias_q)[:, query].unflatten(-1, (layer.num_heads, -1))
    k = F.linear(keys, weight_k, bias_k).unflatten(-1, (layer.num_heads, -1))
    return torch.einsum("bhd,bnhd->bhn", q, k).mean(1) / math.sqrt(q.shape[-1])


def explicit_map(scores: Tensor, padding: Tensor | None) -> Tensor:
    """Softmax over the tokens that are not padding."""
    return (scores if padding is None else scores.masked_fill(padding, -torch.inf)).softmax(-1)


def explicit_terms(student: Sequence[Tensor], region: Tensor, teacher: Sequence[Tensor]) -> AttentionTerms:
    """The terms as section 3 of the paper writes them, from the maps (B, N) of L layers."""
    p, t = torch.stack(list(student)), torch.stack(list(teacher)).detach()
    in_box = (p * region).sum(-1)
    out_of_box = (p * (1 - region)).sum(-1)
    rac = -in_box.log() - (1 - out_of_box).log()
    seen = t > 0
    mrc = torch.where(seen, t * (torch.where(seen, t, 1).log() - torch.where(seen, p, 1).log()), 0).sum(-1)
    return AttentionTerms(in_box, rac, mrc, (region * (p[0] > 0)).sum(-1) > 0)


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """norm(actual - truth) / norm(truth); the plain norm where the truth is 0."""
    error = torch.linalg.vector_norm(actual.double() - truth.double())
    size = torch.linalg.vector_norm(truth.double())
    return (error / size if size > 0 else error).item()
