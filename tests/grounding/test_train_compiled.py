"""The trainer with ``compile``: trains as without, and resumes with the same bits. The command is in test_cli.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers_compile import assert_same_curve, fresh_compiler, graphs
from helpers_toy import finish

from attbalance_ext.grounding.compilation import compiled, require_compiler
from attbalance_ext.grounding.files import load_checkpoint
from attbalance_ext.grounding.train import LAST, Trainer

MakeTrainer = Callable[..., Trainer]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    with fresh_compiler():
        yield


OPTIONS = {"dim": 32, "heads": 2, "hidden": 32, "layers": 1, "supervised": [0], "max_words": 6}


def losses(trainer: Trainer) -> list[float]:
    return [record["loss"] for record in trainer.log.history["train"]]


@pytest.mark.slow
def test_a_compiled_run_follows_an_eager_one_and_resumes_with_the_same_bits(make_trainer: MakeTrainer) -> None:
    def make(directory: str, compile_it: bool = True) -> Trainer:
        trainer = make_trainer(
            directory, compile=compile_it, steps=6, validate_every=3, terms_fraction=1.0, model_options=OPTIONS
        )
        trainer.log_every = 1
        return trainer

    whole = make("whole")
    while whole.step < 3:
        whole.advance()
    state = load_checkpoint(whole.directory / LAST)
    finish(whole)
    assert graphs() == 1
    assert_same_curve(losses(whole), losses(finish(make("eager", compile_it=False))), bound=1e-4)

    resumed = make("resumed")
    resumed.load_state_dict(state)
    assert resumed.step == 3
    assert losses(finish(resumed)) == losses(whole)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_one_graph_with_the_terms_and_one_without(make_trainer: MakeTrainer) -> None:
    """The taps of a validation in between change neither."""
    changes = {"steps": 8, "terms_fraction": 0.5, "validate_every": 2, "model_options": OPTIONS}
    eager, trainer = make_trainer("eager", **changes), make_trainer("compiled", **changes)
    trainer.objective = compiled(trainer.objective, "aot_eager")
    for run in (eager, trainer):
        run.log_every = 1
        finish(run)
    assert_same_curve(losses(trainer), losses(eager))
    assert graphs() == 2


def test_a_compiler_that_is_there_is_found() -> None:
    require_compiler(torch.device("cpu"))
