"""Wrong boxes: found by kind, and skipped, repaired or refused."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
from helpers_files import write_image, write_lines
from hypothesis import given
from hypothesis import strategies as st

from attbalance_ext.grounding.data import Annotation, Box, open_dataset
from attbalance_ext.grounding.data.wrong_boxes import kind_of, repaired, treat
from attbalance_ext.grounding.errors import UserError

SIZE = (64, 48)
CASES = [
    ((1, 2, 30, 40), None, (1, 2, 30, 40)),
    ((0, 0, 64, 48), None, (0, 0, 64, 48)),
    ((-1, 0, 65, 48.5), None, (0, 0, 64, 48)),  # rounding
    ((-1.5, 2, 30, 40), "outside", (0, 2, 30, 40)),
    ((1, 2, 66, 40), "outside", (1, 2, 64, 40)),
    ((70, 2, 90, 40), "outside", None),
    ((64, 2, 65, 40), "outside", None),  # all of it is what rounding would explain
    ((30, 2, 1, 40), "inverted", (1, 2, 30, 40)),
    ((30, 40, 1, 2), "inverted", (1, 2, 30, 40)),
    ((5, 2, 5, 40), "empty", None),
    ((5, 2, 30, 2), "empty", None),
    ((math.nan, 2, 30, 40), "not finite", None),
    ((1, 2, math.inf, 40), "not finite", None),
]


def annotations() -> list[Annotation]:
    return [Annotation(Path(f"{i}.jpg"), f"number {i}", Box(*map(float, box))) for i, (box, _, _) in enumerate(CASES)]


def test_kinds() -> None:
    wrong = [kind for _, kind, _ in CASES if kind]
    _, found = treat(annotations(), lambda _: SIZE)
    assert found.counts == {kind: wrong.count(kind) for kind in wrong}
    assert found.total == len(wrong)


def test_skip() -> None:
    kept, found = treat(annotations(), lambda _: SIZE, "skip")
    assert [each.box for each in kept] == [fixed for _, kind, fixed in CASES if kind is None]
    assert found.skipped == found.total == 10


def test_repair() -> None:
    kept, found = treat(annotations(), lambda _: SIZE, "repair")
    assert [each.box for each in kept] == [fixed for _, _, fixed in CASES if fixed]
    assert [each.sentence for each in kept] == [f"number {i}" for i, (_, _, fixed) in enumerate(CASES) if fixed]
    assert (found.total, found.skipped) == (10, 6)
    assert str(found) == (
        "10 wrong boxes (2 not finite, 2 inverted, 2 empty, 4 outside; 6 skipped, 4 repaired), as "
        "3.jpg 'number 3' [-1.5, 2, 30, 40] in 64 x 48; 4.jpg 'number 4' [1, 2, 66, 40] in 64 x 48; "
        "5.jpg 'number 5' [70, 2, 90, 40] in 64 x 48"
    )


def test_error() -> None:
    with pytest.raises(UserError, match=r"3\.jpg: a box is outside: 3\.jpg 'number 3' \[-1\.5, 2, 30, 40\] in 64 x 48"):
        treat(annotations(), lambda _: SIZE, "error")
    assert len(treat(annotations()[:3], lambda _: SIZE, "error")[0]) == 3
    with pytest.raises(UserError, match="wrong_boxes is 'drop'; it must be one of skip, repair, error"):
        treat([], lambda _: SIZE, "drop")


@given(st.tuples(*[st.floats(allow_nan=True, allow_infinity=True)] * 4), st.tuples(*[st.integers(1, 2000)] * 2))
def test_a_repaired_box_is_right(corners: tuple[float, float, float, float], size: tuple[int, int]) -> None:
    fixed = repaired(Box(*corners), size)
    if fixed is not None:
        assert kind_of(fixed, size) is None
        assert 0 <= fixed.x1 < fixed.x2 <= size[0]
        assert 0 <= fixed.y1 < fixed.y2 <= size[1]
        assert repaired(fixed, size) == fixed


@pytest.mark.parametrize("knows_size", [True, False])
@pytest.mark.parametrize(("choice", "sentences"), [("skip", ["right"]), ("repair", ["clipped", "right", "swapped"])])
def test_in_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, knows_size: bool, choice: str, sentences: list[str]
) -> None:
    write_image(tmp_path / "a.png", SIZE)
    size = {"width": 64, "height": 48} if knows_size else {}
    boxes = {"right": [0, 0, 5, 5], "swapped": [9, 9, -5, 4], "clipped": [60, 1, 10, 4], "empty": [1, 1, 0, 4]}
    rows = [{"image": "a.png", "sentence": name, "bbox": box, **size} for name, box in boxes.items()]
    write_lines(tmp_path / "train.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        data = open_dataset("mine", "train", root=tmp_path, wrong_boxes=choice)
    assert sorted(data.sentences) == sentences
    (record,) = caplog.records
    assert record.getMessage().startswith("mine train: 3 wrong boxes (1 inverted, 1 empty, 1 outside; ")
    assert "a.png 'swapped' [9, 9, 4, 13] in 64 x 48" in record.getMessage()
    with pytest.raises(UserError, match=r"a\.png: a box is inverted"):
        open_dataset("mine", "train", root=tmp_path, wrong_boxes="error")


def test_not_a_number_in_json(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", SIZE)
    line = '{"image": "a.png", "sentence": "x", "bbox": [%s, 0, 5, 5]}\n'
    (tmp_path / "train.jsonl").write_text(line % "NaN" + line % "1")
    data = open_dataset("mine", "train", root=tmp_path)
    assert (len(data), data.wrong_boxes.counts["not finite"]) == (1, 1)
