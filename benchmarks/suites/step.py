"""Suite `step`: one whole training step of a grounding model, on random images, sentences and boxes.

Forward pass, loss, backward pass, clipping, AdamW, and with AttBalance the teacher's update and forward pass. All ways
train the same model in turns: its weights are random and stay so, and what a step costs does not depend on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from attbalance_ext import AttBalanceLoss, BoxRegion, MomentumTeacher, QueryAttention, attention_map, attention_terms
from attbalance_ext.grounding.models import MODELS, GroundingModel, build_model
from attbalance_ext.grounding.optimization import make_optimizer
from attbalance_ext.grounding.settings import Settings
from benchmarks.scenes import RULE, draw_boxes, draw_pixel_padding, draw_word_padding
from benchmarks.task import Results
from benchmarks.watch import Watch

_TOLERANCE = {"fp32": 2e-4, "bf16": 3e-2}


@dataclass(frozen=True)
class StepCase:
    """batch, size (of the canvas, in pixels): None is 2 and 640 for a full-size model, 64 and 64 for a tiny one."""

    model: str = "transvg-r50"
    batch: int | None = None
    size: int | None = None
    precision: str = "fp32"

    @property
    def full_size(self) -> bool:
        return MODELS[self.model].bert

    @property
    def samples(self) -> int:
        return self.batch or (2 if self.full_size else 64)

    @property
    def canvas(self) -> int:
        return self.size or (640 if self.full_size else 64)

    def describe(self) -> dict[str, Any]:
        return {"model": self.model, "B": self.samples, "pixels": self.canvas, "precision": self.precision}


@dataclass(frozen=True)
class StepInputs:
    """A model in training, its teacher a few steps behind, and one batch."""

    case: StepCase
    settings: Settings
    model: GroundingModel
    teacher: MomentumTeacher
    optimizer: torch.optim.Optimizer
    batch: tuple[Tensor, Tensor, Tensor, Tensor]  # what the model takes
    boxes: Tensor  # (B, 4) cxcywh in [0, 1] of the canvas
    box_ratio: Tensor  # (B,) box area / image area
    watch: Watch = field(default_factory=Watch)

    @property
    def region(self) -> BoxRegion:
        return BoxRegion(self.boxes, self.model.grids, rule=RULE)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def autocast(self) -> AbstractContextManager[None]:
        if self.case.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.boxes.device.type, torch.bfloat16)

    def shared_batch(self) -> tuple[Any, Tensor, Tensor, Tensor]:
        """The batch behind what does not train, which student and teacher share."""
        images, padding, *words = self.batch
        return self.model.share(images, padding), padding, *words

    def fusion_weights(self) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's weights of the fusion part, flat: enough to see that an update was right."""
        fusion = {id(parameter) for parameter in self.model.parts()["fusion"]}
        pairs = zip(self.model.parameters(), self.teacher.module.parameters(), strict=True)
        student, teacher = zip(*((s, t) for s, t in pairs if id(s) in fusion), strict=True)
        return _flat(student), _flat(teacher)

    @contextmanager
    def restored_teacher(self) -> Iterator[None]:
        """Whatever happens to the teacher inside is undone."""
        state = {name: tensor.clone() for name, tensor in self.teacher.state_dict().items()}
        yield
        self.teacher.load_state_dict(state)


class StepSuite:
    name = "step"
    case = StepCase
    defaults: Mapping[str, Sequence[Any]] = {"model": ("transvg-r50", "transvg-tiny", "vltvg-tiny", "qrnet-tiny")}
    modes = ("step",)
    rounds, warmup = 10, 1
    baselines = ("plain", "today")

    def inputs(self, case: StepCase, device: torch.device) -> StepInputs:
        generator = torch.Generator().manual_seed(0)
        vocabulary = 30522 if case.full_size else 100
        settings = Settings.for_model(case.model, device=device.type)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build_model(case.model, vocabulary_size=vocabulary, image_size=case.canvas).to(device).train()
        teacher = MomentumTeacher(model, methodcaller("make_tap"), settings.momentum).to(device)
        _leave_behind(teacher, model, generator)

        boxes = draw_boxes(case.samples, model.grids, generator, case.canvas)
        padding = draw_pixel_padding(boxes, generator, case.canvas)
        shape = (case.samples, 3, case.canvas, case.canvas)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        longest = min(model.max_words, 20)
        words = torch.randint(1, vocabulary, (case.samples, longest), generator=generator)
        image_area = (~padding).flatten(1).float().mean(1)
        return StepInputs(
            case=case,
            settings=settings,
            model=model,
            teacher=teacher,
            optimizer=make_optimizer(model, settings),
            batch=(
                model.prepare(images.to(device)),
                padding.to(device),
                words.to(device),
                draw_word_padding(case.samples, longest, generator).to(device),
            ),
            boxes=boxes.to(device),
            box_ratio=(boxes[:, 2:].prod(1) / image_area).to(device),
        )

    def truth(self, inputs: StepInputs) -> dict[str, Results]:
        """On the reference backend, in the case's precision. Without dropout, as all that is held to it."""
        inputs.model.eval()
        momentum = inputs.settings.momentum
        student, teacher_weights = inputs.fusion_weights()
        updated = {"teacher's move": (1 - momentum) * (student - teacher_weights)}
        with inputs.restored_teacher():
            inputs.teacher.update(inputs.model)
            teacher = _teacher_attention(inputs)
            complete = _loss_and_gradient(inputs, teacher)
        return {
            "plain": _plain_loss_and_gradient(inputs),
            "without teacher": _loss_and_gradient(inputs, None),
            "complete": {**complete, **updated},
            "update": updated,
            "teacher": {"map": attention_map(_teacher_attention(inputs))},
        }

    def bytes(self, case: StepCase) -> None:
        return None

    def floor(self, inputs: StepInputs) -> None:
        return None

    def tolerance(self, case: StepCase) -> float:
        return _TOLERANCE[case.precision]


def _flat(parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def loss_and_gradient(inputs: StepInputs, loss: Tensor) -> Results:
    """The loss, the norm of all its gradients, and the fusion's gradient itself.

    A term without a gradient does not show in the loss, and hardly in a norm. (Not in bf16, whose own noise in a
    gradient is larger than many a term.)
    """
    found = torch.autograd.grad(loss, inputs.parameters, allow_unused=True)
    norms = [gradient.norm() for gradient in found if gradient is not None]
    results = {"loss": loss.detach(), "gradient norm": torch.stack(norms).norm()}
    if inputs.case.precision == "fp32":
        fusion = {id(parameter) for parameter in inputs.model.parts()["fusion"]}
        pairs = zip(inputs.parameters, found, strict=True)
        results["fusion's gradient"] = _flat([g for p, g in pairs if id(p) in fusion and g is not None])
    return results


@torch.no_grad()
def _leave_behind(teacher: MomentumTeacher, model: nn.Module, generator: torch.Generator) -> None:
    """Make of a fresh teacher, whose weights are the student's, one that has an average of its own of what trains."""
    for parameter, student in zip(teacher.parameters(), model.parameters(), strict=True):
        if student.requires_grad and parameter.dim() > 1:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(0.05 * parameter.std() * noise)


def _teacher_attention(inputs: StepInputs) -> QueryAttention:
    with inputs.autocast():
        return inputs.teacher.attention(*inputs.batch)


def _loss_and_gradient(inputs: StepInputs, teacher: QueryAttention | None) -> Results:
    tap = inputs.watch.by(inputs.model.make_tap)
    with inputs.autocast(), tap.recording():
        boxes = inputs.model(*inputs.batch)
    terms = attention_terms(tap.attention(), inputs.region, teacher=teacher, backend="reference")
    criterion = AttBalanceLoss(inputs.settings.loss, backend="reference")
    loss = criterion(terms, boxes.float(), inputs.boxes, box_ratio=inputs.box_ratio).loss
    return loss_and_gradient(inputs, loss)


def _plain_loss_and_gradient(inputs: StepInputs) -> Results:
    with inputs.autocast():
        boxes = inputs.model(*inputs.batch)
    criterion = AttBalanceLoss(inputs.settings.loss, backend="reference")
    return loss_and_gradient(inputs, criterion(None, boxes.float(), inputs.boxes).loss)
