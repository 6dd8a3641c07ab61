"""The supervised attention: one object query against the visual tokens, before softmax."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attbalance_ext.kernels.attention_terms import reference

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LARGEST_SCALE = torch.finfo(torch.float32).max


def require_floating(name: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` unless ``tensor`` is a float32, bfloat16, float16 or float64 tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


@dataclass(frozen=True, eq=False)
class QueryAttention:
    """One object query against the visual tokens, before softmax, in L layers.

    The supervised score of token j is ``scale * (query . key_j)``: with queries and keys of full width ``D = H * d``
    and ``scale = 1 / (H * sqrt(d))`` it is the pre-softmax attention averaged over the H heads (AttBalance, section 3).

    Args:
        query: L tensors (B, D), or one tensor for L = 1.
        key: L tensors (B, N, D), or one tensor for L = 1. Any layout whose last dimension is contiguous is read in
            place.
        scale: multiplies ``q . k``; one number for every layer, or L numbers.
        padding: (B, N) bool, True = ignore. A tap fills it from the host's own mask.

    float32, bfloat16, float16 and float64 are accepted, also mixed.

    Raises:
        TypeError: a tensor is not floating (``padding``: not bool), or is not a tensor.
        ValueError: wrong rank or shape, layers that do not share B, N and D, a mix of devices, or a scale that is not
            finite in float32.
    """

    query: tuple[Tensor, ...]
    key: tuple[Tensor, ...]
    scale: tuple[float, ...]
    padding: Tensor | None = None
    # See `with_offset`. No argument: a copy with another query or key must not keep it.
    offset: tuple[Tensor | None, ...] = field(init=False, default=())

    def __init__(
        self,
        query: Tensor | Sequence[Tensor],
        key: Tensor | Sequence[Tensor],
        scale: float | Sequence[float],
        padding: Tensor | None = None,
    ) -> None:
        queries, keys = _layers("query", query), _layers("key", key)
        if len(queries) != len(keys):
            raise ValueError(f"query and key must hold one tensor a layer: got {len(queries)} and {len(keys)}")
        scales = _scales(scale, len(keys))
        if len(scales) != len(keys):
            raise ValueError(f"scale must be one number or {len(keys)} (one a layer), got {len(scales)}")
        _check_layers(queries, keys)
        if padding is not None:
            check_padding("padding", padding, keys)
        object.__setattr__(self, "query", queries)
        object.__setattr__(self, "key", keys)
        object.__setattr__(self, "scale", scales)
        object.__setattr__(self, "padding", padding)
        object.__setattr__(self, "offset", (None,) * len(keys))

    @classmethod
    def from_heads(
        cls,
        query: Tensor | Sequence[Tensor],
        key: Tensor | Sequence[Tensor],
        scaling: float | None = None,
        padding: Tensor | None = None,
    ) -> QueryAttention:
        """Build from per-head queries and keys, as fused attention receives them.

        Args:
            query: L tensors (B, H, d), or one tensor: the object query, all heads.
            key: L tensors (B, H, N, d), or one tensor. A transposed view of (B, N, H, d) storage is not copied.
            scaling: what the host multiplies ``q_h . k_h`` by; default ``1 / sqrt(d)``.
            padding: (B, N) bool, True = ignore.
        """
        queries, keys = _layers("query", query), _layers("key", key)
        for name, tensors, rank, form in (("query", queries, 3, "(B, H, d)"), ("key", keys, 4, "(B, H, N, d)")):
            for layer, tensor in enumerate(tensors):
                require_floating(f"{name}[{layer}]", tensor)
                if tensor.dim() != rank:
                    raise ValueError(f"{name}[{layer}] must be {form}, got shape {tuple(tensor.shape)}")
                if tensor.shape[1] == 0 or tensor.shape[-1] == 0:
                    raise ValueError(
                        f"{name}[{layer}] needs at least one head and one channel, got {tuple(tensor.shape)}"
                    )
        if len(queries) != len(keys):
            raise ValueError(f"query and key must hold one tensor a layer: got {len(queries)} and {len(keys)}")
        for layer, (q, k) in enumerate(zip(queries, keys, strict=True)):
            if (k.shape[0], k.shape[1], k.shape[3]) != tuple(q.shape):
                raise ValueError(
                    f"key[{layer}] must be (B, H, N, d) with the (B, H, d) = {tuple(q.shape)} of query[{layer}], "
                    f"got shape {tuple(k.shape)}"
                )
        scales = []
        for q in queries:
            heads, width = q.shape[1], q.shape[2]
            scales.append((1 / math.sqrt(width) if scaling is None else scaling) / heads)
        return cls([q.flatten(1) for q in queries], [k.transpose(1, 2).flatten(2) for k in keys], scales, padding)

    def last(self, n: int) -> QueryAttention:
        """The last ``n`` of the L layers (the paper supervises the last 4 of 6)."""
        if not 0 <= n <= len(self.key):
            raise ValueError(f"n must be between 0 and the {len(self.key)} recorded layers, got {n}")
        first = len(self.key) - n
        last = QueryAttention(self.query[first:], self.key[first:], self.scale[first:], self.padding)
        return with_offset(last, self.offset[first:])


def with_offset(attention: QueryAttention, offset: Sequence[Tensor | None]) -> QueryAttention:
    """The same attention, whose keys' gradients are taken in factors (for taps).

    offset: L of (B, N) zeros that require grad, or None. Where there is one, the kernels of :func:`attention_terms`
    give it the gradient g_j by ``query . key_j``, and the key none; whoever made it adds ``g_j query`` to the key's.
    """
    if all(zeros is None for zeros in offset):
        return attention
    made = copy.copy(attention)
    object.__setattr__(made, "offset", tuple(offset))
    return made


def attention_map(attention: QueryAttention, key_padding_mask: Tensor | None = None) -> Tensor:
    """The supervised attention map itself: softmax over the visual tokens, (L, B, N), for pictures and analysis.

    Args:
        attention: the L recorded layers.
        key_padding_mask: (B, N) bool, True = ignore; overrides ``attention.padding``.

    Returns:
        (L, B, N) float32 (float64 for float64 inputs). 0 at padded tokens; all 0 where every token is padding.
    """
    if not isinstance(attention, QueryAttention):
        raise TypeError(f"attention must be a QueryAttention, got {type(attention).__name__}")
    if not attention.key:
        raise ValueError("attention has no layers")
    padding = attention.padding
    if key_padding_mask is not None:
        check_padding("key_padding_mask", key_padding_mask, attention.key)
        padding = key_padding_mask
    dtype = accumulation_dtype(attention)
    query = [q.to(dtype) for q in attention.query]
    return reference.attention_map(query, attention.key, attention.scale, padding)


def accumulation_dtype(attention: QueryAttention) -> torch.dtype:
    """float64 where a query or key is float64, else float32: the dtype of all arithmetic and all terms."""
    dtypes = [t.dtype for t in attention.query + attention.key]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check_padding(name: str, padding: Tensor, keys: Sequence[Tensor]) -> None:
    """Raise unless ``padding`` is a (B, N) bool tensor on the keys' device."""
    if not isinstance(padding, Tensor):
        raise TypeError(f"{name} must be a bool tensor (B, N), got {type(padding).__name__}")
    if padding.dtype != torch.bool:
        raise TypeError(f"{name} must be bool (True = ignore), got {padding.dtype}")
    if not keys:
        return
    expected = tuple(keys[0].shape[:2])
    if tuple(padding.shape) != expected:
        raise ValueError(f"{name} must be (B, N) = {expected} like the keys, got shape {tuple(padding.shape)}")
    if padding.device != keys[0].device:
        raise ValueError(f"{name} must be on {keys[0].device} like the keys, got {padding.device}")


def _layers(name: str, tensors: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    if isinstance(tensors, Tensor):
        return (tensors,)
    if not isinstance(tensors, Iterable):
        raise TypeError(f"{name} must be a tensor or a sequence of L tensors, got {type(tensors).__name__}")
    return tuple(tensors)


def _scales(scale: float | Sequence[float], layers: int) -> tuple[float, ...]:
    try:
        if isinstance(scale, Sequence):
            factors = tuple(float(factor) for factor in scale)
        else:
            factors = (float(scale),) * layers  # whatever counts as a number, NumPy's included
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"scale must be a number or a sequence of L numbers, got {scale!r}") from None
    # Some kernels multiply with it in float32, others in float64: beyond this they would differ.
    if not all(abs(factor) <= _LARGEST_SCALE for factor in factors):
        raise ValueError(f"scale must be finite in float32, got {scale!r}")
    return factors


def _check_layers(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
    for layer, (q, k) in enumerate(zip(queries, keys, strict=True)):
        require_floating(f"query[{layer}]", q)
        require_floating(f"key[{layer}]", k)
        if q.dim() != 2:
            raise ValueError(f"query[{layer}] must be (B, D), got shape {tuple(q.shape)}")
        if k.dim() != 3:
            raise ValueError(f"key[{layer}] must be (B, N, D), got shape {tuple(k.shape)}")
        if k.shape[0] != q.shape[0] or k.shape[2] != q.shape[1]:
            raise ValueError(
                f"key[{layer}] must be (B, N, D) with the (B, D) = {tuple(q.shape)} of query[{layer}], "
                f"got shape {tuple(k.shape)}"
            )
        if k.shape[1] == 0 or k.shape[2] == 0:
            raise ValueError(f"key[{layer}] needs at least one token and one channel, got shape {tuple(k.shape)}")
        if k.shape != keys[0].shape:
            raise ValueError(
                f"all layers share B, N and D: key[0] is {tuple(keys[0].shape)}, key[{layer}] is {tuple(k.shape)}"
            )
        if q.device != keys[0].device or k.device != keys[0].device:
            raise ValueError(
                f"query and key must be on one device: key[0] is on {keys[0].device}, "
                f"query[{layer}] on {q.device}, key[{layer}] on {k.device}"
            )
