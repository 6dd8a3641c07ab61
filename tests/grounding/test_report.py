"""The report: self-contained, without scripts, with its pictures; and its charts."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from helpers_toy import ToyDataset, finish, toy_trainer
from PIL import Image

from attbalance_ext.grounding.data import Vocabulary
from attbalance_ext.grounding.data.tokenizers import Tokenizer, WordTokenizer
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.evaluate import evaluate
from attbalance_ext.grounding.models import GroundingModel
from attbalance_ext.grounding.report import page
from attbalance_ext.grounding.report.charts import MAX_POINTS, WIDE, Line, line_chart
from attbalance_ext.grounding.report.pictures import picture_groups
from attbalance_ext.grounding.report.summary import settings_table, summarize
from attbalance_ext.grounding.runs import Run, load_run
from attbalance_ext.grounding.settings import Settings
from attbalance_ext.grounding.split import PreparedSplit
from attbalance_ext.grounding.train import Trainer


class Tags(HTMLParser):
    """Every start tag with its attributes, and a check that tags are closed in order."""

    VOID = frozenset({"meta", "link", "br", "image", "line", "rect", "circle"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """A plain run and one with AttBalance."""
    folder = tmp_path_factory.mktemp("runs")
    for name, attbalance in (("plain", False), ("full", True)):
        finish(toy_trainer(folder / name, attbalance=attbalance))
    return [load_run(folder / "plain"), load_run(folder / "full")]


def toy_split(scenes: int) -> Callable[..., PreparedSplit]:
    """What stands for ``open_split``."""

    def split(settings: Settings, name: str, tokenizer: Tokenizer, model: GroundingModel, **_: object) -> PreparedSplit:
        return PreparedSplit(ToyDataset(scenes), tokenizer, model, torch.device("cpu"))

    return split


@pytest.fixture
def written(runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(page, "open_split", toy_split(scenes=12))
    page.write_report(runs, tmp_path / "report.html", versions={"torch": "9.9"}, per_group=2)
    return (tmp_path / "report.html").read_text()


def test_the_page_needs_nothing_from_outside(written: str) -> None:
    tags = Tags(written)
    assert tags.open == []
    assert not {"script", "iframe", "object", "embed", "base"} & {tag for tag, _ in tags.found}
    links = [attributes[name] for _, attributes in tags.found for name in ("src", "href") if name in attributes]
    assert links
    assert all(link is not None and link.startswith("data:") for link in links)
    text = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", written)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert not any(name.startswith("on") for _, attributes in tags.found for name in attributes)


def test_pictures_are_there_and_open(written: str) -> None:
    tags = Tags(written)
    images = [attributes["href"] for tag, attributes in tags.found if tag == "image"]
    assert len(images) >= 3
    for image in images:
        assert image is not None
        picture = Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2])))
        assert picture.size in {(32, 32), (4, 4)}  # the scene, and one pixel per visual token
    classes = " ".join(attributes.get("class") or "" for _, attributes in tags.found)
    for expected in ("box truth", "box run0", "box run1", "line run0", "line run1"):
        assert expected in classes


def test_the_page_says_what_was_measured(written: str, runs: list[Run]) -> None:
    for expected in (
        "Box loss",
        "Accuracy at IoU 0.5",
        "Layer 1, not supervised",
        "Layer 3",
        "torch 9.9",
        "plain",
        "full",
    ):
        assert expected in written
    assert written.count("<polyline") == 2 * (2 + 3 + 3)  # runs x (learning + in-box per layer + rho per layer)


def test_outcomes_count_every_sentence_once(runs: list[Run], make_trainer: Callable[..., Trainer]) -> None:
    split = make_trainer("other").split
    evaluations = [evaluate(run.model, split) for run in runs]
    for evaluation, right in zip(evaluations, (slice(0, 5), slice(3, 9)), strict=True):
        evaluation.iou.zero_()[right] = 0.9
    groups = picture_groups(runs, [split, split], evaluations, per_group=2, seed=0)
    assert sum(group.count for group in groups) == len(split)
    assert [group.count for group in groups[:3]] == [4, 3, 2]
    assert [len(group.examples) for group in groups] == [2, 2, 2, 2]
    assert groups[0].examples[0].panels[1].iou == pytest.approx(0.9)
    again = picture_groups(runs, [split, split], evaluations, per_group=2, seed=0)
    assert again == groups


def test_every_rho_plotted_has_its_sample_size(runs: list[Run], written: str) -> None:
    """The validation sentences whose box covers a visual token: the others have no attention in the box."""
    (size,) = {point["valid"] for run in runs for point in run.history["validation"]}
    assert size > 0
    assert written.count(f"n = {size:,}") == 3 + 3  # in-box attention and rho, per layer


def test_summary_separates_times_with_and_without_terms(runs: list[Run], make_trainer: Callable[..., Trainer]) -> None:
    split = make_trainer("other").split
    times = [{**r, "step_ms": 30.0 if "attention" in r else 20.0} for r in runs[1].history["train"]]
    timed = replace(runs[1], history={**runs[1].history, "train": times})
    plain, full = (summarize(run, evaluate(run.model, split)) for run in (runs[0], timed))
    assert plain.plain_step_ms is None
    assert (full.step_ms, full.plain_step_ms) == (30.0, 20.0)
    differing = [name for name, _, differs in settings_table(runs) if differs]
    assert differing == ["attbalance"]


def test_runs_over_different_data_are_refused(runs: list[Run], tmp_path: Path) -> None:
    other = replace(runs[1], settings=replace(runs[1].settings, data="builtin:referit"))
    with pytest.raises(UserError, match="must share their data"):
        page.write_report([runs[0], other], tmp_path / "x.html", versions={})


def test_names_are_escaped(runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "open_split", toy_split(scenes=2))
    hostile = replace(runs[0], directory=tmp_path / "<script>alert(1)<")
    page.write_report([hostile], tmp_path / "x.html", versions={})
    assert "<script" not in (tmp_path / "x.html").read_text()


def test_charts_keep_their_points_inside_and_skip_what_is_not_a_number() -> None:
    svg = line_chart(
        [Line("a", 0, list(range(500)), [float("nan")] * 10 + [0.5] * 490), Line("b", 1, [1, 2], [0.0, 1.0])],
        label="test",
        y_range=(0.0, 1.0),
    )
    lines = re.findall(r'points="([^"]*)"', svg)
    assert len(lines) == 2
    assert 0 < len(lines[0].split()) <= MAX_POINTS
    assert "nan" not in svg
    numbers = [float(number) for line in lines for point in line.split() for number in point.split(",")]
    assert all(0 <= number <= WIDE[0] for number in numbers)
    assert "no records" in line_chart([Line("a", 0, [], [])], label="empty")


def test_tokenizer_of_a_run_is_its_own(runs: list[Run]) -> None:
    words = WordTokenizer(Vocabulary.build(ToyDataset(scenes=16).sentences))
    assert runs[0].tokenizer.state() == words.state()
    assert not runs[0].model.training
    assert torch.is_tensor(next(runs[0].model.parameters()))
