"""Taps Hugging Face models at their attention interface, whatever attention they run.

An attention module of `transformers` makes its query and key heads, rotates them, and then asks the interface, a global
of its file, for the implementation that its config names ("sdpa", "eager", "flash_attention_2", ...). While a tap
records, another object has the interface's place in that file. It hands out the very implementation, behind a function
that sees query, key and mask and passes all of it on. The module, its config and the names in it are left alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

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
    The row of the host's mask that belongs to the object query becomes the recording's one ``padding``, a causal mask's
    too; a float mask hides a token where it is below -1e4 and counts for nothing elsewhere. Layers that hide different
    visual tokens (chunked or sparse beside full attention) are refused by :meth:`attention` with ``ValueError``; on a
    GPU, where the host does not wait, their samples become NaN.

    The host's attention and its output stay what they were, in every bit. Hooks stay on the modules until
    :meth:`remove` and do nothing while no recording is made. Deep copies and pickles of the model carry inert ones.
    Models with an attention of their own that never asks the interface (ViLT, VisualBERT, LXMERT in version 5.23) are
    refused, and a layer that goes round it (GPT-2's ``reorder_and_upcast_attn`` in "eager") counts as not recorded:
    write a :class:`Recorder` for their heads. Activation checkpointing needs ``use_reentrant=False``.

    Args:
        modules: a model, of which all modules that use the interface are tapped; or the L modules themselves, in order,
            where a model has several kinds (a decoder's self- and cross-attention, a vision tower).
        layers: which of them.
        query, visual: the object query among the layer's query tokens, and which of its key tokens are the visual ones,
            as :class:`Recorder` says.

    Raises:
        TypeError: a module that does not use the interface, ``layers`` is no slice, or ``query`` or ``visual`` is none
            of these.
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
        if not isinstance(layers, slice):
            raise TypeError(
                f"layers must be a slice, slice(-4, None) for the last four, got {type(layers).__name__}; "
                "or give the modules themselves"
            )
        chosen = (attention_modules(modules) if isinstance(modules, nn.Module) else list(modules))[layers]
        if isinstance(modules, nn.Module) and not chosen:
            raise TypeError(f"no module of {type(modules).__name__} in layers={layers} uses the attention interface")
        for position, module in enumerate(chosen):
            if _forward_of(module) is None:
                raise TypeError(
                    f"modules[{position}] must be a module whose forward method calls transformers' attention "
                    f"interface by its name {_INTERFACE}, got {type(module).__name__}"
                )
        super().__init__(chosen, query=query, visual=visual)
        self._windows: set[int | None] = set()
        self._running: int | None = None
        for position, module in enumerate(chosen):
            self.handles.append(module.register_forward_pre_hook(partial(self._note, position)))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward pass inside, as every tap does; what cannot be recorded is refused there."""
        with super().recording(), _listening(self._attend, self._modules):
            yield

    def _note(self, position: int, module: Any, args: Any) -> None:
        """Before a module runs: it is the one whose call of the interface is meant."""
        if self.listening:
            self._running = position

    def _attend(
        self,
        name: str | None,
        attend: _Attention,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The implementation ``attend`` of that name, heard where a tapped module calls it."""
        if self.listening and self._running is not None and self._modules[self._running] is module:
            self._hear(self._running, name, module, query, key, attention_mask, kwargs)
        return attend(module, query, key, value, attention_mask, *args, **kwargs)

    def _hear(
        self,
        position: int,
        name: str | None,
        module: Any,
        query: Tensor,
        key: Tensor,
        mask: Any,
        arguments: dict[str, Any],
    ) -> None:
        """query (B, H, S, d), key (B, H_kv, M, d), as the interface gets them."""
        if arguments.get("position_bias") is not None:
            raise ValueError(f"layer {position} adds a position bias to its scores, which a recording does not hold")
        try:
            self.check(position, module, query.shape[2], key.shape[2])
        except ValueError as error:
            raise ValueError(
                f"{error}; of a model with several kinds of attention give the one to tap, model.language_model for one"
            ) from None
        padding = self._hidden(name, module, query, key, mask, arguments)
        self.keep(position, module, query, key, scaling=arguments.get("scaling"), padding=padding)

    def _hidden(
        self, name: str | None, module: Any, query: Tensor, key: Tensor, mask: Any, arguments: dict[str, Any]
    ) -> Tensor | None:
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
            raise ValueError(f"a sliding window that {name} applies by itself is not read")
        hidden = None if mask is None else mask == 0
        is_causal = arguments.get("is_causal")
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        if not is_causal or tokens == 1 or name in ("eager", None):  # which know no flag
            return hidden
        first = 0 if name == "sdpa" else keys - tokens  # the key of the first query token
        places = self._queries.of(torch.arange(first, first + tokens, device=key.device)[None])  # (1,) or (1, Q)
        later = torch.arange(keys, device=key.device) > places[..., None]
        if hidden is not None:
            later = later | (hidden[:, None] if self._queries.several else hidden)
        return later.expand(batch, *later.shape[1:])

    def _forget(self) -> None:
        self._windows = set()
        self._running = None


_Attention = Callable[..., Any]
_Hear = Callable[..., Any]  # (name, attention, *the attention's arguments)


class _Interface:
    """Stands in for the interface in a model's file while taps record."""

    def __init__(self, interface: Any) -> None:
        self.interface = interface
        self.ears: list[_Hear] = []

    def get_interface(self, name: str | None, default: _Attention) -> _Attention:
        return self._heard(name, self.interface.get_interface(name, default))

    def __getitem__(self, name: str) -> _Attention:
        return self._heard(name, self.interface[name])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.interface, name)

    def _heard(self, name: str | None, attend: _Attention) -> _Attention:
        for hear in self.ears:
            attend = partial(hear, name, attend)
        return attend


_EXCHANGE = Lock()


@contextmanager
def _listening(hear: _Hear, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Have ``hear`` called for the attention that is asked for in the files of these modules."""
    forwards = [_forward_of(module) for module in modules]
    files = {id(forward.__globals__): forward.__globals__ for forward in forwards if forward is not None}
    with _EXCHANGE:
        for names in files.values():
            if not isinstance(names[_INTERFACE], _Interface):
                names[_INTERFACE] = _Interface(names[_INTERFACE])
            names[_INTERFACE].ears.append(hear)
    try:
        yield
    finally:
        with _EXCHANGE:
            for names in files.values():
                stand_in = names[_INTERFACE]
                stand_in.ears.remove(hear)
                if not stand_in.ears:
                    names[_INTERFACE] = stand_in.interface


def _forward_of(module: nn.Module) -> FunctionType | None:
    """The module's forward method, as it is written, if it calls the attention interface."""
    forward = inspect.unwrap(type(module).forward)
    if not isinstance(forward, FunctionType):
        return None
    return forward if _INTERFACE in forward.__code__.co_names and _INTERFACE in forward.__globals__ else None
