"""The trainer: learns, stops, and goes on with the same bits after a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_toy import finish

from attbalance_ext.grounding.distributed import Ranks
from attbalance_ext.grounding.errors import TrainingFailed
from attbalance_ext.grounding.evaluate import evaluate
from attbalance_ext.grounding.files import load_checkpoint
from attbalance_ext.grounding.fit import fit
from attbalance_ext.grounding.order import DataOrder
from attbalance_ext.grounding.train import BEST, LAST, Trainer

MakeTrainer = Callable[..., Trainer]


def without_times(trainer: Trainer) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "step_ms"} for record in trainer.log.history["train"]]


def test_learns_a_tiny_set_by_heart(make_trainer: MakeTrainer) -> None:
    options = {"dim": 64, "heads": 2, "hidden": 64, "layers": 3, "supervised": [1, 2], "max_words": 6}
    trainer = make_trainer(
        scenes=4, steps=250, learning_rate=3e-3, batch_size=8, validate_every=250, model_options=options
    )
    finish(trainer)
    metrics = evaluate(trainer.model, trainer.split).metrics()
    assert metrics["acc50"] >= 0.75  # it takes ever so little to miss a 9-pixel square by half
    assert min(metrics["in_box"][1:]) > 0.9
    assert trainer.log.history["train"][-1]["box"] < 0.4


def test_plain_and_attbalance_start_alike_and_see_the_same_batches(make_trainer: MakeTrainer) -> None:
    plain, full = make_trainer("plain", attbalance=False), make_trainer("full")
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters, full.parameters, strict=True))
    for trainer in (plain, full):
        trainer.log_every = 1
        trainer.advance()
    # The first step's boxes come from the same weights, samples and dropout, whatever the loss adds.
    assert plain.log.history["train"][0]["box"] == full.log.history["train"][0]["box"]
    assert plain.log.history["train"][0]["loss"] != full.log.history["train"][0]["loss"]


def test_trainers_that_take_turns_do_not_disturb_each_other(make_trainer: MakeTrainer) -> None:
    alone = {name: finish(make_trainer(f"{name}-alone", attbalance=name == "full")) for name in ("plain", "full")}
    together = {name: make_trainer(name, attbalance=name == "full") for name in ("plain", "full")}
    fit(together)
    for name, trainer in together.items():
        assert without_times(trainer) == without_times(alone[name])


@pytest.mark.parametrize("rho", ["batch", "ema"])
@pytest.mark.parametrize("stop", [7, 12, 19])
def test_resumes_exactly(make_trainer: MakeTrainer, stop: int, rho: str) -> None:
    """Killed inside a log window (7), at a validation (12) and after the terms went off (19)."""
    from attbalance_ext import AttBalanceConfig

    changes = {"loss": AttBalanceConfig(rho=rho), "early_stop": 5}
    whole = finish(make_trainer("whole", **changes))
    first = make_trainer("resumed", **changes)
    while first.step < stop:
        first.advance()
    first.save()
    second = make_trainer("resumed", **changes)
    second.load_state_dict(load_checkpoint(second.directory / LAST))
    finish(second)
    assert without_times(second) == without_times(whole)
    assert second.log.history["validation"] == whole.log.history["validation"]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_a_kill_between_checkpoints_loses_only_the_steps_since(make_trainer: MakeTrainer) -> None:
    whole = finish(make_trainer("whole"))
    killed = make_trainer("killed")
    while killed.step < 17:  # validated and saved at 12; nothing is saved now
        killed.advance()
    second = make_trainer("killed")
    second.load_state_dict(load_checkpoint(second.directory / LAST))
    assert second.step == 12
    assert without_times(finish(second)) == without_times(whole)


def test_resumes_in_a_trainer_that_has_gone_further(make_trainer: MakeTrainer) -> None:
    """It has read the batches of its own steps ahead."""
    whole, trainer = finish(make_trainer("whole")), make_trainer("back")
    while trainer.step < 15:
        trainer.advance()
    trainer.load_state_dict(load_checkpoint(trainer.directory / LAST))
    assert trainer.step == 12
    assert without_times(finish(trainer)) == without_times(whole)


def test_each_step_and_process_draws_random_numbers_of_its_own(make_trainer: MakeTrainer) -> None:
    class Whole(Ranks):
        def share(self, indices: torch.Tensor) -> torch.Tensor:
            return indices

    seeds = []
    for rank in (0, 1):
        trainer = make_trainer(f"{rank}")
        trainer.ranks = Whole(rank=rank)
        for _ in range(3):
            trainer.advance()
            seeds.append(torch.initial_seed())
    assert len(set(seeds)) == 6


def test_the_teacher_is_averaged_before_every_step(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(momentum=0.75)
    for _ in range(2):
        trainer.advance()
    assert trainer.teacher is not None
    student = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    average = [parameter.clone() for parameter in trainer.teacher.module.parameters()]
    trainer.advance()
    for now, old, new in zip(trainer.teacher.module.parameters(), average, student, strict=True):
        torch.testing.assert_close(now, 0.75 * old + 0.25 * new)
    assert any(not torch.equal(old, new) for old, new in zip(average, student, strict=True))


def test_terms_end_after_their_fraction(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(terms_fraction=0.5)
    trainer.log_every = 1
    finish(trainer)
    with_terms = [record["step"] for record in trainer.log.history["train"] if "rac" in record]
    assert with_terms == list(range(1, 13))
    assert trainer.teacher is None
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in trainer.model.modules())


def test_stops_early_and_keeps_the_best(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    from attbalance_ext.grounding import train

    accuracies = iter([0.2, 0.5, 0.4, 0.5, 0.9])

    def scripted(*_: Any, **__: Any) -> Any:
        class Result:
            def metrics(self) -> dict[str, Any]:
                return {"acc50": next(accuracies), "in_box": [], "rho": []}

        return Result()

    monkeypatch.setattr(train, "evaluate", scripted)
    trainer = finish(make_trainer(validate_every=3, early_stop=2))
    assert trainer.step == 12  # best at 6, then two validations without a gain
    assert load_checkpoint(trainer.directory / BEST)["step"] == 6
    assert load_checkpoint(trainer.directory / LAST)["step"] == 12


def test_resumes_its_patience(make_trainer: MakeTrainer) -> None:
    """What did not gain before the kill counts."""
    changes = {"validate_every": 1, "early_stop": 3, "learning_rate": 1e-9}
    first, second = make_trainer(**changes), make_trainer(**changes)
    for _ in range(2):
        first.advance()
    assert first.validations_without_gain == 1
    second.load_state_dict(load_checkpoint(first.save()))
    assert finish(second).step == 4


@pytest.mark.parametrize("checkpoint_every", [None, 20])
def test_stopping_early_is_an_end_like_any_other(make_trainer: MakeTrainer, checkpoint_every: int | None) -> None:
    """With a record of its steps and a last checkpoint, whatever else is due then."""
    changes = {"validate_every": 1, "early_stop": 2, "checkpoint_every": checkpoint_every}
    trainer = finish(make_trainer(learning_rate=1e-9, **changes))
    assert trainer.step == 3
    assert [record["step"] for record in trainer.log.history["train"]] == [3]
    assert load_checkpoint(trainer.directory / LAST)["step"] == 3


def test_a_loss_that_is_not_finite_stops_and_spares_the_checkpoint(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    while trainer.step < 12:
        trainer.advance()
    with torch.no_grad():
        trainer.parameters[0].fill_(float("nan"))
    with pytest.raises(TrainingFailed, match=r"(?s)not finite.*loss.*last\.pt"):
        finish(trainer)
    with pytest.raises(TrainingFailed):
        trainer.save()
    good = load_checkpoint(trainer.directory / LAST)
    assert good["step"] == 12
    assert all(value.isfinite().all() for value in good["model"].values())


def test_the_frozen_encoder_never_changes(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    before = {name: value.clone() for name, value in trainer.model.image_encoder.state_dict().items()}
    finish(trainer)
    for name, value in trainer.model.image_encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_writes_tensorboard_records(make_trainer: MakeTrainer) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = finish(make_trainer())
    events = EventAccumulator(str(trainer.directory / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("validation/acc50")] == [12, 24]
    recorded = [event.value for event in events.Scalars("train/loss")]
    assert recorded == pytest.approx([record["loss"] for record in trainer.log.history["train"]])


def test_data_order_shows_every_sample_once_an_epoch() -> None:
    order = DataOrder(samples=20, batch_size=5, seed=3)
    first = torch.cat([order.indices(step) for step in range(4)])
    second = torch.cat([order.indices(step) for step in range(4, 8)])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(20))
    assert not torch.equal(first, second)
    assert torch.equal(DataOrder(20, 5, 3).indices(6), order.indices(6))
    assert not torch.equal(DataOrder(20, 5, 4).indices(6), order.indices(6))


def test_settings_survive_json(tmp_path: Path) -> None:
    import json

    from attbalance_ext import AttBalanceConfig
    from attbalance_ext.grounding.settings import Settings

    settings = Settings(loss=AttBalanceConfig(rho=(0.1, 0.2, 0.3)), early_stop=3, model_options={"dim": 32})
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
