"""The examples run, put attention into the box, go on after a stop, and are what README shows."""

from __future__ import annotations

import ast
import difflib
import os
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from attbalance_ext import MomentumTeacher

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples"
FILES = sorted(path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py"))

SMALL = {  # arguments that make a run short; OUT is a folder of the test's
    "pure_torch.py": ["--steps", "20"],
    "transvg_style/attbalance.py": ["--steps", "10"],
    "vltvg_style.py": ["--steps", "20"],
    "qrnet_grids.py": ["--steps", "20"],
    "detr_transformers.py": ["--steps", "20"],
    "tutorial.py": ["--steps", "30", "--out", "OUT"],
    "lightning_module.py": ["--epochs", "3", "--batches", "12", "--out", "OUT"],
    "accelerate_loop.py": ["--epochs", "3", "--batches", "12", "--out", "OUT"],
    "hf_trainer.py": ["--epochs", "3", "--batches", "12", "--out", "OUT"],
}
CHECKPOINTS = {  # of the last epoch of three
    "lightning_module.py": "last.ckpt",
    "accelerate_loop.py": "epoch_003/custom_checkpoint_0.pkl",
    "hf_trainer.py": "checkpoint-18/teacher.pt",
}
NO_RECIPES = {"transvg_style/plain.py", "transvg_style/transvg.py"}  # what a recipe starts from


@pytest.fixture(autouse=True)
def _clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What examples leave in this process is gone afterwards: modules beside them, the environment."""
    environment = dict(os.environ)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    yield
    sys.modules.pop("transvg", None)
    os.environ.clear()
    os.environ.update(environment)


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = EXAMPLES / name
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *arguments])
        patch.syspath_prepend(str(path.parent))  # as for any script
        runpy.run_path(str(path), run_name="__main__")


def attention(output: str) -> list[float]:
    """The printed attention in the box, in order."""
    return [float(value) for value in re.findall(r"attention in the box (\d\.\d+)", output)]


def definitions(name: str) -> dict[str, str]:
    """The source of every top-level statement that gives something a name, by that name."""
    source = (EXAMPLES / name).read_text()
    named = {}
    for node in ast.parse(source).body:
        text = ast.get_source_segment(source, node)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            named[node.name] = "\n".join(line for line in [*map(ast.unparse, node.decorator_list), text or ""])
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            named[node.targets[0].id] = text or ""
    return named


def added_and_removed(plain: str, attbalance: str) -> tuple[list[str], list[str]]:
    """Lines, indentation and blank ones aside, that turn one text into the other."""
    before, after = ([line.strip() for line in text.splitlines() if line.strip()] for text in (plain, attbalance))
    lines = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    return [line[2:] for line in lines if line[0] == "+"], [line[2:] for line in lines if line[0] == "-"]


def test_every_recipe_is_run() -> None:
    assert set(SMALL) | NO_RECIPES == set(FILES)


@pytest.mark.parametrize("name", SMALL)
def test_attention_goes_into_the_box(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(name, *(str(tmp_path) if word == "OUT" else word for word in SMALL[name]), monkeypatch=monkeypatch)
    first, *_, last = attention(capsys.readouterr().out)
    assert last > first + 0.05


def test_plain_training_of_the_transvg_style_repository_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("transvg_style/plain.py", "--steps", "2", monkeypatch=monkeypatch)
    assert "loss" in capsys.readouterr().out


def test_the_tutorial_draws_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("tutorial.py", "--steps", "3", "--out", str(tmp_path), monkeypatch=monkeypatch)
    assert {path.name for path in tmp_path.iterdir()} == {"attention.png", "training.png"}


def teacher_weights(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(path, weights_only=False)
    weights = checkpoint.get("state_dict", checkpoint)  # Lightning's holds the whole module
    prefix = "teacher." if "state_dict" in checkpoint else ""
    return {key: value for key, value in weights.items() if key.startswith(f"{prefix}module.")}


def counted(method: str, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Gets an entry whenever a teacher's method is called."""
    calls: list[None] = []
    original = getattr(MomentumTeacher, method)

    def counting(*args: object, **kwargs: object) -> object:
        calls.append(None)
        return original(*args, **kwargs)

    monkeypatch.setattr(MomentumTeacher, method, counting)
    return calls


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_stopped_run_goes_on_with_its_teacher(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updates, looks = counted("update", monkeypatch), counted("attention", monkeypatch)
    for folder, *options in (("whole",), ("stopped", "--stop-after", "1"), ("stopped", "--resume")):
        out = str(tmp_path / folder)
        run(name, "--epochs", "3", "--batches", "4", "--out", out, *options, monkeypatch=monkeypatch)
    assert len(updates) == 2 * 6  # in each of both: once a step, which is two batches
    assert len(looks) == 2 * 8  # once a batch, in two epochs of three
    checkpoint = CHECKPOINTS[name].replace("-18", "-6")
    whole, stopped = (teacher_weights(tmp_path / folder / checkpoint) for folder in ("whole", "stopped"))
    assert whole
    bounds = {} if torch.cuda.is_available() else {"rtol": 0.0, "atol": 0.0}
    for key in whole:
        torch.testing.assert_close(whole[key], stopped[key], **bounds, msg=key)


def test_the_transvg_style_diff_is_ten_lines() -> None:
    plain, attbalance = ((EXAMPLES / "transvg_style" / name).read_text() for name in ("plain.py", "attbalance.py"))
    added, removed = added_and_removed(plain, attbalance)
    assert len(added) <= 10
    assert all("# +" in line for line in added)
    assert removed == ["loss = box_loss(predicted, boxes)"]


def test_a_plain_loop_needs_at_most_twelve_more_lines() -> None:
    source = definitions("pure_torch.py")
    added, removed = added_and_removed(source["train_plain"], source["train"])
    assert removed == ["def train_plain(model, loader, optimizer):", "loss = box_loss(predicted, boxes)"]
    assert added.pop(0) == "def train(model, loader, optimizer):"
    assert all("# +" in line for line in added)
    assert (EXAMPLES / "pure_torch.py").read_text().count("  # +") <= 12


def test_readme_shows_the_plain_loop_as_it_is() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    example = (EXAMPLES / "pure_torch.py").read_text()
    parts = [part.strip("\n") for part in code.split("\n\n\n")]
    assert len(parts) == 3
    assert all(f"\n{part}\n" in example for part in parts)


@pytest.mark.parametrize("name", FILES)
def test_only_public_names_are_used(name: str) -> None:
    for node in ast.walk(ast.parse((EXAMPLES / name).read_text())):
        used = node.attr if isinstance(node, ast.Attribute) else node.name if isinstance(node, ast.alias) else ""
        parts = used.split(".")
        assert not [part for part in parts if part.startswith("_") and not part.endswith("__")], used


def test_what_files_have_in_common_is_the_same() -> None:
    """Each file stands alone, so the small model, its data and its tap are in several: they must not drift apart."""
    alike = ["pure_torch.py", "lightning_module.py", "accelerate_loop.py", "hf_trainer.py", "tutorial.py"]
    for shared in ("COLOURS", "Grounder", "scenes"):
        assert len({definitions(name)[shared] for name in alike}) == 1, shared
    trainers = ["lightning_module.py", "accelerate_loop.py", "hf_trainer.py"]
    for shared in ("make_tap", "report"):
        assert len({definitions(name)[shared] for name in trainers}) == 1, shared


def test_the_list_of_recipes_is_complete() -> None:
    listed = re.findall(r"`([a-z_]+(?:\.py|/))`", (EXAMPLES / "README.md").read_text())
    assert set(listed) == {path.name + "/" * path.is_dir() for path in EXAMPLES.iterdir() if path.name[0].islower()}
