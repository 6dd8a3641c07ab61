"""A loss or gradient that is not finite: the run stops with the batch saved, or leaves the step out as configured."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_command import Command, call, history
from helpers_faults import OPTIONS, contents

from attbalance_ext import AttBalanceConfig
from attbalance_ext.grounding.distributed import Ranks
from attbalance_ext.grounding.errors import TrainingFailed
from attbalance_ext.grounding.files import load_checkpoint
from attbalance_ext.grounding.split import PreparedSplit
from attbalance_ext.grounding.train import LAST, NOT_FINITE, Trainer

pytestmark = pytest.mark.usefixtures("few_scenes")

STEPS = [*OPTIONS, "--checkpoint-every", "1", "--steps", "12"]
MakeTrainer = Callable[..., Trainer]

POISON = """
from attbalance_ext.grounding.split import PreparedSplit
make = PreparedSplit.__init__
def poisoned(self, dataset, *arguments):
    make(self, dataset, *arguments)
    if dataset.split == "train":
        self.prepared[{scene}] = float("nan")
PreparedSplit.__init__ = poisoned
"""
SCENE = 0


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture of the training data makes NaN of whatever looks at it."""
    monkeypatch.setattr(PreparedSplit, "__init__", PreparedSplit.__init__)  # put back afterwards
    exec(POISON.format(scene=SCENE), {})


def finite(state: dict[str, Any]) -> bool:
    """Every weight of the model, its teacher and optimizer, and the average rho."""
    tensors = [*state["model"].values(), *(state["teacher"] or {}).values(), *state["criterion"].values()]
    tensors += [value for moments in state["optimizer"]["state"].values() for value in moments.values()]
    return all(tensor.isfinite().all() for tensor in tensors)


@pytest.mark.usefixtures("poisoned")
def test_nan_stops_with_the_batch_saved_and_skipping_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run, other = tmp_path / "a run", tmp_path / "other"
    assert call("train", "--out", run, *STEPS) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    kept = torch.load(run / NOT_FINITE, weights_only=True)
    step = kept["step"]
    assert said.startswith(f"attbalance: not finite in step {step}: gradient_norm, loss, ")
    assert f"Its batch, to look at with torch.load: {run / NOT_FINITE}. " in said
    assert f"{run / LAST} of step {step - 1}; go on with: attbalance train --resume '{run}'" in said
    assert load_checkpoint(run / LAST)["step"] == step - 1
    assert finite(load_checkpoint(run / LAST))

    (batch,) = kept["batches"]
    bad = batch["images"].isnan().flatten(1).any(1)
    assert [picture == str(SCENE) for picture in kept["pictures"]] == bad.tolist()
    assert bad.any()
    assert not bad.all()
    assert len(kept["sentences"]) == len(kept["indices"]) == len(batch["boxes"]) == 8
    assert {"loss", "gradient_norm"} <= set(kept["not_finite"])

    before = contents(run)
    assert call("train", "--resume", run) == 1, "the same again"
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert contents(run) == before

    with caplog.at_level(logging.WARNING):
        assert call("train", "--resume", run, "--on-nan", "skip") == 0
    assert f"step {step} is left out: not finite: " in caplog.text
    left_out = caplog.text.count("is left out")
    end = load_checkpoint(run / LAST)
    assert (end["step"], end["settings"]["on_nan"]) == (12, "skip")
    assert finite(end)
    assert call("train", "--out", other, *STEPS, "--on-nan", "skip") == 0
    assert f"{left_out} steps were left out" in capsys.readouterr().err
    assert 0 < history(other)["train"][0]["skipped"] <= left_out / 10 + 1e-6
    for name, value in load_checkpoint(other / LAST)["model"].items():
        assert torch.equal(end["model"][name], value), name


@pytest.mark.parametrize(
    ("choice", "says"),
    [("stop", "not finite in step 2: "), ("skip", "each of the 10 steps up to step 20 was left out")],
)
def test_nan_from_the_weights_stops_either_way(
    choice: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate so large that no batch is to blame; nothing is written over a good state."""
    run = tmp_path / "run"
    options = ["--steps", "30", "--lr", "1e30", "--warmup-steps", "0", "--validate-every", "30", "--on-nan", choice]
    assert call("train", "--out", run, *OPTIONS, *options) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert says in said
    assert "Nothing was saved yet" in said
    assert not (run / LAST).exists()
    assert torch.load(run / NOT_FINITE, weights_only=True)["step"] == (2 if choice == "stop" else 20)


def test_weights_that_are_not_finite_are_not_saved(make_trainer: MakeTrainer) -> None:
    """After a step whose loss and gradient were: only the next one would show it."""
    trainer = make_trainer(checkpoint_every=1)
    trainer.advance()
    before = (trainer.directory / LAST).read_bytes()
    with torch.no_grad():
        trainer.parameters[0].fill_(float("inf"))
    with pytest.raises(TrainingFailed, match=r"not finite after step 1: the weights .*of step 1; go on with"):
        trainer.save()
    assert (trainer.directory / LAST).read_bytes() == before


def poison(trainer: Trainer, index: int) -> Trainer:
    trainer.split.prepared[trainer.split.scene_index[index]] = float("nan")  # type: ignore[attr-defined]
    trainer.log_every = 1
    return trainer


@pytest.mark.parametrize("changes", [{"precision": "fp16"}, {"accumulate": 2}, {"terms_fraction": 0.0}])
def test_a_skipped_step_changes_nothing_whatever_the_settings(
    changes: dict[str, Any], make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(on_nan="skip", loss=AttBalanceConfig(rho="ema"), **changes)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=trainer.scaler.is_enabled())
    trainer.advance()
    poison(trainer, int(trainer.order.indices(1)[0]))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    rho = trainer.criterion.rho_average.clone()
    trainer.log_every = 100
    trainer.advance()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert torch.equal(trainer.criterion.rho_average, rho)
    assert trainer.scheduler.last_epoch == trainer.step == 2
    kept = torch.load(trainer.directory / NOT_FINITE, weights_only=True)
    assert kept["step"] == 2
    assert len(kept["batches"]) == trainer.settings.accumulate
    trainer.advance()
    assert finite(trainer.state_dict())


def test_all_processes_skip_what_one_of_them_must(make_trainer: MakeTrainer) -> None:
    """Here every value is finite, and another process's is not."""

    class Two(Ranks):
        def any(self, flag: bool) -> bool:
            return True

        def gather(self, value: Any) -> list[Any]:
            return [value, ["loss"]]

    trainer = make_trainer(on_nan="skip")
    trainer.ranks = Two()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.advance()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert not trainer.log.usable
    assert torch.load(trainer.directory / NOT_FINITE, weights_only=True)["not_finite"] == ["loss"]


@pytest.mark.slow
def test_two_processes_skip_the_steps_that_one_skips(tmp_path: Path, cache: Path) -> None:
    command = Command(tmp_path, cache, prelude=POISON.format(scene=SCENE))
    one, two = tmp_path / "one", tmp_path / "two"
    options = [*STEPS, "--rho", "global", "--on-nan", "skip"]
    command.run("train", "--out", one, *options)
    command.run("train", "--out", two, *options, processes=2)
    for run in (one, two):
        assert finite(load_checkpoint(run / LAST))
    for record, expected in zip(history(two)["train"], history(one)["train"], strict=True):
        assert record["skipped"] == expected["skipped"]
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    kept = [torch.load(run / NOT_FINITE, weights_only=True) for run in (one, two)]
    assert [len(each["batches"]) for each in kept] == [1, 2]
    assert kept[0]["indices"] == kept[1]["indices"]


def test_an_unknown_choice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--out", tmp_path / "run", "--on-nan", "hope") == 2
    assert capsys.readouterr().err == "attbalance: unknown on_nan 'hope'; there is: stop, skip\n"
