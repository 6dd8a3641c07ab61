"""What every tap has in common: L records, kept while it records and handed over once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attbalance_ext.attention import QueryAttention, with_offset
from attbalance_ext.key_gradient import Interposed
from attbalance_ext.tokens import SeveralTokens, Tokens

# A float mask is added to the scores: below this a token's probability underflows to 0, whatever finite stand-in
# for -inf the host uses.
_MASKED = -1e4


class Record(NamedTuple):
    """What a tap reads in one layer."""

    query: Tensor
    """(B, D), or (B, Q, D) where the tap has several queries; or the heads of all query tokens, (B, S, H, d)."""
    key: Tensor
    """(B, S, ...): all key tokens; what follows S is D, flattened."""
    scale: float
    padding: Tensor | None
    """(B, S), or (B, Q, S) where the queries differ in it: bool, True = ignore, or float, added to the scores."""
    interposed: Interposed | None
    """What takes the key's gradient in factors."""


class Recorder:
    """The base of every tap: all but how the layers of a host are read.

    For an attention of one's own a subclass puts hooks on the modules, adds their handles to ``handles``, and where
    ``listening`` calls :meth:`keep`, once for each layer::

        class OwnTap(Recorder):
            def __init__(self, modules, **tokens):
                super().__init__(modules, **tokens)
                for position, module in enumerate(modules):
                    self.handles.append(module.register_forward_hook(partial(self._read, position)))

            def _read(self, position, module, args, output):
                if self.listening:
                    self.keep(position, module, query=output[1], key=output[2])

    Args:
        modules: the L attention layers in order.
        query: the object query among the layer's query tokens, counted from the end if negative; or several (a slice, a
            sequence of ints, an int64 tensor, a bool mask), of which :meth:`attention` is told one for each sample.
        visual: which of the layer's key tokens are the visual ones, in the grids' order: a slice, a sequence of ints,
            an int64 tensor, or a bool mask over all of them. What a slice can say is read in place; other tokens are
            copied.

    Raises:
        TypeError: ``query`` or ``visual`` is none of these.
        ValueError: no modules, one module twice, or an index that names no token or a token twice.
    """

    def __init__(
        self, modules: Sequence[nn.Module], *, query: int | SeveralTokens = 0, visual: SeveralTokens = slice(None)
    ) -> None:
        if not modules:
            raise ValueError("modules is empty: give the attention layers to supervise")
        if len(set(map(id, modules))) != len(modules):
            raise ValueError("modules names one layer twice; a layer that runs several times cannot be tapped")
        self._queries, self._visual = Tokens("query", query, one=True), Tokens("visual", visual)
        for device in {parameter.device for module in modules for parameter in module.parameters()}:
            self._queries.put_on(device)
            self._visual.put_on(device)
        self._modules = list(modules)
        self._attached = True
        self._recording = False
        self._records: list[Record | None] = [None] * len(modules)
        self.handles: list[RemovableHandle] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward pass that runs inside; what was recorded before and not fetched is dropped.

        Raises:
            RuntimeError: the tap was removed or is a copy, or is recording already. Inside, from the model's forward
                pass: a layer runs twice, or runs in training mode without gradients.
            ValueError: inside: a layer whose input cannot be read, or has not the tokens that were named.
        """
        if not self._attached:
            kind = type(self).__name__
            raise RuntimeError(f"this tap was removed from its modules, or is a copy of one: make a new {kind}")
        if self._recording:
            raise RuntimeError("this tap is recording already")
        self._records = [None] * len(self._records)
        self._recording = True
        try:
            yield
        finally:
            self._recording = False
            self._forget()

    def attention(self, query: Tensor | None = None) -> QueryAttention:
        """Hand over the last recording, L layers, and forget it: nothing stays in memory for the tap's sake.

        Args:
            query: (B,) int64 on the recording's device, where the tap has several queries: which of them is each
                sample's object query, 0 for the first, as a matching decides after the forward pass. The host does not
                wait for its values. One that is out of range makes its sample's attention NaN.

        Raises:
            RuntimeError: nothing was recorded, or a layer did not run.
            TypeError: the tap has several queries and ``query`` is not given, or it has one and ``query`` is given; or
                ``query`` is not an int64 tensor.
            ValueError: ``query`` has another shape or device; or the layers hide different visual tokens (on a GPU,
                where the host does not wait, such samples become NaN).
        """
        missing = [position for position, record in enumerate(self._records) if record is None]
        if missing:
            self._records = [None] * len(self._records)
            raise RuntimeError(
                f"no recording of layer(s) {missing}: run the model inside `with tap.recording():`, fetch each "
                "recording once, and tap a model before its first compiled call"
            )
        with torch.enable_grad():  # the graph is the recording's, wherever it is handed over
            records = [
                record._replace(query=_object_queries(record.query, record.key, self._queries))
                for record in self._records
                if record is not None
            ]
            self._check_choice(query, records[0].query)
            self._records = [None] * len(records)
            return _hand_over(records, query, self._visual)

    def remove(self) -> None:
        """Take the hooks off the modules."""
        for handle in self.handles:
            handle.remove()
        self._attached = False
        self.handles = []
        self._records = [None] * len(self._records)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """The state of copies and pickles. The hooks in a copy of the model belong to such a copy of the tap."""
        return self.__dict__ | {
            "_attached": False,
            "_recording": False,
            "_records": [None] * len(self._records),
            "_modules": [],
            "handles": [],
        }

    def is_on(self, model: nn.Module) -> bool:
        """Whether all tapped modules are the model's."""
        own = set(map(id, model.modules()))
        return all(id(module) in own for module in self._modules)

    @property
    def listening(self) -> bool:
        """Whether a layer that runs now is to be kept: not where activation checkpointing runs it again."""
        return self._recording and not in_backward()

    def check(self, position: int, module: nn.Module, queries: int, keys: int) -> None:
        """Raise ``ValueError`` unless a layer with so many query and key tokens has the ones that are meant."""
        try:
            self._queries.check(queries, "query")
            self._visual.check(keys, "key")
        except ValueError as error:
            raise ValueError(f"layer {position}, {type(module).__name__}: {error}") from None

    def keep(
        self,
        position: int,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        *,
        scaling: float | None = None,
        padding: Tensor | None = None,
    ) -> None:
        """Keep what the layer at ``position``, which is ``module``, attends with. Gradients reach both.

        Args:
            query: (B, H, S, d), the heads of all its query tokens after rotation and norms; B may be 1 for queries that
                all samples share.
            key: (B, H_kv, M, d), of all its key tokens; H is a multiple of H_kv, whose heads are not repeated.
            scaling: what the host multiplies a head's scores by; 1 / sqrt(d) if not given.
            padding: (B, M), or (B, Q, M) where the tap has Q queries that differ in it: bool, True = hidden from the
                object query, or float, added to its scores (hidden below -1e4).

        Raises:
            RuntimeError: the layer was kept already, or is in training mode without gradients.
            ValueError: it has not the tokens that were named.
        """
        self.check(position, module, query.shape[2], key.shape[2])
        scaling = 1 / math.sqrt(query.shape[3]) if scaling is None else scaling
        self._keep(
            position,
            module,
            query=query.transpose(1, 2),
            key=key.transpose(1, 2),
            scale=scaling / key.shape[1],
            padding=padding,
        )

    def _keep(
        self,
        position: int,
        module: nn.Module,
        *,
        query: Tensor,
        key: Tensor,
        scale: float,
        padding: Tensor | None = None,
        interposed: Interposed | None = None,
    ) -> None:
        """Keep the layer at ``position``, which is ``module``; see :class:`Record`."""
        if module.training and not torch.is_grad_enabled():
            raise RuntimeError(
                "a recording in training mode needs gradients: under no_grad, or reentrant activation checkpointing "
                "(use_reentrant=False works), the gradient of the keys would be lost silently"
            )
        if self._records[position] is not None:
            raise RuntimeError(
                f"layer {position}, {type(module).__name__}, ran twice in one recording, or asked for its attention "
                "twice: fetch tap.attention() after each forward pass"
            )
        self._records[position] = Record(query, key, scale, padding, interposed)

    def _forget(self) -> None:
        """Drop what hooks have left for each other: the forward pass has ended, or failed."""

    def _check_choice(self, choice: Tensor | None, recorded: Tensor) -> None:
        if not self._queries.several:
            if choice is not None:
                raise TypeError(f"the tap has one query, {self._queries}: attention() takes no choice of it")
            return
        if choice is None:
            raise TypeError(
                f"the tap has several queries, {self._queries}: say which with attention(query=...), int64 (B,)"
            )
        if not isinstance(choice, Tensor) or choice.dtype != torch.int64:
            given = choice.dtype if isinstance(choice, Tensor) else type(choice).__name__
            raise TypeError(f"query must be an int64 tensor (B,), got {given}")
        batch, queries = recorded.shape[:2]
        if queries == 0:
            raise ValueError(f"query={self._queries} names none of the layer's query tokens")
        if choice.shape != (batch,):
            raise ValueError(f"query must be (B,) = ({batch},), got shape {tuple(choice.shape)}")
        if choice.device != recorded.device:
            raise ValueError(f"query must be on {recorded.device} like the recording, got {choice.device}")


def in_backward() -> bool:
    """Whether the autograd engine is running, that is: this forward pass is a recomputation."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _object_queries(query: Tensor, key: Tensor, queries: Tokens) -> Tensor:
    """(B, D), or (B, Q, D) of several: picked from all tokens' heads and averaged over those that share a key head.

    Not in the layer: a checkpoint would notice.
    """
    if query.dim() < 4:
        return query
    query = queries.of(query)  # (B, H, d) or (B, Q, H, d)
    heads, key_heads = query.shape[-2], key.shape[2]
    if heads != key_heads:
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        query = query.to(dtype).unflatten(-2, (key_heads, heads // key_heads)).mean(-2)
    query = query.flatten(-2)
    return query.expand(key.shape[0], *query.shape[1:])  # learned queries may be one for all samples


def _hand_over(records: Sequence[Record], choice: Tensor | None, visual: Tokens) -> QueryAttention:
    paddings = [record.padding for record in records]
    queries = [record.query for record in records]
    if choice is not None:
        inside = choice.clamp(0, queries[0].shape[1] - 1)
        outside = (inside != choice)[:, None]
        queries = [_chosen(query, inside).masked_fill(outside, torch.nan) for query in queries]
        chosen = {id(padding): _chosen(padding, inside) for padding in paddings if _is_for_each_query(padding)}
        paddings = [chosen.get(id(padding), padding) for padding in paddings]
    keys = [visual.of(record.key).flatten(2) for record in records]
    padding, disagree = _one_for_all(paddings, keys[0], visual)
    if disagree is not None:
        queries = [query.masked_fill(disagree[:, None], torch.nan) for query in queries]
    offsets = []
    for record, query in zip(records, queries, strict=True):
        if record.interposed is not None:
            record.interposed.key_gradient.query = query.detach()
        offsets.append(None if record.interposed is None else record.interposed.offset)
    return with_offset(QueryAttention(queries, keys, [record.scale for record in records], padding), offsets)


def _one_for_all(paddings: Sequence[Tensor | None], key: Tensor, visual: Tokens) -> tuple[Tensor | None, Tensor | None]:
    """The layers' padding (B, N), and (B,) samples in which they disagree, if nobody may wait to learn that.

    Raises:
        ValueError: they disagree, where their values are at hand.
    """
    if all(padding is paddings[0] for padding in paddings):
        return None if paddings[0] is None else _hidden(paddings[0], visual), None
    nowhere = torch.zeros(key.shape[:2], dtype=torch.bool, device=key.device)
    hidden = [nowhere if padding is None else _hidden(padding, visual) for padding in paddings]
    tokens = hidden[-1].shape[1]
    if any(row.shape[1] != tokens for row in hidden):  # in a set, sizes that are dynamic would become constants
        raise ValueError("the tapped layers have masks over different numbers of tokens: tap layers of one kind")
    differs = torch.stack([(row != hidden[-1]).any(1) for row in hidden])  # (L, B)
    if differs.device.type != "cpu" or torch.compiler.is_compiling():
        return hidden[-1], differs.any(0)
    try:
        torch._assert_async(~differs.any())  # on a CPU it raises at once, and reads no number back
    except RuntimeError:
        layers = differs.any(1).nonzero()[:, 0].tolist()
        raise ValueError(
            f"layer(s) {layers} hide other visual tokens from the object query than layer {len(hidden) - 1} does, "
            "and a recording has one padding for all layers: tap layers of one kind"
        ) from None
    return hidden[-1], None


def _hidden(padding: Tensor, visual: Tokens) -> Tensor:
    """(B, N) bool of (B, S), True = ignore."""
    padding = visual.of(padding)
    return padding if padding.dtype == torch.bool else padding < _MASKED


def _is_for_each_query(padding: Tensor | None) -> TypeGuard[Tensor]:
    return padding is not None and padding.dim() == 3


def _chosen(several: Tensor, choice: Tensor) -> Tensor:
    """(B, D) of (B, Q, D)."""
    return several.gather(1, choice[:, None, None].expand(-1, 1, several.shape[2]))[:, 0]
