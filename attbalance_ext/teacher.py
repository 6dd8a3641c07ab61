"""The momentum teacher: an exponential moving average of the model whose attention MRC follows (AttBalance, section
3)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from attbalance_ext.attention import QueryAttention
from attbalance_ext.protocol import Tap
from attbalance_ext.recorder import Recorder
from attbalance_ext.sharding import gathered, is_sharded, units


class MomentumTeacher(nn.Module):
    """An EMA copy of a model, kept in eval mode, and its tap.

    `torch.optim.swa_utils.AveragedModel` is not used whole: it branches on a counter that lives on the device, a host
    synchronisation in every update. Its averaging function is.

    ::

        teacher = MomentumTeacher(model, lambda copy: AttentionTap([layer.self_attn for layer in copy.layers]))
        teacher.update(model)  # before the teacher's forward pass, as in the paper
        attention = teacher.attention(images, sentences)

    The averaged weights and buffers are in ``state_dict`` under ``module.``.

    FSDP2: make the teacher before `fully_shard` is applied to the model. It may stay whole on every process, which is
    fastest where it fits, or be sharded as the model is: `fully_shard` on ``teacher.module`` and the same blocks of it.

    Args:
        model: the student; give the plain module, not a DistributedDataParallel or compiled wrapper of it.
        make_tap: called once with the copy; returns the copy's :class:`Tap`, an :class:`AttentionTap` for example.
        momentum: what the average keeps of its past in each update, in [0, 1]; the paper's is 0.9.

    Raises:
        ValueError: momentum outside [0, 1], `fully_shard` was applied to the model already, or make_tap tapped another
            model than the copy.
        TypeError: make_tap is no function, or returned something else.
    """

    def __init__(self, model: nn.Module, make_tap: Callable[[nn.Module], Tap], momentum: float = 0.9) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {momentum!r}")
        if any(units(model)):
            raise ValueError("model is sharded, which has no copy: make the teacher first, then call fully_shard")
        if not callable(make_tap):
            raise TypeError(
                "make_tap must be a function that is called with the teacher's copy of the model and taps it, "
                f"got {type(make_tap).__name__}"
            )
        self.momentum = momentum
        self.module = copy.deepcopy(model).requires_grad_(False)
        tap = make_tap(self.module)
        if not isinstance(tap, Tap):
            raise TypeError(f"make_tap must return a tap, for example an AttentionTap, got {type(tap).__name__}")
        if isinstance(tap, Recorder) and not tap.is_on(self.module):
            raise ValueError("make_tap tapped other modules than those of the copy that it was given: tap its argument")
        self._tap = tap
        self.eval()

    def train(self, mode: bool = True) -> MomentumTeacher:
        """The teacher stays in eval mode: dropout in its attention would be noise in the student's target."""
        super().train(False)
        return self

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards ``model``: floating parameters by ``1 - momentum``; buffers are copied.

        ``model`` may be a wrapper, as long as its parameters and buffers come in the same order. Where it is sharded,
        every process must call this; the parameters are gathered one by one for a teacher that is not.

        Raises:
            ValueError: ``model`` has another number of parameters or buffers.
        """
        for kind in ("parameters", "buffers"):
            own, other = (sum(1 for _ in getattr(module, kind)()) for module in (self.module, model))
            if own != other:
                raise ValueError(
                    f"model must be the one that the teacher was made from: it has {other} {kind}, the teacher {own}"
                )
        for unit in (*units(self.module), *units(model)):
            unit.reshard()  # after a forward pass without a backward one it shows a gathered copy of its parameters
        parameters = [
            (average, (current if is_sharded(average) else gathered(current)).to(average))
            for average, current in zip(self.module.parameters(), model.parameters(), strict=True)
        ]
        average_all = get_ema_multi_avg_fn(self.momentum)
        for averages, currents in _of_one_kind(parameters):
            average_all(averages, currents, 0)
        buffers = list(zip(self.module.buffers(), model.buffers(), strict=True))
        for buffer, current in buffers:
            if buffer.shape != current.shape:
                buffer.resize_(current.shape)  # a running rho has no size before its first step
        for copies, currents in _of_one_kind(buffers):
            torch._foreach_copy_(copies, currents)

    @torch.no_grad()
    def attention(self, *args: Any, query: Tensor | None = None, **kwargs: Any) -> QueryAttention:
        """Run the teacher's forward pass on the student's inputs; its attention, without gradient.

        Args:
            args, kwargs: what the model is called with. (Its own argument of the name ``query`` has to come by
                position.)
            query: for a tap with several queries, which of them is each sample's object query, (B,) int64. It is the
                student's choice: the queries are the same ones, averaged, and student and teacher have to be compared
                in the same one. So the teacher runs after the student's matching.
        """
        with self._tap.recording():
            self.module(*args, **kwargs)
        return self._tap.attention(query)

    def forward(self, *args: Any, query: Tensor | None = None, **kwargs: Any) -> QueryAttention:
        """The same as :meth:`attention`, so that wrappers which call modules work."""
        return self.attention(*args, query=query, **kwargs)


def _of_one_kind(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterable[tuple[list[Tensor], list[Tensor]]]:
    """The first and the second tensors, apart by the first one's device and dtype: what one launch can take."""
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for first, second in pairs:
        firsts, seconds = groups.setdefault((first.device, first.dtype), ([], []))
        firsts.append(first)
        seconds.append(second)
    return groups.values()
