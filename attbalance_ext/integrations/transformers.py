"""Taps Hugging Face models at their attention interface, whatever attention they run.

An attention module of `transformers` makes its query and key heads, rotates them, and then asks for the implementation
that its config names ("sdpa", "eager", "flash_attention_2", ...). For one such call the tap gives it a config with
another name. The function behind that name sees query, key and mask, gives the config back and goes on to the
implementation that the model had, with the very arguments.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from attbalance_ext import Recorder

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # what the interface is called in every file of a model


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The modules in ``model`` that ask `transformers`' attention interface for their attention, in order."""
    return [module for module in model.modules() if _forward_of(module) is not None]


class TransformersTap(Recorder):
    """Records the object query's attention in a `transformers` model that uses the attention interface.

    ::

        tap = TransformersTap(bert, layers=slice(-4, None), query=0, visual=slice(21, 421))
        with tap.recording():
            output = bert(inputs_embeds=tokens)
        attention = tap.attention()

        tap = TransformersTap([layer.encoder_attn for layer in detr.decoder.layers], query=slice(None))
        tap = TransformersTap(llava.language_model, query=-1, visual=range(5, 581))

    Query and key are taken where the attention gets them, after normalisation, rotation and whatever else a model does.
    The score is their product as the host scales it, averaged over the heads, before softmax and any soft cap; with
    grouped heads each key head meets the mean of its group's queries, so that no key is repeated. Gradients reach both.
    The row of the host's mask that belongs to the object query becomes the recording's ``padding``, a causal mask's
    too; a float mask hides a token where it is below -1e4 and counts for nothing elsewhere.

    The host's attention and its output stay what they were, in every bit. Hooks stay on the modules until
    :meth:`remove` and do nothing while no recording is made. Deep copies and pickles of the model carry inert ones.
    Models with an attention of their own that never asks the interface (ViLT, VisualBERT, LXMERT in version 5.23) are
    refused: build a :class:`QueryAttention` from their heads. Activation checkpointing needs ``use_reentrant=False``.

    Args:
        modules: a model, of which all modules that use the interface are tapped; or the L modules themselves, in order,
            where a model has several kinds (a decoder's self- and cross-attention, a vision tower).
        layers: which of them.
        query: the object query among the layer's query tokens, counted from the end if negative; or several (a slice, a
            sequence of ints, an int64 tensor, a bool mask), of which :meth:`attention` is told one for each sample.
        visual: which of the layer's key tokens are the visual ones, in the grids' order: a slice, a sequence of ints,
            an int64 tensor, or a bool mask over all of them.

    Raises:
        TypeError: a module that does not use the interface, or ``query`` or ``visual`` is none of these.
        ValueError: no modules, one module twice, or an index that names no token or a token twice.

    :meth:`recording` raises ``ValueError`` also for what a recording cannot hold: a position bias, a mask for each head
    or that is no tensor (``flex_attention``), sliding windows that the layers do not share; ``RuntimeError`` for a
    module that calls its attention several times in a forward pass, as those for packed sequences do.
    """

    def __init__(
        self,
        modules: nn.Module | Sequence[nn.Module],
        *,
        layers: slice = slice(None),
        query: int | slice | Sequence[int] | Tensor = 0,
        visual: slice | Sequence[int] | Tensor = slice(None),
    ) -> None:
        chosen = (attention_modules(modules) if isinstance(modules, nn.Module) else list(modules))[layers]
        if isinstance(modules, nn.Module) and not chosen:
            raise TypeError(f"no module of {type(modules).__name__} in layers={layers} uses the attention interface")
        for position, module in enumerate(chosen):
            if _forward_of(module) is None:
                raise TypeError(
                    f"modules[{position}] must be a module that calls transformers' attention interface, "
                    f"got {type(module).__name__}"
                )
        super().__init__(chosen, query=query, visual=visual)
        self._forget()
        for position, module in enumerate(chosen):
            self._handles += [
                module.register_forward_pre_hook(partial(self._listen, position)),
                module.register_forward_hook(_put_back, always_call=True),
            ]

    def _listen(self, position: int, module: Any, args: Any) -> None:
        """Before a module runs: have its next call of the attention interface heard."""
        if not self._listening:
            return
        if not isinstance(module.config, _Heard):
            module.config = _Heard(module)
        module.config.listeners.append(partial(self._hear, position))

    def _hear(
        self, position: int, heard: _Heard, query: Tensor, key: Tensor, mask: Any, arguments: dict[str, Any]
    ) -> None:
        """query (B, H, S, d), key (B, H_kv, M, d), as the interface gets them."""
        if arguments.get("position_bias") is not None:
            raise ValueError(f"layer {position} adds a position bias to its scores, which a recording does not hold")
        self._queries.check(query.shape[2], "query")
        self._visual.check(key.shape[2], "key")
        scaling = arguments.get("scaling")
        self._keep(
            position,
            heard.module,
            query=query.transpose(1, 2),
            key=key.transpose(1, 2),
            scale=(1 / math.sqrt(query.shape[3]) if scaling is None else scaling) / key.shape[1],
            padding=self._hidden(heard, query, key, mask, arguments),
        )

    def _object_queries(self, query: Tensor, key: Tensor) -> Tensor:
        """Picked and averaged over the heads that share a key head. Not in the module: a checkpoint would notice."""
        query = self._queries.of(query)  # (B, H, d) or (B, Q, H, d)
        heads, key_heads = query.shape[-2], key.shape[2]
        if heads != key_heads:
            dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
            query = query.to(dtype).unflatten(-2, (key_heads, heads // key_heads)).mean(-2)
        query = query.flatten(-2)
        return query.expand(key.shape[0], *query.shape[1:])  # learned queries may be one for all samples

    def _hidden(self, heard: _Heard, query: Tensor, key: Tensor, mask: Any, arguments: dict[str, Any]) -> Tensor | None:
        """What the queries do not see: (B, M) or (B, Q, M), bool, True = hidden, or a float mask."""
        batch, tokens, keys = key.shape[0], query.shape[2], key.shape[2]
        window = arguments.get("sliding_window")
        self._windows.add(window if window is not None and window < keys else None)
        if len(self._windows) > 1:
            raise ValueError("the tapped layers see windows of different sizes: tap layers of one kind")
        if isinstance(mask, Tensor) and mask.dim() == 4:
            if mask.shape[1] != 1:
                raise ValueError(f"a tapped layer needs one mask for all heads, got shape {tuple(mask.shape)}")
            row = self._queries.of(mask[:, 0].expand(batch, tokens, -1))
            return ~row if row.dtype == torch.bool else row
        # What else there is: nothing, or, of flash attention, (B, M) with 0 at padding. Then causality is a flag.
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise ValueError(f"a tapped layer needs a mask (B, 1, S, M) or (B, M), got {type(mask).__name__}")
        if self._windows != {None}:
            raise ValueError(f"a sliding window that {heard.implementation} applies by itself is not read")
        hidden = None if mask is None else mask == 0
        is_causal = arguments.get("is_causal")
        if is_causal is None:
            is_causal = getattr(heard.module, "is_causal", True)
        if not is_causal or tokens == 1 or heard.implementation in ("eager", None):  # which know no flag
            return hidden
        first = 0 if heard.implementation == "sdpa" else keys - tokens  # the key of the first query token
        places = self._queries.of(torch.arange(first, first + tokens, device=key.device)[None])  # (1,) or (1, Q)
        later = torch.arange(keys, device=key.device) > places[..., None]
        if hidden is not None:
            later = later | (hidden[:, None] if self._queries.several else hidden)
        return later.expand(batch, *later.shape[1:])

    def _forget(self) -> None:
        self._windows: set[int | None] = set()


class _Heard:
    """Stands in for a module's config until the module has asked for its attention."""

    def __init__(self, module: Any) -> None:
        forward = _forward_of(module)
        assert forward is not None
        self.module, self.config = module, module.config
        self.listeners: list[Callable[..., None]] = []
        self.implementation: str | None = module.config._attn_implementation
        eager = next(name for name in forward.__code__.co_names if name.endswith("eager_attention_forward"))
        interface = forward.__globals__[_INTERFACE]
        self.attend = interface.get_interface(self.implementation, forward.__globals__[eager])
        # Whoever asks whether this is flash attention looks for the word.
        self._attn_implementation = f"attbalance|{self.implementation}"
        if self._attn_implementation not in interface:
            AttentionInterface.register(self._attn_implementation, _heard)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


def _heard(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """An implementation of attention that lets listeners know, then is the one that it stands for."""
    heard = module.config
    if not isinstance(heard, _Heard):
        raise RuntimeError(f"{type(module).__name__} calls its attention several times in one forward pass")
    module.config = heard.config
    for listen in heard.listeners:
        listen(heard, query, key, attention_mask, kwargs)
    return heard.attend(module, query, key, value, attention_mask, *args, **kwargs)


def _put_back(module: Any, args: Any, output: Any) -> None:
    """After a module that did not get as far as its attention."""
    if isinstance(module.config, _Heard):
        module.config = module.config.config


def _forward_of(module: nn.Module) -> FunctionType | None:
    """The module's forward method, as it is written, if it calls the attention interface."""
    forward = inspect.unwrap(type(module).forward)
    names = forward.__code__.co_names if isinstance(forward, FunctionType) else ()
    return forward if _INTERFACE in names else None
