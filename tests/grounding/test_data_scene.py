"""Scenes and how they are drawn."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attbalance_ext.grounding.data.attributes import HELD_OUT, SEEN, VALUES, is_held_out
from attbalance_ext.grounding.data.render import coverage, render
from attbalance_ext.grounding.data.scene import CANVAS, HARD, STANDARD, Scene, sample_scene

RULES = st.sampled_from([STANDARD, HARD])
SEEDS = st.integers(0, 100_000)


def scene(seed: int, rules=STANDARD, novel: bool = False) -> Scene:
    return sample_scene(np.random.default_rng(seed), rules, novel)


def test_every_pair_of_values_is_seen_in_training() -> None:
    assert len(HELD_OUT) == 18
    assert len(SEEN) + len(HELD_OUT) == 120
    for first, second in combinations(range(4), 2):
        kinds = list(VALUES.values())
        assert {(c[first], c[second]) for c in SEEN} == set(product(kinds[first], kinds[second]))


@given(seed=SEEDS, rules=RULES, novel=st.booleans())
def test_scenes_keep_their_rules(seed, rules, novel) -> None:
    drawn = scene(seed, rules, novel)
    assert rules.count[0] <= len(drawn.objects) <= rules.count[1]
    assert any(is_held_out(item.combination) for item in drawn.objects) == novel
    assert len({item.colour for item in drawn.objects}) <= 3
    assert len({item.shape for item in drawn.objects}) <= 3
    for item in drawn.objects:
        x1, y1, x2, y2 = item.box
        assert 0 <= x1 < x2 <= CANVAS
        assert 0 <= y1 < y2 <= CANVAS
    for a, b in combinations([item.box for item in drawn.objects], 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@given(seed=SEEDS, rules=RULES)
def test_boxes_are_tight_around_what_is_drawn(seed, rules) -> None:
    for item in scene(seed, rules).objects:
        (left, top), shape, stripes = coverage(item, CANVAS)
        rows, columns = np.nonzero(shape.any(1))[0], np.nonzero(shape.any(0))[0]
        drawn = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
        assert np.abs(np.subtract(drawn, item.box)).max() <= 1
        assert (stripes <= shape).all()
        assert (stripes > 0).any() == (item.texture == "striped")


@given(seed=SEEDS, size=st.sampled_from([64, 128]))
def test_an_object_changes_the_pixels_of_its_box_and_no_others(seed, size) -> None:
    drawn = scene(seed)
    item = drawn.objects[0]
    without = Scene(drawn.objects[1:], drawn.backdrop)
    changed = (render(drawn, size) != render(without, size)).any(-1)
    rows, columns = np.nonzero(changed.any(1))[0], np.nonzero(changed.any(0))[0]
    pixel = CANVAS / size
    box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) * pixel
    # A corner may cover too little of its pixel to change it.
    assert (np.abs(box - item.box) <= 2 * pixel).all()
    assert box[0] > item.box[0] - pixel
    assert box[1] > item.box[1] - pixel
    assert box[2] < item.box[2] + pixel
    assert box[3] < item.box[3] + pixel


@given(seed=SEEDS, rules=RULES)
def test_objects_stand_out_from_the_background(seed, rules) -> None:
    drawn = scene(seed, rules)
    image = render(drawn, 64).astype(int)
    bare = render(Scene((), drawn.backdrop), 64).astype(int)
    for item in drawn.objects:
        (left, top), shape, _ = coverage(item, 64)
        window = np.s_[top : top + shape.shape[0], left : left + shape.shape[1]]
        inside = shape > 200
        difference = np.abs(image[window][inside] - bare[window][inside]).max(-1)
        # Of 255: the noise reaches 24 between two images.
        assert np.median(difference) > 40


@given(seed=SEEDS)
def test_both_sizes_show_the_same_scene(seed) -> None:
    drawn = scene(seed)
    small, large = render(drawn, 64).astype(float), render(drawn, 128).astype(float)
    shrunk = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
    # Noise differs, with a mean absolute value of six; thin lines have another width.
    assert np.abs(small - shrunk).mean() < 9
    correlation = np.corrcoef(small.ravel(), shrunk.ravel())[0, 1]
    assert correlation > 0.95


@pytest.mark.parametrize("size", [64, 128])
def test_same_seed_same_bytes(size: int) -> None:
    first, again, other = (render(scene(seed), size) for seed in (5, 5, 6))
    assert first.dtype == np.uint8
    assert first.shape == (size, size, 3)
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_sizes_cannot_be_confused() -> None:
    """Compared shape by shape, the smallest large object is clearly larger than the largest small one."""
    areas: dict[tuple[str, str], list[int]] = {}
    for seed in range(400):
        for item in scene(seed).objects:
            covered = coverage(item, CANVAS)[1]
            areas.setdefault((item.shape, item.size), []).append(int((covered > 0).sum()))
    for shape in VALUES["shape"]:
        assert min(areas[shape, "large"]) > 1.7 * max(areas[shape, "small"])


def test_hard_scenes_have_close_distractors() -> None:
    """Most objects of a hard scene have a neighbour in attributes: equal, or different in one."""

    def share(rules) -> float:
        close = total = 0
        for seed in range(200):
            kinds = [item.combination for item in scene(seed, rules).objects]
            for i, a in enumerate(kinds):
                total += 1
                close += any(sum(x != y for x, y in zip(a, b, strict=True)) == 1 for j, b in enumerate(kinds) if i != j)
        return close / total

    assert share(HARD) > 0.9
    assert share(HARD) > share(STANDARD) + 0.15
