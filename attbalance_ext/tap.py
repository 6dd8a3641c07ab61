"""Reads one object query's attention out of `nn.MultiheadAttention` layers without asking them for weights.

With keys k_j = W_k x_j + b_k the score q . k_j is (W_k^T q) . x_j plus a constant that the softmax drops. So the
layer's input x serves as the key and u = W_k^T (W_q x_query + b_q) as the query: no projection is recomputed for the
N tokens, and the host keeps its fused attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attbalance_ext.key_gradient import Interposed, interpose
from attbalance_ext.recorder import Recorder, in_backward
from attbalance_ext.sharding import is_unit
from attbalance_ext.tokens import SeveralTokens, Tokens

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class AttentionTap(Recorder):
    """Records the object query's attention in chosen `nn.MultiheadAttention` layers.

    ::

        tap = AttentionTap([layer.self_attn for layer in encoder.layers], query=0, visual=slice(21, 421))
        with tap.recording():
            output = model(images, sentences)
        attention = tap.attention()

    Which of several queries finds the object may be known after the forward pass only::

        tap = AttentionTap([layer.multihead_attn for layer in decoder.layers], query=slice(0, 100))
        with tap.recording():
            boxes = model(images, sentences)
        attention = tap.attention(query=matched(boxes))  # (B,) int64

    Gradients reach the layer's input and its query and key projections, as if the attention were computed explicitly.
    The hooks stay on the modules until :meth:`remove`. Deep copies and pickles of the model carry inert ones, and a
    copy of the tap itself counts as removed: tap the copy anew. The layers' ``key_padding_mask`` becomes the
    recording's one ``padding``; an ``attn_mask`` is not read. Layers that hide different visual tokens are refused by
    :meth:`attention` with ``ValueError``; on a GPU, where the host does not wait, their samples become NaN.
    While it records, a layer is given a view of its key in the key's place (where the key requires grad): nobody may
    write to it in place, and PyTorch says so. Through that view the gradient of the keys comes back, not through the
    recording's own ``key``, which gets none from `attention_terms`.
    Not valid for hosts with rotary embeddings inside attention: there, build :class:`QueryAttention` from q and k, or
    tap a Hugging Face model with `attbalance_ext.integrations.transformers.TransformersTap`.

    `torch.compile`: tap a model before its first compiled call, since compiled code does not notice hooks that come
    later. Activation checkpointing needs ``use_reentrant=False``; inside ``fullgraph=True`` also
    ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True``, as PyTorch's own message says, since
    a recording is a side effect.

    FSDP2: apply `fully_shard` to the blocks around the tapped layers (and the model), not to the tapped layers
    themselves. Their parameters are gathered again when the gradient of a block's output arrives, so the loss must
    depend on that output too, as any box loss does; for a loss of attention alone give the blocks
    ``reshard_after_forward=False``.

    Args:
        modules: the L attention layers in order, sequence- or batch-first, self- or cross-attention.
        query, visual: the object query among the layer's query tokens, and which of its key tokens are the visual ones,
            as :class:`Recorder` says.

    Raises:
        TypeError: a module is not `nn.MultiheadAttention`, or ``query`` or ``visual`` is none of these.
        ValueError: no modules, one module twice, or an index that names no token or a token twice.

    :meth:`recording` raises ``ValueError`` also for input that is not batched, for nested input where ``query`` or
    ``visual`` counts from the end, and for a tapped layer that `fully_shard` was applied to by itself.
    """

    def __init__(
        self,
        modules: Sequence[nn.MultiheadAttention],
        *,
        query: int | SeveralTokens = 0,
        visual: SeveralTokens = slice(None),
    ) -> None:
        chosen = _layers(modules)
        super().__init__(chosen, query=query, visual=visual)
        self._interposed: list[Interposed | None] = [None] * len(chosen)
        for position, module in enumerate(chosen):
            self.handles += [
                module.register_forward_pre_hook(partial(self._interpose, position), with_kwargs=True),
                module.register_forward_hook(partial(self._observe, position), with_kwargs=True),
            ]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_interposed": [None] * len(self._interposed)}

    def _forget(self) -> None:
        self._interposed = [None] * len(self._interposed)

    def _interpose(
        self, position: int, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Arguments | None:
        """Before a recorded layer: let its key's gradient come back in factors."""
        # Not in compiled code, where a function of our own breaks the graph inside of a checkpointed region, and the
        # sizes it notes down cost a compilation each. Not in a recomputation, whose graph only hands out saved tensors.
        if torch.compiler.is_compiling() or not self.listening:
            return None
        query, key = _query_and_key(args, kwargs)
        if not isinstance(key, Tensor) or key.dim() != 3 or key.is_nested:
            return None
        if not (key.requires_grad and torch.is_grad_enabled()):
            return None
        tokens = key.shape[1 if module.batch_first else 0]
        self._visual.check(tokens, "key")
        if query is key:
            self._queries.check(tokens, "query")
        queries = self._queries if query is key else None
        interposed = interpose(key, self._visual, _dtype(module), queries=queries, batch_first=module.batch_first)
        self._interposed[position] = interposed
        # Wherever the layer was given this tensor: whether query, key and value are one decides how it projects them.
        return (
            tuple(interposed.passed if argument is key else argument for argument in args),
            {name: interposed.passed if argument is key else argument for name, argument in kwargs.items()},
        )

    def _observe(
        self,
        position: int,
        module: nn.MultiheadAttention,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        if not self._attached:
            return
        if not self._recording:
            # With gradients on, compute all the same: recomputation under activation checkpointing must meet the same
            # graph as the recorded forward pass. What cannot be read is the host's own business.
            if torch.is_grad_enabled():
                with suppress(ValueError):
                    self._read(module, args, kwargs, None)
            return
        interposed, self._interposed[position] = self._interposed[position], None
        if interposed is not None and _query_and_key(args, kwargs)[1] is not interposed.passed:
            interposed = None  # another hook has exchanged the key
        query, key, padding = self._read(module, args, kwargs, interposed)
        if in_backward():
            return
        scale = 1 / (module.num_heads * math.sqrt(module.embed_dim // module.num_heads))
        self._keep(position, module, query=query, key=key, scale=scale, padding=padding, interposed=interposed)

    def _read(
        self,
        module: nn.MultiheadAttention,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        interposed: Interposed | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The folded queries, (B, D) or (B, Q, D), all key tokens (B, S, D), and the padding as the layer got it."""
        if is_unit(module):  # its parameters would be gone when the recording's backward pass needs them
            raise ValueError(
                "fully_shard was applied to a tapped layer by itself: apply it to the block around the layer"
            )
        query, key = _query_and_key(args, kwargs)
        if not isinstance(query, Tensor) or not isinstance(key, Tensor):
            raise ValueError(
                f"a tapped layer is called as forward(query, key, value, ...), not as {type(module).__name__} was"
            )
        rows = interposed.rows if interposed is not None and query is interposed.passed else None
        padding = args[3] if len(args) > 3 else kwargs.get("key_padding_mask")
        if query.is_nested or key.is_nested:
            query, key, padding = _unnest(query, key, self._queries, self._visual)
        elif query.dim() != 3:
            raise ValueError(f"a tapped layer needs batched input (3-D), got shape {tuple(query.shape)}")
        elif not module.batch_first:
            query, key = query.transpose(0, 1), key.transpose(0, 1)
        self._queries.check(query.shape[1], "query")
        self._visual.check(key.shape[1], "key")
        return _fold_projections(module, self._queries.of(query) if rows is None else rows), key, padding


def _layers(modules: Any) -> list[nn.MultiheadAttention]:
    several = isinstance(modules, (nn.ModuleList, nn.Sequential)) or not isinstance(modules, nn.Module)
    if not several or not isinstance(modules, Iterable):
        raise TypeError(
            f"modules must be a sequence of nn.MultiheadAttention, got {type(modules).__name__}: give the layers "
            "to supervise, for example [layer.self_attn for layer in encoder.layers]"
        )
    chosen = list(modules)
    for position, module in enumerate(chosen):
        if not isinstance(module, nn.MultiheadAttention):
            inside = _attributes(module)
            hint = f": did you mean its {' or '.join(inside)}?" if inside else ""
            raise TypeError(f"modules[{position}] must be nn.MultiheadAttention, got {type(module).__name__}{hint}")
    return chosen


def _attributes(module: Any) -> list[str]:
    """Where the module itself has its attention."""
    children = module.named_children() if isinstance(module, nn.Module) else ()
    return [f".{name}" for name, child in children if isinstance(child, nn.MultiheadAttention)]


def _query_and_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return args[0] if args else kwargs.get("query"), args[1] if len(args) > 1 else kwargs.get("key")


def _dtype(module: nn.MultiheadAttention) -> torch.dtype:
    """Of the folded query: float32, or float64 for float64 weights."""
    weight = module.in_proj_weight if module._qkv_same_embed_dim else module.q_proj_weight
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _fold_projections(module: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """u = W_k^T (W_q x + b_q) of (..., D), in float32 (float64 for float64 weights) whatever autocast says."""
    width = module.embed_dim
    if module._qkv_same_embed_dim:
        weight_q, weight_k, _ = module.in_proj_weight.split(width)  # one node, where gradients of slices need two
    else:
        weight_q, weight_k = module.q_proj_weight, module.k_proj_weight
    bias_q = None if module.in_proj_bias is None else module.in_proj_bias[:width]
    dtype = _dtype(module)
    with torch.autocast(x.device.type, enabled=False):
        q = F.linear(x.to(dtype), weight_q.to(dtype), None if bias_q is None else bias_q.to(dtype))
        return q @ weight_k.to(dtype)


def _unnest(query: Tensor, key: Tensor, queries: Tokens, visual: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Dense (B, S, D) query and key and the (B, S) padding of nested ones (the encoder's fast path in eval mode).

    A nested batch has forgotten how long its padded form was. Only the end of ``visual`` can restore that, so whatever
    counts from the end is refused: it would mean other tokens from batch to batch.
    """
    if queries.end is None or visual.end is None:
        raise ValueError(
            "nested input has forgotten its padded length: give query and both ends of visual counted from the start, "
            f"got query={queries}, visual={visual}; or build nn.TransformerEncoder with enable_nested_tensor=False"
        )
    lengths = [row.shape[0] for row in key.unbind()]
    tokens = max([*lengths, visual.end])
    dense_query = query.to_padded_tensor(0.0)
    dense_key = key.to_padded_tensor(0.0, (key.size(0), tokens, key.size(2)))
    padding = torch.arange(tokens, device=key.device) >= torch.tensor(lengths, device=key.device)[:, None]
    return dense_query, dense_key, padding
