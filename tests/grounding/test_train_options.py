"""What the settings promise: precision, accumulation, parts of the model, schedules, streamed and augmented images."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers_toy import ToyDataset, finish, toy_settings
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

from attbalance_ext import AttBalanceConfig
from attbalance_ext.grounding.data import Vocabulary
from attbalance_ext.grounding.data.generate import SCENES
from attbalance_ext.grounding.data.tokenizers import WordTokenizer
from attbalance_ext.grounding.data.transforms import TrainTransform
from attbalance_ext.grounding.distributed import Ranks
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.evaluate import evaluate
from attbalance_ext.grounding.files import load_checkpoint
from attbalance_ext.grounding.models import MODELS, build_model
from attbalance_ext.grounding.optimization import learning_rate_schedule
from attbalance_ext.grounding.runs import start_run
from attbalance_ext.grounding.settings import RULES, Settings
from attbalance_ext.grounding.sources import make_tokenizer
from attbalance_ext.grounding.split import PreparedSplit, StreamedSplit
from attbalance_ext.grounding.train import LAST, Trainer

MakeTrainer = Callable[..., Trainer]
NO_DROPOUT = {**toy_settings().model_options, "dropout": 0.0}


def losses(trainer: Trainer, steps: int) -> list[float]:
    trainer.log_every = 1
    while trainer.step < steps:
        trainer.advance()
    return [record["loss"] for record in trainer.log.history["train"]]


def copies(trainer: Trainer, part: str) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parts()[part]]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, first, second))


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_are_the_whole_batch(make_trainer: MakeTrainer, parts: int) -> None:
    """Without rho, the only thing that looks at other samples."""
    changes = {"loss": AttBalanceConfig(rho="off"), "model_options": NO_DROPOUT}
    whole = make_trainer("whole", **changes)
    cut = make_trainer("cut", accumulate=parts, **changes)
    assert losses(cut, 6) == pytest.approx(losses(whole, 6), rel=1e-5)
    # Neither clipping nor AdamW would let the losses tell a gradient that is some times too large.
    norms = [[record["gradient_norm"] for record in run.log.history["train"]] for run in (cut, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize("seed", [2**43 - 1, 1 - 2**43])
def test_the_largest_seeds_train(seed: int, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(seed=seed)
    trainer.advance()
    with pytest.raises(UserError, match=r"seed must lie between -2\*\*43 and 2\*\*43"):
        make_trainer(seed=seed + (1 if seed > 0 else -1))


def test_batches_that_cannot_be_cut_evenly_are_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(UserError, match="batch_size must be divisible by processes x accumulate, got 8 for 1 x 3"):
        make_trainer(accumulate=3)


def test_frozen_parts_train_later(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(frozen_parts=("text",), frozen_fraction=0.25)
    before = copies(trainer, "text")
    while trainer.step < 6:
        trainer.advance()
    assert same(before, copies(trainer, "text"))
    trainer.advance()
    assert not same(before, copies(trainer, "text"))


def test_parts_have_their_own_learning_rates(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(text_rate=1e-5)
    assert {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups} == {
        "text": 1e-5,
        "fusion": 3e-3,
    }
    frozen = make_trainer("frozen", text_rate=0.0)
    before = copies(frozen, "text")
    finish(frozen)
    assert same(before, copies(frozen, "text"))
    assert [group["name"] for group in frozen.optimizer.param_groups] == ["fusion"]
    with pytest.raises(UserError, match="nothing trains"):
        make_trainer("none", text_rate=0.0, learning_rate=0.0)
    with pytest.raises(UserError, match="frozen_parts: nothing trains at first"):
        make_trainer("frozen", frozen_parts=("text", "fusion"), frozen_fraction=0.5)


def test_schedules() -> None:
    step = learning_rate_schedule(Settings(steps=90, warmup_steps=3, schedule="step"))
    assert [step(n) for n in (0, 1, 2, 3, 59, 60, 89)] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 0.1, 0.1])
    cosine = learning_rate_schedule(Settings(steps=100, warmup_steps=0))
    assert [cosine(n) for n in (0, 50, 100)] == pytest.approx([1.0, 0.5, 0.0])


def test_bf16_follows_fp32(make_trainer: MakeTrainer) -> None:
    full = losses(make_trainer("full", model_options=NO_DROPOUT), 8)
    half = losses(make_trainer("half", model_options=NO_DROPOUT, precision="bf16"), 8)
    assert half != full
    assert half == pytest.approx(full, rel=0.05)


def test_the_teacher_alone_in_bf16(make_trainer: MakeTrainer) -> None:
    """The student's forward pass keeps its bits; the attention it is to follow is rounded, what is averaged is not."""
    same, half = (make_trainer(name, teacher_precision=name) for name in ("same", "bf16"))
    for trainer in (same, half):
        losses(trainer, 4)
    first, other = (trainer.log.history["train"] for trainer in (same, half))
    assert all(first[0][name] == other[0][name] for name in ("box", "rac", "iou"))
    assert other[0]["mrc"] != first[0]["mrc"]
    assert other[3]["mrc"] == pytest.approx(first[3]["mrc"], rel=0.1)
    assert {parameter.dtype for parameter in half.teacher.parameters()} == {torch.float32}
    with pytest.raises(UserError, match="unknown teacher_precision 'fp8'; there is: same, bf16"):
        make_trainer(teacher_precision="fp8")


def test_fp16_leaves_out_steps_that_overflow_and_goes_on(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(precision="fp16", model_options=NO_DROPOUT)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
    before = copies(trainer, "fusion")
    trainer.advance()
    assert same(before, copies(trainer, "fusion"))
    finish(trainer)
    assert not same(before, copies(trainer, "fusion"))
    skipped = [record["skipped"] for record in trainer.log.history["train"]]
    assert 0 < skipped[0] <= 1
    state = load_checkpoint(trainer.directory / LAST)
    assert state["scaler"]["scale"] == trainer.scaler.get_scale() < 2.0**26
    resumed = make_trainer("resumed", precision="fp16", model_options=NO_DROPOUT)
    resumed.load_state_dict(state)
    assert resumed.scaler.state_dict() == trainer.scaler.state_dict()


def test_clipping_sees_gradients_as_they_are(make_trainer: MakeTrainer) -> None:
    """And not scaled for fp16."""
    norms = []
    for precision in ("fp32", "fp16"):
        trainer = make_trainer(precision, precision=precision, model_options=NO_DROPOUT)
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=precision == "fp16")
        losses(trainer, 1)
        norms.append(trainer.log.history["train"][0]["gradient_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_no_clipping(make_trainer: MakeTrainer) -> None:
    clipped, free = make_trainer("clipped", clip=1e-3), make_trainer("free", clip=None)
    for trainer in (clipped, free):
        losses(trainer, 1)
    norms = [trainer.log.history["train"][0]["gradient_norm"] for trainer in (clipped, free)]
    assert norms[0] == norms[1] > 1e-3
    total = math.sqrt(sum(float(p.grad.square().sum()) for p in free.parameters if p.grad is not None))
    assert total == pytest.approx(norms[1], rel=1e-5)


def test_the_box_ratio_is_that_of_the_data(make_trainer: MakeTrainer) -> None:
    """Of a letterboxed picture it is not the box's area on the canvas."""
    trainer = make_trainer()
    assert isinstance(trainer.split, PreparedSplit)
    trainer.split.box_ratio = torch.linspace(0.1, 0.9, len(trainer.split))
    losses(trainer, 1)
    ratio = trainer.split.box_ratio[trainer.order.indices(0)]
    expected = (0.5 + torch.sigmoid(1 - ratio)).mean().item()
    assert trainer.log.history["train"][0]["odw"] == pytest.approx(expected, rel=1e-5)


def test_terms_follow_the_rule_of_the_settings(make_trainer: MakeTrainer) -> None:
    found = set()
    for rule in RULES:
        trainer = make_trainer(rule, rule=rule)
        losses(trainer, 1)
        found.add((*tuple(trainer.log.history["train"][0]["rho"]), trainer.log.history["train"][0]["rac"]))
    assert len(found) == len(RULES)


def test_epochs_become_steps(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCENES, "train", 20)
    monkeypatch.setitem(SCENES, "val", 4)
    trainer = start_run(Settings(epochs=3, batch_size=8, pretrain_steps=0), tmp_path / "run", cache=cache)
    assert trainer.settings.steps == 3 * (len(trainer.split) // 8)
    assert trainer.settings.epochs is None


def test_validation_on_some_samples_spans_the_split(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    whole = evaluate(trainer.model, trainer.split)
    some = evaluate(trainer.model, trainer.split, samples=8)
    torch.testing.assert_close(some.boxes, whole.boxes[::4])


@pytest.mark.parametrize("model", list(MODELS))
def test_recipes_are_settings(model: str) -> None:
    settings = Settings.for_model(model, loss={"rho": "off"}, steps=7)
    assert (settings.model, settings.steps, settings.loss.rho) == (model, 7, "off")
    assert Settings.from_dict(settings.to_dict()) == settings
    if "vltvg" in model:
        assert (settings.loss.alpha_l1, settings.loss.alpha_giou) == (5.0, 2.0)
    if not model.endswith("tiny"):
        assert settings.epochs is None
        assert Settings.for_model(model).epochs == 90
        assert (settings.size, settings.learning_rate, settings.vision_rate, settings.schedule) == (
            640,
            1e-4,
            1e-5,
            "step",
        )


def test_processes_share_their_average_rho(make_trainer: MakeTrainer) -> None:
    """Else the one that is saved is the main process's, and the others resume with another."""

    class Two(Ranks):
        def mean(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: value + 1 for name, value in values.items()}

    alone, together = (make_trainer(name, loss=AttBalanceConfig(rho="ema")) for name in ("alone", "together"))
    together.ranks = Two()
    for trainer in (alone, together):
        trainer.advance()
    torch.testing.assert_close(together.criterion.rho_average, alone.criterion.rho_average + 1)


def test_pretrained_bert_needs_its_tokenizer() -> None:
    dataset = ToyDataset(1)
    settings = Settings.for_model("transvg-r50", model_options={"text_weights": "folder"})
    with pytest.raises(UserError, match="text_weights need the tokenizer"):
        make_tokenizer(settings, dataset)


# --- streamed images --------------------------------------------------------------------------------------------------


def streamed(model_options: dict[str, object], workers: int = 0, augment: bool = True) -> StreamedSplit:
    dataset = ToyDataset(16)
    tokenizer = WordTokenizer(Vocabulary.build(dataset.sentences))
    torch.manual_seed(0)
    model = build_model("transvg-tiny", vocabulary_size=len(tokenizer), image_size=32, **model_options)
    transform = TrainTransform(32) if augment else None
    return StreamedSplit(dataset, tokenizer, model, torch.device("cpu"), augment=transform, seed=3, workers=workers)


def plan(start: int) -> list[tuple[torch.Tensor, int]]:
    return [(torch.tensor([step, step + 3]), step // 2) for step in range(start, 6)]


def test_batches_depend_on_seed_epoch_and_sample_alone() -> None:
    split = streamed(NO_DROPOUT)
    batches = list(split.stream(plan(0)))
    for other in (split.stream(plan(2)), streamed(NO_DROPOUT, workers=2).stream(plan(2))):
        for batch, expected in itertools.zip_longest(other, batches[2:]):
            for name, value in vars(expected).items():
                assert torch.equal(getattr(batch, name), value), name
    first, second = (next(split.stream([(torch.tensor([1]), epoch)])) for epoch in (0, 1))
    assert not torch.equal(first.images, second.images)


def test_workers_are_sent_no_model() -> None:
    """Where workers do not fork, all that they need is pickled for them."""
    split = streamed({**NO_DROPOUT, "hidden": 4096})
    sent = pickle.dumps((split.views, split.collate))
    assert len(sent) < 4 * sum(parameter.numel() for parameter in split.prepare.__self__.parameters()) / 2  # type: ignore[attr-defined]
    views, collate = pickle.loads(sent)
    assert torch.equal(collate([views[3, None]]).words, split.batch(torch.tensor([3])).words)


def test_a_worker_says_what_is_wrong_in_one_line() -> None:
    class Broken(ToyDataset):
        def pixels(self, index: int) -> Image.Image:
            raise UserError(f"picture {index} cannot be read")

    split = streamed(NO_DROPOUT, workers=1)
    split.views.pictures = Broken(16)
    with pytest.raises(UserError, match=r"^picture 0 cannot be read$"):
        next(split.stream(plan(0)))


def test_batches_are_pinned_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data loader pins what says how; of anything else it pins nothing."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    batch = streamed(NO_DROPOUT).batch(torch.tensor([0, 1]))
    pinned = pin_memory(batch)
    for name, value in vars(batch).items():
        assert getattr(pinned, name) is not value
        assert torch.equal(getattr(pinned, name), value)


def test_streamed_without_augmentation_is_what_is_in_memory() -> None:
    split = streamed(NO_DROPOUT, augment=False)
    model = build_model("transvg-tiny", vocabulary_size=len(split.tokenizer), image_size=32, **NO_DROPOUT)
    model.prepare = split.prepare  # type: ignore[method-assign]
    prepared = PreparedSplit(split.pictures, split.tokenizer, model, torch.device("cpu"))  # type: ignore[arg-type]
    indices = torch.tensor([0, 5, 9])
    one, other = split.batch(indices), prepared.batch(indices)
    for name in ("images", "words", "word_padding", "boxes", "box_ratio"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name))
    assert one.padding is not None
    assert not one.padding.any()


def test_a_batch_is_as_long_as_its_longest_sentence() -> None:
    dataset = ToyDataset(2)
    dataset.sentences = ["square", "the red square", "the big red square", "red square"]
    tokenizer = WordTokenizer(Vocabulary.build(dataset.sentences))
    model = build_model("transvg-tiny", vocabulary_size=len(tokenizer), image_size=32, **NO_DROPOUT)
    batch = PreparedSplit(dataset, tokenizer, model, torch.device("cpu")).batch(torch.tensor([0, 1, 3]))  # type: ignore[arg-type]
    words, padding = tokenizer.encode([dataset.sentences[index] for index in (0, 1, 3)], model.max_words)
    assert torch.equal(batch.words, words)
    assert torch.equal(batch.word_padding, padding)


def test_a_streamed_run_resumes_exactly(make_trainer: MakeTrainer) -> None:
    def make(directory: str) -> Trainer:
        trainer = make_trainer(directory)
        trainer.split = streamed(toy_settings().model_options)
        trainer.split.prepare = trainer.model.prepare
        return trainer

    whole = make("whole")
    expected = losses(whole, 12)
    first = make("cut")
    losses(first, 7)
    second = make("cut")
    second.load_state_dict(load_checkpoint(first.save()))
    assert losses(second, 12) == expected
