"""Sentences of the built-in benchmark: each singles out its target, and says one thing only."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from helpers_data import NAMES, examples
from hypothesis import given
from hypothesis import strategies as st

from attbalance_ext.grounding.data import Vocabulary, lexicon
from attbalance_ext.grounding.data.attributes import VALUES
from attbalance_ext.grounding.data.expression import (
    Beside,
    Between,
    Center,
    Compared,
    Corner,
    Description,
    Extreme,
    Nearest,
    Ordinal,
    SameAs,
    Side,
    Trait,
)
from attbalance_ext.grounding.data.generate import generate
from attbalance_ext.grounding.data.grammar import FLAVOURS
from attbalance_ext.grounding.data.names import SPLITS, BuiltinName
from attbalance_ext.grounding.data.scene import CANVAS, HARD, STANDARD, Backdrop, Scene, SceneObject, sample_scene


def thing(x: float, y: float, **attributes: str) -> SceneObject:
    """A square outline of a tenth of the image around (x, y), fractions of the image."""
    left, top, half = round(x * CANVAS), round(y * CANVAS), CANVAS // 20
    corners = ((left - half, top - half), (left + half - 1, top - half), (left + half - 1, top + half - 1))
    values = {"shape": "square", "colour": "red", "size": "small", "texture": "plain", **attributes}
    return SceneObject(
        **values, outline=corners, paint=(0, 0, 0), stripe_paint=(0, 0, 0), stripe_angle=0, stripe_width=15
    )


def scene_of(*objects: SceneObject) -> Scene:
    return Scene(objects, Backdrop(np.zeros((3, 3, 3), np.uint8), (), 0))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", NAMES, ids=str)
def test_every_expression_singles_out_its_target(name: BuiltinName, split: str) -> None:
    for scene, reference in examples(name, split, 25):
        sure, possible = reference.description.denotation(scene)
        assert sure == possible == 1 << reference.target, reference


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_a_text_has_one_meaning(name: BuiltinName) -> None:
    meanings: dict[str, tuple] = {}
    for _, reference in examples(name, "train", 150):
        description = reference.description
        meaning = (frozenset(description.traits), _unordered(description.clause))
        assert meanings.setdefault(reference.sentence, meaning) == meaning, reference.sentence


def _unordered(clause: object) -> object:
    """Clauses that differ only in the order of traits or anchors are the same."""
    if isinstance(clause, Between):
        return frozenset({frozenset(clause.first.traits), frozenset(clause.second.traits)})
    if isinstance(clause, (Beside, Nearest, SameAs)):
        rest = {k: v for k, v in vars(clause).items() if k != "anchor"}
        return type(clause), tuple(rest.items()), frozenset(clause.anchor.traits)
    return clause


LEFT, RIGHT, HIGH = thing(0.2, 0.5), thing(0.8, 0.55, colour="blue"), thing(0.52, 0.15, texture="striped")
TRIO = scene_of(LEFT, RIGHT, HIGH)
RED = (Trait("colour", "red"),)
BLUE = Description((Trait("colour", "blue"),))
STRIPED = Description((Trait("texture", "striped"),))


@pytest.mark.parametrize(
    ("scene", "description", "referent"),
    [
        (TRIO, Description(), None),
        (TRIO, BLUE, 1),
        (TRIO, Description((Trait("colour", "red", negated=True),)), 1),
        (TRIO, Description((Trait("shape", "circle"),)), None),
        (TRIO, Description((), Extreme("left")), 0),
        (TRIO, Description(RED, Extreme("right")), 2),
        (TRIO, Description((), Extreme("bottom")), None),  # 0.55 against 0.5: too close to call
        (TRIO, Description(RED, Side("right")), 2),
        (scene_of(LEFT, thing(0.4, 0.5)), Description((), Side("right")), None),  # the right one is in the left half
        (TRIO, Description((), Corner("top", "right")), None),  # far up, or far right?
        (scene_of(LEFT, thing(0.8, 0.2)), Description((), Corner("top", "right")), 1),
        (scene_of(thing(0.45, 0.55), LEFT), Description((), Center()), 0),
        (scene_of(thing(0.45, 0.55), thing(0.6, 0.5)), Description((), Center()), None),
        (TRIO, Description((), Ordinal(2, "left")), 2),
        (TRIO, Description((), Ordinal(2, "bottom")), None),
        (TRIO, Description(RED, Ordinal(2, "right")), None),  # last of two: nobody says second
        (TRIO, Description(RED, Beside("left", BLUE)), 0),  # the striped one is left of it too, but higher up
        (scene_of(LEFT, RIGHT), Description((), Beside("left", BLUE)), 0),
        (scene_of(LEFT, RIGHT), Description((), Beside("right", BLUE)), None),
        (TRIO, Description((), Nearest(BLUE)), 2),
        (TRIO, Description((), Nearest(BLUE, far=True)), 0),
        (scene_of(thing(0.5, 0.5), thing(0.1, 0.5, colour="blue"), thing(0.9, 0.5, texture="striped")),
         Description((), Between(BLUE, STRIPED)), 0),
        (TRIO, Description((), Between(BLUE, STRIPED)), None),
        (TRIO, Description((), SameAs("colour", STRIPED)), 0),
        (TRIO, Description((), SameAs("colour", BLUE)), None),
        (scene_of(LEFT, thing(0.8, 0.8, size="large")), Description((), Compared("large", of_two=True)), 1),
        (TRIO, Description((), Compared("small", of_two=False)), None),
    ],
)  # fmt: skip
def test_meaning_of_descriptions(scene: Scene, description: Description, referent: int | None) -> None:
    if isinstance(description.clause, Beside) and scene is TRIO:
        assert description.denotation(scene).sure == 1 << 0
        assert description.denotation(scene).possible == 1 << 0 | 1 << 2
    else:
        assert description.referent(scene) == referent


_MIRRORED = {"left": "right", "right": "left"}


@given(
    seed=st.integers(0, 10_000),
    hard=st.booleans(),
    clause=st.sampled_from(
        [
            *(kind(d) for kind in (Extreme, Side) for d in ("left", "right", "top")),
            *(Corner(v, h) for v in ("top", "bottom") for h in ("left", "right")),
            Center(),
            *(Ordinal(rank, d) for rank in (2, 3) for d in ("left", "right")),
        ]
    ),
)
def test_places_follow_a_mirror_and_ignore_the_order_of_objects(seed: int, hard: bool, clause: object) -> None:
    scene = sample_scene(np.random.default_rng(seed), HARD if hard else STANDARD)
    count = len(scene.objects)
    mirrored = scene_of(
        *(thing(1 - o.center[0], o.center[1], **dict(zip(VALUES, o.combination, strict=True))) for o in scene.objects)
    )
    plain = scene_of(*(thing(*o.center, **dict(zip(VALUES, o.combination, strict=True))) for o in scene.objects))
    turned = type(clause)(**{k: _MIRRORED.get(v, v) for k, v in vars(clause).items()})
    before, after = Description((), clause).denotation(plain), Description((), turned).denotation(mirrored)
    # Coordinates are whole units: a mirrored margin may fall on the other side by rounding.
    if before.sure and after.sure:
        assert before.sure == after.sure
    reversed_scene = scene_of(*plain.objects[::-1])
    referent = Description((), clause).referent(plain)
    expected = None if referent is None else count - 1 - referent
    assert Description((), clause).referent(reversed_scene) == expected


@given(seed=st.integers(0, 10_000), kind=st.sampled_from(sorted(VALUES)), data=st.data())
def test_negation_is_the_complement(seed: int, kind: str, data: st.DataObject) -> None:
    scene = sample_scene(np.random.default_rng(seed), STANDARD)
    value = data.draw(st.sampled_from(VALUES[kind]))
    fits, rest = (Description((Trait(kind, value, negated),)).candidates(scene) for negated in (False, True))
    assert fits & rest == 0
    assert fits | rest == scene.everything
    assert fits == sum(1 << i for i, item in enumerate(scene.objects) if getattr(item, kind) == value)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_needed_means_ambiguous_without_the_clause(flavour: str) -> None:
    name = BuiltinName(flavour, False)
    needed = np.concatenate([part["needed"] for part in generate(name, "val", 64, 40)])
    pairs = examples(name, "val", 40)
    for flag, (scene, reference) in zip(needed, pairs, strict=True):
        fits = [
            item
            for item in scene.objects
            if all((getattr(item, t.kind) == t.value) != t.negated for t in reference.description.traits)
        ]
        assert flag == (len(fits) > 1), reference
    assert needed.any()
    assert not needed.all()


def test_flavours_keep_to_their_kind_of_language() -> None:
    groups = {
        flavour: Counter(
            None if r.description.clause is None else r.description.clause.group
            for _, r in examples(BuiltinName(flavour, False), "train", 150)
        )
        for flavour in FLAVOURS
    }
    shares = {flavour: {k: v / counts.total() for k, v in counts.items()} for flavour, counts in groups.items()}
    assert set(groups["refcoco"]) == {"location", None}
    assert set(groups["refcoco+"]) == {None, "comparison", "likeness"}
    assert set(groups["refcocog"]) == {"relation", "likeness", None}
    assert set(groups["referit"]) == {"location", "relation", None}
    assert shares["refcoco"]["location"] > 0.7
    assert shares["refcocog"]["relation"] > 0.7


def test_appearance_only_means_no_word_of_place() -> None:
    places = {"left", "right", "top", "bottom", "upper", "lower", "middle", "side", "corner", "above", "below", "from"}
    for _, reference in examples(BuiltinName("refcoco+", False), "train", 150):
        assert not places & set(reference.sentence.split()), reference.sentence


def test_the_vocabulary_is_exactly_what_can_be_said() -> None:
    said = {
        word for name in NAMES for _, reference in examples(name, "train", 150) for word in reference.sentence.split()
    }
    assert said <= set(lexicon.words())
    unsaid = set(lexicon.words()) - said
    assert len(unsaid) <= 2, unsaid  # rare phrases may miss a sample of this size
    sentences = [reference.sentence for _, reference in examples(NAMES[0], "train", 150)]
    ids, padding = Vocabulary.builtin().encode(sentences)
    assert (ids != 1).all()
    assert [len(s.split()) for s in sentences] == (~padding).sum(1).tolist()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_language_is_rich(flavour: str) -> None:
    sentences = {reference.sentence for _, reference in examples(BuiltinName(flavour, False), "train", 800)}
    assert len(sentences) >= 1500


def test_which_object_is_meant_does_not_show_in_the_order_of_objects() -> None:
    places = [
        (reference.target + 0.5) / len(scene.objects)
        for name in NAMES
        for scene, reference in examples(name, "train", 150)
    ]
    # Uniform on [0, 1] has a standard deviation of 0.29: five standard errors.
    assert abs(np.mean(places) - 0.5) < 5 * 0.29 / math.sqrt(len(places))
