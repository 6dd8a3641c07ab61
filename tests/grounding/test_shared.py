"""What student and teacher share of a step is computed once, and nobody can tell from any bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers_compile import assert_same_curve, fresh_compiler, graphs
from helpers_models import CANVAS, WORDS, problem
from helpers_toy import ToyDataset
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from attbalance_ext.grounding.compilation import compiled
from attbalance_ext.grounding.data import Vocabulary
from attbalance_ext.grounding.data.tokenizers import WordTokenizer
from attbalance_ext.grounding.models import GroundingModel, build_model
from attbalance_ext.grounding.settings import Settings
from attbalance_ext.grounding.split import StreamedSplit
from attbalance_ext.grounding.train import Trainer

pytest.importorskip("transformers")
from attbalance_ext.grounding.models import text_branch, visual_branch
from attbalance_ext.grounding.models.visual_branch import Shared, VisualBranch

FROZEN = 2
"""Steps of a run in which vision and text do not train."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published models with a block in each of the ResNet's stages and a layer of BERT."""
    monkeypatch.setitem(visual_branch.DEPTHS, 50, [1, 1, 1, 1])
    monkeypatch.setitem(text_branch.BERT_BASE, "num_hidden_layers", 4)
    monkeypatch.setitem(text_branch.BERT_BASE, "intermediate_size", 64)


def build(name: str = "vltvg-r50", words: int = WORDS) -> GroundingModel:
    torch.manual_seed(0)
    return build_model(name, vocabulary_size=words, image_size=CANVAS)


def stage(index: int) -> Callable[[VisualBranch], nn.Module]:
    return lambda branch: branch.resnet.encoder.stages[index]


FREEZES = {
    "as published": ([], 2),
    "one stage more": ([stage(1)], 3),
    "not behind what trains": ([stage(2), stage(3)], 2),
    "the whole branch": ([lambda branch: branch], 6),
}


@pytest.mark.parametrize("freeze", FREEZES)
@pytest.mark.parametrize("name", ["transvg-r50", "vltvg-r50"])
def test_boxes_gradients_and_attention_have_the_same_bits(name: str, freeze: str) -> None:
    model = build(name).train()
    parts, done = FREEZES[freeze]
    for part in parts:
        part(model.visual_branch).requires_grad_(False)
    images, padding, *words = problem(model)
    shared = model.share(images, padding)
    assert isinstance(shared, Shared)
    assert shared.done == done
    assert not shared.features.requires_grad

    results = []
    for start in (images, shared):
        torch.manual_seed(1)  # dropout
        tap = model.make_tap()
        with tap.recording():
            boxes = model(start, padding, *words)
        attention = tap.attention()
        tap.remove()
        torch.autograd.backward([boxes.sum(), *(key.square().sum() for key in attention.key)])
        results.append([boxes, *attention.query, *attention.key, *gradients(model)])
        model.zero_grad(set_to_none=True)
    assert all(map(torch.equal, *results))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("name", ["transvg-tiny", "vltvg-tiny", "qrnet-tiny"])
def test_what_is_prepared_is_shared_as_it_is(name: str) -> None:
    model = build_model(name, vocabulary_size=WORDS, image_size=32)
    images, padding, *_ = problem(model)
    assert model.share(images, padding) is images


# --- in training ------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    def make(**changes: Any) -> Trainer:
        frozen = {"frozen_parts": ("vision", "text"), "frozen_fraction": FROZEN / 100}
        settings = Settings.for_model(
            "vltvg-r50",
            size=CANVAS,
            augment=False,
            steps=100,
            batch_size=4,
            validate_every=100,
            **{**frozen, **changes},
        )
        dataset = ToyDataset(4)
        tokenizer = WordTokenizer(Vocabulary.build(dataset.sentences))
        model = build(words=len(tokenizer))
        split = StreamedSplit(dataset, tokenizer, model, torch.device("cpu"))
        trainer = Trainer(settings, model, split, split, tmp_path)
        trainer.log_every = 1
        return trainer

    return make


def share_nothing(trainer: Trainer) -> Trainer:
    trainer.model.share = lambda images, padding: images  # type: ignore[method-assign]
    return trainer


def advanced(trainer: Trainer, steps: int) -> Trainer:
    while trainer.step < steps:
        trainer.advance()
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [record["loss"] for record in trainer.log.history["train"]]


def assert_same_run(trainer: Trainer, other: Trainer) -> None:
    assert losses(trainer) == losses(other)
    state, expected = trainer.state_dict(), other.state_dict()
    for part in ("model", "teacher"):
        for name, value in expected[part].items():
            assert torch.equal(state[part][name], value), name


def test_a_run_has_the_same_bits_while_parts_are_frozen_and_after(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer()
    ran = []
    for index, part in enumerate(trainer.teacher.module.visual_branch.convolutions()):
        part.register_forward_hook(lambda *_, index=index: ran.append(index))
    advanced(trainer, FROZEN)
    assert ran == [], "the teacher ran what its student had run"
    advanced(trainer, FROZEN + 2)
    assert ran == [2, 3, 4, 5] * 2
    assert_same_run(trainer, advanced(share_nothing(make_trainer()), FROZEN + 2))


@pytest.mark.parametrize("stop", [FROZEN - 1, FROZEN, FROZEN + 1])
def test_a_resumed_run_shares_the_same(make_trainer: Callable[..., Trainer], stop: int) -> None:
    """Stopped while parts are frozen, when they are about to train, and when they do."""
    trainer = make_trainer()
    state = copy.deepcopy(advanced(trainer, stop).state_dict())
    resumed = make_trainer()
    resumed.load_state_dict(state)
    assert_same_run(advanced(resumed, FROZEN + 2), advanced(trainer, FROZEN + 2))


def test_accumulated_parts_share_too(make_trainer: Callable[..., Trainer]) -> None:
    runs = [make_trainer(accumulate=2), share_nothing(make_trainer(accumulate=2))]
    assert_same_run(*(advanced(run, FROZEN + 1) for run in runs))


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_takes_what_is_shared(make_trainer: Callable[..., Trainer]) -> None:
    trainer, alone = make_trainer(frozen_parts=()), make_trainer(frozen_parts=())
    trainer.network = DistributedDataParallel(trainer.model)
    assert_same_run(advanced(trainer, 2), advanced(alone, 2))


@pytest.mark.slow
def test_a_compiled_step_follows_what_trains(make_trainer: Callable[..., Trainer]) -> None:
    eager, trainer = make_trainer(), make_trainer()
    with fresh_compiler():
        trainer.objective = compiled(trainer.objective, "aot_eager")
        for run in (eager, trainer):
            advanced(run, FROZEN + 1)
        assert graphs() == 2
    assert_same_curve(losses(trainer), losses(eager))
