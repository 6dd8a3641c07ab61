"""A training step of one's own under `torch.compile(fullgraph=True)`: eager losses, one graph for every batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from helpers import BACKENDS
from helpers_compile import assert_same_curve, graphs
from helpers_hosts import Grounder
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attbalance_ext import AttBalanceLoss, AttentionTap, BoxRegion, MomentumTeacher, QueryAttention, attention_terms

Batch = tuple[Tensor, Tensor, Tensor]
Step = Callable[[Tensor, Tensor, Tensor], Tensor]
STEPS = 20


def make_tap(model: Grounder) -> AttentionTap:
    return AttentionTap(model.attention_layers(), visual=slice(1, None))


class Trainer:
    """A tapped grounder, its teacher and the objective; one call of :meth:`forward` is a step up to the loss."""

    def __init__(self, backend: str, **options: int) -> None:
        torch.manual_seed(0)
        self.backend = backend
        self.model = Grounder(**options)
        self.tap = make_tap(self.model)
        self.teacher = MomentumTeacher(self.model, make_tap)
        self.objective = AttBalanceLoss(backend=backend)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)

    def forward(self, visual: Tensor, padding: Tensor, target: Tensor) -> Tensor:
        self.teacher.update(self.model)
        teacher = self.teacher.attention(visual, padding)
        with self.tap.recording():
            boxes = self.model(visual, padding)
        region = BoxRegion(target, (4, 4))
        terms = attention_terms(self.tap.attention(), region, teacher=teacher, backend=self.backend)
        return self.objective(terms, boxes, target).loss

    def train(self, step: Step, batches: Sequence[Batch]) -> list[float]:
        losses = []
        for batch in batches:
            loss = step(*batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses


def batches(sizes: Sequence[int], dynamic: bool = False) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for size in sizes:
        visual = torch.randn(size, 16, 16, generator=generator)
        padding = torch.arange(17) >= torch.randint(9, 18, (size, 1), generator=generator)
        target = 0.2 + 0.6 * torch.rand(size, 4, generator=generator)
        if dynamic:
            for tensor in (visual, padding, target):
                torch._dynamo.mark_dynamic(tensor, 0)
        made.append((visual, padding, target))
    return made


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_serves_every_batch_size_when_it_is_marked_dynamic(backend: str) -> None:
    sizes = [8, 5, 3, 8] * (STEPS // 4)
    eager, compiled = Trainer(backend), Trainer(backend)
    expected = eager.train(eager.forward, batches(sizes))
    step = torch.compile(compiled.forward, fullgraph=True, backend="aot_eager")
    assert_same_curve(compiled.train(step, batches(sizes, dynamic=True)), expected)
    assert graphs() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_graphs_at_most_serve_every_batch_size_unmarked(backend: str) -> None:
    """PyTorch specialises on the first size, then compiles once more for all others."""
    sizes = [8, 5, 3, 8, 4]
    eager, compiled = Trainer(backend), Trainer(backend)
    expected = eager.train(eager.forward, batches(sizes))
    step = torch.compile(compiled.forward, fullgraph=True, backend="eager")
    assert_same_curve(compiled.train(step, batches(sizes)), expected)
    assert graphs() <= 2


@pytest.mark.slow
def test_inductor_compiles_around_the_opaque_ops() -> None:
    eager, compiled = Trainer("cpu", layers=1), Trainer("cpu", layers=1)
    data = batches([8] * STEPS)
    expected = eager.train(eager.forward, data)
    step = torch.compile(compiled.forward, fullgraph=True, backend="inductor")
    assert_same_curve(compiled.train(step, data), expected)
    assert graphs() == 1


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "sequence_first"])
def test_recording_around_a_compiled_model(batch_first: bool) -> None:
    eager, compiled = Trainer("cpu", batch_first=batch_first), Trainer("cpu", batch_first=batch_first)
    data = batches([8, 8, 8], dynamic=True) + batches([5], dynamic=True)
    expected = eager.train(eager.forward, data)
    compiled.model.compile(fullgraph=True, backend="aot_eager")
    compiled.teacher.module.compile(fullgraph=True, backend="aot_eager")
    assert_same_curve(compiled.train(compiled.forward, data), expected)
    assert graphs() == 2  # the student and the teacher


def test_a_compiled_model_records_only_inside_a_recording() -> None:
    trainer = Trainer("reference")
    model = torch.compile(trainer.model, fullgraph=True, backend="eager")
    ((visual, padding, _),) = batches([4])
    model(visual, padding)
    with pytest.raises(RuntimeError, match="no recording"):
        trainer.tap.attention()
    with trainer.tap.recording():
        model(visual, padding)
    recorded = trainer.tap.attention()
    with trainer.tap.recording():
        trainer.model(visual, padding)
    eager = trainer.tap.attention()
    for a, b in zip((*recorded.query, *recorded.key), (*eager.query, *eager.key), strict=True):
        torch.testing.assert_close(a, b)
    with trainer.tap.recording():
        model(visual, padding)
        with pytest.raises(RuntimeError, match="ran twice"):
            model(visual, padding)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_eager_ones(backend: str) -> None:
    """Of every parameter: a loss curve can hide a gradient that is lost."""
    (batch,) = batches([6])
    gradients = []
    for compile_it in (False, True):
        trainer = Trainer(backend)
        step = torch.compile(trainer.forward, fullgraph=True, backend="aot_eager") if compile_it else trainer.forward
        step(*batch).backward()
        gradients.append([p.grad for p in trainer.model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_may_share_tensors(backend: str) -> None:
    """As the layers of a decoder do, whose keys are one memory; and a model may be its own teacher."""

    def step(query: Tensor, key: Tensor, boxes: Tensor) -> Tensor:
        attention = QueryAttention([query, query], [key, key], 0.25)
        terms = attention_terms(attention, BoxRegion(boxes, (4, 4)), teacher=attention, backend=backend)
        return (terms.rac * torch.tensor([[1.0], [2.0]])).sum() + terms.mrc.sum()

    inputs = torch.randn(3, 8, requires_grad=True), torch.randn(3, 16, 8, requires_grad=True), torch.rand(3, 4)
    expected = torch.autograd.grad(step(*inputs), inputs[:2])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for gradient, truth in zip(torch.autograd.grad(compiled(*inputs), inputs[:2]), expected, strict=True):
        torch.testing.assert_close(gradient, truth)
    assert graphs() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_inside_the_graph(backend: str) -> None:
    """The folded query keeps float32 in compiled code too."""
    trainer = Trainer(backend)
    ((visual, padding, target),) = batches([4])

    def step(visual: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            with trainer.tap.recording():
                boxes = trainer.model(visual, padding)
            attention = trainer.tap.attention()
            terms = attention_terms(attention, BoxRegion(target, (4, 4)), backend=backend)
            return trainer.objective(terms, boxes, target).loss, attention.query[0]

    expected, query = step(visual)
    loss, compiled_query = torch.compile(step, fullgraph=True, backend="aot_eager")(visual)
    assert query.dtype == compiled_query.dtype == torch.float32
    torch.testing.assert_close(compiled_query, query, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)


def checkpointed_step(trainer: Trainer) -> Step:
    for layer in trainer.model.layers:
        forward = layer.forward

        def recomputed(tokens: Tensor, src_key_padding_mask: Tensor, forward: Step = forward) -> Tensor:
            return checkpoint(forward, tokens, None, src_key_padding_mask, use_reentrant=False)

        layer.forward = recomputed
    return trainer.forward


def test_activation_checkpointing_inside_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses side effects there, and a recording is one, unless told that recomputation may skip them."""
    (batch,) = batches([6])
    plain, compiled = Trainer("cpu"), Trainer("cpu")
    step = torch.compile(checkpointed_step(compiled), fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="skip_fwd_side_effects_in_bwd_under_checkpoint"):
        step(*batch)
    monkeypatch.setattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint", True)
    torch._dynamo.reset()
    step(*batch).backward()
    plain.forward(*batch).backward()
    for a, b in zip(compiled.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_a_tap_made_after_compilation_records_nothing_and_says_so() -> None:
    model = Grounder()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ((visual, padding, _),) = batches([4])
    compiled(visual, padding)
    tap = make_tap(model)
    with tap.recording():
        compiled(visual, padding)
    with pytest.raises(RuntimeError, match="tap a model before its first compiled call"):
        tap.attention()
