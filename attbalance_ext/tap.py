"""Reads one object query's attention out of `nn.MultiheadAttention` layers without asking them for weights.

With keys k_j = W_k x_j + b_k the score q . k_j is (W_k^T q) . x_j plus a constant that the softmax drops. So the
layer's input x serves as the key and u = W_k^T (W_q x_query + b_q) as the query: no projection is recomputed for the
N tokens, and the host keeps its fused attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attbalance_ext.attention import QueryAttention, with_offset
from attbalance_ext.key_gradient import Interposed, interpose
from attbalance_ext.sharding import is_unit

# A float mask is added to the scores: below this a token's probability underflows to 0, whatever finite stand-in
# for -inf the host uses.
_MASKED = -1e4

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Record(NamedTuple):
    query: Tensor  # u, (B, D)
    key: Tensor  # x, (B, N, D)
    scale: float
    padding: Tensor | None
    offset: Tensor | None = None  # (B, N) zeros, takes the key's gradient


class AttentionTap:
    """Records the object query's attention in chosen `nn.MultiheadAttention` layers.

    ::

        tap = AttentionTap([layer.self_attn for layer in encoder.layers], query=0, visual=slice(21, 421))
        with tap.recording():
            output = model(images, sentences)
        attention = tap.attention()

    Gradients reach the layer's input and its query and key projections, as if the attention were computed explicitly.
    The hooks stay on the modules until :meth:`remove`. Deep copies and pickles of the model carry inert ones, and a
    copy of the tap itself counts as removed: tap the copy anew. The layers' ``key_padding_mask`` becomes the
    recording's ``padding``; an ``attn_mask`` is not read.
    While it records, a layer is given a view of its key in the key's place (where the key requires grad): nobody may
    write to it in place, and PyTorch says so. Through that view the gradient of the keys comes back, not through the
    recording's own ``key``, which gets none from `attention_terms`.
    Not valid for hosts with rotary embeddings inside attention: there, build :class:`QueryAttention` from q and k.

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
        query: index of the object query among the layer's query tokens.
        visual: which of the layer's key tokens are the visual ones, in the grids' order.

    Raises:
        TypeError: a module is not `nn.MultiheadAttention`, or ``query`` / ``visual`` is not an int / slice.
        ValueError: no modules, or one module twice.
    """

    def __init__(
        self, modules: Sequence[nn.MultiheadAttention], *, query: int = 0, visual: slice = slice(None)
    ) -> None:
        if isinstance(modules, nn.MultiheadAttention):
            raise TypeError("modules must be a sequence of nn.MultiheadAttention, got MultiheadAttention")
        modules = list(modules)
        if not modules:
            raise ValueError("modules is empty: give the nn.MultiheadAttention layers to supervise")
        for position, module in enumerate(modules):
            if not isinstance(module, nn.MultiheadAttention):
                raise TypeError(f"modules[{position}] must be nn.MultiheadAttention, got {type(module).__name__}")
        if len(set(map(id, modules))) != len(modules):
            raise ValueError("modules names one layer twice; a layer that runs several times cannot be tapped")
        if not isinstance(query, int):
            raise TypeError(f"query must be an int, got {type(query).__name__}")
        if not isinstance(visual, slice):
            raise TypeError(f"visual must be a slice, got {type(visual).__name__}")
        self._query, self._visual = query, visual
        self._attached = True
        self._recording = False
        self._records: list[_Record | None] = [None] * len(modules)
        self._interposed: list[Interposed | None] = [None] * len(modules)
        self._handles = [
            handle
            for position, module in enumerate(modules)
            for handle in (
                module.register_forward_pre_hook(partial(self._interpose, position), with_kwargs=True),
                module.register_forward_hook(partial(self._observe, position), with_kwargs=True),
            )
        ]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward pass that runs inside; what was recorded before and not fetched is dropped.

        Raises:
            RuntimeError: the tap was removed or is a copy, or is recording already. Inside, from the model's forward
                pass: a layer runs twice, or runs in training mode without gradients.
            ValueError: inside: input that is not batched, ``query`` out of range, nested input where ``query`` or
                ``visual`` counts from the end, or a tapped layer that `fully_shard` was applied to by itself.
        """
        if not self._attached:
            raise RuntimeError("this tap was removed from its modules, or is a copy of one: make a new AttentionTap")
        if self._recording:
            raise RuntimeError("this tap is recording already")
        self._records = [None] * len(self._records)
        self._recording = True
        try:
            yield
        finally:
            self._recording = False
            self._interposed = [None] * len(self._records)

    def attention(self) -> QueryAttention:
        """Hand over the last recording, L layers, and forget it: nothing stays in memory for the tap's sake.

        Raises:
            RuntimeError: nothing was recorded, or a layer did not run.
        """
        records, self._records = self._records, [None] * len(self._records)
        missing = [position for position, record in enumerate(records) if record is None]
        if missing:
            raise RuntimeError(
                f"no recording of layer(s) {missing}: run the model inside `with tap.recording():`, fetch each "
                "recording once, and tap a model before its first compiled call"
            )
        recorded = [record for record in records if record is not None]
        attention = QueryAttention(
            [record.query for record in recorded],
            [record.key for record in recorded],
            [record.scale for record in recorded],
            recorded[-1].padding,
        )
        return with_offset(attention, [record.offset for record in recorded])

    def remove(self) -> None:
        """Take the hooks off the modules."""
        for handle in self._handles:
            handle.remove()
        self._attached = False
        self._handles = []
        self._records = [None] * len(self._records)
        self._interposed = [None] * len(self._records)

    def __getstate__(self) -> dict[str, Any]:
        """The state of copies and pickles. The hooks in a copy of the model belong to such a copy of the tap."""
        return self.__dict__ | {
            "_attached": False,
            "_recording": False,
            "_records": [None] * len(self._records),
            "_interposed": [None] * len(self._records),
            "_handles": [],
        }

    def _interpose(
        self, position: int, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Arguments | None:
        """Before a recorded layer: let its key's gradient come back in factors."""
        # Not in compiled code, where a function of our own breaks the graph inside of a checkpointed region, and the
        # sizes it notes down cost a compilation each. Not in a recomputation, whose graph only hands out saved tensors.
        if not self._recording or torch.compiler.is_compiling() or _in_backward():
            return None
        key = _key(args, kwargs)
        if not isinstance(key, Tensor) or key.dim() != 3 or key.is_nested:
            return None
        if not (key.requires_grad and torch.is_grad_enabled()):
            return None
        interposed = interpose(key, self._visual, _dtype(module), batch_first=module.batch_first)
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
                    _read(module, self._query, self._visual, args, kwargs)
            return
        record = _read(module, self._query, self._visual, args, kwargs)
        if _in_backward():
            return
        if module.training and not torch.is_grad_enabled():
            raise RuntimeError(
                "a recording in training mode needs gradients: under no_grad, or reentrant activation checkpointing "
                "(use_reentrant=False works), the gradient of the keys would be lost silently"
            )
        if self._records[position] is not None:
            raise RuntimeError(
                f"layer {position} ran twice in one recording: fetch tap.attention() after each forward pass"
            )
        interposed, self._interposed[position] = self._interposed[position], None
        if interposed is not None and _key(args, kwargs) is interposed.passed:  # no other hook has exchanged it
            interposed.key_gradient.query = record.query.detach()
            record = record._replace(offset=interposed.offset)
        self._records[position] = record


def _in_backward() -> bool:
    """Whether the autograd engine is running, that is: this forward pass is a recomputation."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[1] if len(args) > 1 else kwargs.get("key")


def _dtype(module: nn.MultiheadAttention) -> torch.dtype:
    """Of the folded query: float32, or float64 for float64 weights."""
    weight = module.in_proj_weight if module._qkv_same_embed_dim else module.q_proj_weight
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _read(
    module: nn.MultiheadAttention, index: int, visual: slice, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Record:
    if is_unit(module):  # its parameters would be gone when the recording's backward pass needs them
        raise ValueError("fully_shard was applied to a tapped layer by itself: apply it to the block around the layer")
    query = args[0] if args else kwargs.get("query")
    key = _key(args, kwargs)
    if not isinstance(query, Tensor) or not isinstance(key, Tensor):
        raise ValueError(
            f"a tapped layer is called as forward(query, key, value, ...), not as {type(module).__name__} was"
        )
    mask = args[3] if len(args) > 3 else kwargs.get("key_padding_mask")
    if query.is_nested or key.is_nested:
        query, key, mask = _unnest(query, key, index, visual)
    elif query.dim() != 3:
        raise ValueError(f"a tapped layer needs batched input (3-D), got shape {tuple(query.shape)}")
    elif not module.batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    if not -query.shape[1] <= index < query.shape[1]:
        raise ValueError(f"query must index one of the layer's {query.shape[1]} query tokens, got {index}")
    padding = None
    if mask is not None:
        padding = mask[:, visual]
        if padding.dtype != torch.bool:
            padding = padding < _MASKED
    head_width = module.embed_dim // module.num_heads
    return _Record(
        query=_fold_projections(module, query[:, index]),
        key=key[:, visual],
        scale=1 / (module.num_heads * math.sqrt(head_width)),
        padding=padding,
    )


def _fold_projections(module: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """u = W_k^T (W_q x + b_q), (B, D), in float32 (float64 for float64 weights) whatever autocast says."""
    width = module.embed_dim
    if module._qkv_same_embed_dim:
        weight_q, weight_k = module.in_proj_weight[:width], module.in_proj_weight[width : 2 * width]
    else:
        weight_q, weight_k = module.q_proj_weight, module.k_proj_weight
    bias_q = None if module.in_proj_bias is None else module.in_proj_bias[:width]
    dtype = _dtype(module)
    with torch.autocast(x.device.type, enabled=False):
        q = F.linear(x.to(dtype), weight_q.to(dtype), None if bias_q is None else bias_q.to(dtype))
        return q @ weight_k.to(dtype)


def _unnest(query: Tensor, key: Tensor, index: int, visual: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Dense (B, S, D) query and key and the (B, S) padding of nested ones (the encoder's fast path in eval mode).

    A nested batch has forgotten how long its padded form was. Only ``visual.stop`` can restore that, so whatever counts
    from the end is refused: it would mean other tokens from batch to batch.
    """
    if index < 0 or visual.stop is None or visual.stop < 0 or (visual.start or 0) < 0:
        raise ValueError(
            "nested input has forgotten its padded length: give query and both ends of visual counted from the start, "
            f"got query={index}, visual={visual}; or build nn.TransformerEncoder with enable_nested_tensor=False"
        )
    lengths = [row.shape[0] for row in key.unbind()]
    tokens = max([*lengths, visual.stop])
    dense_query = query.to_padded_tensor(0.0)
    dense_key = key.to_padded_tensor(0.0, (key.size(0), tokens, key.size(2)))
    padding = torch.arange(tokens, device=key.device) >= torch.tensor(lengths, device=key.device)[:, None]
    return dense_query, dense_key, padding
