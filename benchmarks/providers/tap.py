"""A whole fusion stack: left alone, read by a tap, and with its attention materialised."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from attbalance_ext import AttentionTap, attention_terms
from benchmarks.differentiable import run
from benchmarks.suites.stack import FusionLayer
from benchmarks.suites.tap import TapInputs
from benchmarks.task import Results, Task
from benchmarks.today import terms as today_terms
from benchmarks.today.host import TodaysHost
from benchmarks.today.masks import paint
from benchmarks.watch import Nobody, W


def plain(inputs: TapInputs) -> Task:
    def forward(nobody: Nobody) -> Sequence[Tensor]:
        with inputs.autocast():
            return [inputs.stack(inputs.tokens, inputs.positions, inputs.padding)]

    return _task(inputs, Nobody, forward, inputs.plain_gradients)


def ours(backend: str) -> Callable[[TapInputs], Task]:
    def task(inputs: TapInputs) -> Task:
        region, outputs = inputs.region, len(inputs.gradients) - 1
        teacher = inputs.teacher and inputs.teacher.attention

        def forward(tap: AttentionTap) -> Sequence[Tensor]:
            with inputs.autocast(), tap.recording():
                output = inputs.stack(inputs.tokens, inputs.positions, inputs.padding)
            terms = attention_terms(tap.attention(), region, teacher=teacher, backend=backend)
            return [output, *terms[:outputs]]

        return _task(inputs, inputs.tap, forward, inputs.gradients)

    return task


def today(inputs: TapInputs) -> Task:
    """The layers asked for weights, so without fused attention, and the projections done again."""
    return _projected_again(inputs, materialise=True)


def today_fused(inputs: TapInputs) -> Task:
    """The host's attention left fused, and the projections done again."""
    return _projected_again(inputs, materialise=False)


def _projected_again(inputs: TapInputs, *, materialise: bool) -> Task:
    def host() -> TodaysHost:
        return TodaysHost(inputs.stack.attention_layers(), inputs.visual, materialise=materialise)

    def forward(host: TodaysHost) -> Sequence[Tensor]:
        with inputs.autocast():
            output = inputs.stack(inputs.tokens, inputs.positions, inputs.padding)
            scores = host.scores()
        return [output, *_terms(inputs, scores)]

    return _task(inputs, host, forward, inputs.gradients)


def today_rewritten(inputs: TapInputs) -> Task:
    """The layers' attention written out anew, so that the scores of the object query can be taken from it.

    Nothing is projected twice, but all attention is materialised.
    """

    def forward(nobody: Nobody) -> Sequence[Tensor]:
        maps: list[Tensor] = []

        def attend(layer: FusionLayer, query: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> Tensor:
            attended, scores = _written_out(layer, query, key, value, padding)
            maps.append(scores[:, :, 0, inputs.visual].mean(1))
            return attended

        with inputs.autocast():
            output = inputs.stack(inputs.tokens, inputs.positions, inputs.padding, attend)
        return [output, *_terms(inputs, maps)]

    return _task(inputs, Nobody, forward, inputs.gradients)


def _task(
    inputs: TapInputs,
    make: Callable[[], W],
    forward: Callable[[W], Sequence[Tensor]],
    gradients: Mapping[str, Tensor],
) -> Task:
    """Checked without dropout, which draws other numbers in fused attention; timed as in training."""

    def prepare(*, training: bool) -> Callable[[], Results]:
        inputs.stack.train(training)
        watcher = inputs.watch.by(make)
        return lambda: run(lambda: forward(watcher), inputs.leaves, gradients)

    return Task(
        results=lambda: prepare(training=False)(),
        calls={"both": lambda: prepare(training=True)},
    )


def _terms(inputs: TapInputs, scores: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        teacher = [today_terms.head_average(*heads) for heads in inputs.teacher.heads] if inputs.teacher else []
    mask = paint(inputs.boxes, inputs.grids)
    return today_terms.attention_terms(scores, mask, teacher, inputs.padding[:, inputs.visual])


def _written_out(
    layer: FusionLayer, query: Tensor, key: Tensor, value: Tensor, padding: Tensor
) -> tuple[Tensor, Tensor]:
    """Multi-head attention as the textbook has it: what it gives (S, B, D), and its scores (B, H, S, S)."""
    attention = layer.attention
    split = [
        torch.nn.functional.linear(x, weight, bias).unflatten(2, (attention.num_heads, -1)).permute(1, 2, 0, 3)
        for x, weight, bias in zip(
            (query, key, value), attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
        )
    ]
    q, k, v = split  # (B, H, S, d)
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(padding[:, None, None], -math.inf).softmax(-1)
    weights = torch.nn.functional.dropout(weights, attention.dropout, attention.training)
    mixed = (weights.to(v.dtype) @ v).permute(2, 0, 1, 3).flatten(2)
    return attention.out_proj(mixed), scores
