"""Studies in TOML: which setting counts, what is refused and how it is named, the studies of this repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from attbalance_ext import AttBalanceConfig
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.experiment.record import identity
from attbalance_ext.grounding.experiment.spec import Cell, Spec, load_spec
from attbalance_ext.grounding.settings import Settings

STUDIES = sorted((Path(__file__).parents[2] / "experiments").glob("*.toml"))
TOP = """
title = "T"
question = "Q?"
baseline = "plain"
data = ["builtin:refcoco"]
seeds = [0, 1]
"""
TABLES = """
[settings]
steps = 10
[models.transvg-tiny]
[variants.plain]
attbalance = false
[variants.full]
"""


def load(folder: Path, text: str) -> Spec:
    path = folder / "study.toml"
    path.write_text(text)
    return load_spec(path)


def refused(folder: Path, text: str) -> str:
    """What is said about a study that cannot be run: one line that names the file."""
    with pytest.raises(UserError) as raised:
        load(folder, text)
    said = str(raised.value)
    assert said.startswith(f"{folder / 'study.toml'}")
    assert "\n" not in said
    return said


def cell(spec: Spec, variant: str, model: str = "transvg-tiny") -> Cell:
    (found,) = (c for c in spec.cells if (c.variant, c.model, c.seed) == (variant, model, 0))
    return found


def test_a_study_is_every_combination_seed_by_seed(tmp_path: Path) -> None:
    text = TOP.replace('["builtin:refcoco"]', '["builtin:refcoco", "builtin:referit-hard"]') + TABLES
    spec = load(tmp_path, text + "[models.vltvg-tiny]\n")
    assert (spec.name, spec.title, spec.question) == ("study", "T", "Q?")
    assert spec.splits == ("fresh", "fresh_novel")
    assert [(c.seed, c.data, c.model, c.variant) for c in spec.cells] == [
        (seed, data, model, variant)
        for seed in (0, 1)
        for data in ("builtin:refcoco", "builtin:referit-hard")
        for model in ("transvg-tiny", "vltvg-tiny")
        for variant in ("plain", "full")
    ]
    for c in spec.cells:
        assert (c.settings.seed, c.settings.data, c.settings.model) == (c.seed, c.data, c.model)
        assert c.settings.attbalance == (c.variant == "full")
    assert spec.cells[5].name == "transvg-tiny referit-hard full seed 0"
    assert load(tmp_path, 'splits = ["val"]' + text).splits == ("val",)


def test_a_variant_goes_before_a_model_and_that_before_the_rest(tmp_path: Path) -> None:
    spec = load(
        tmp_path,
        TOP
        + """
        [settings]
        steps = 10
        batch_size = 4
        momentum = 0.1
        [models.transvg-tiny]
        batch_size = 8
        momentum = 0.2
        [models.vltvg-tiny]
        [variants.plain]
        momentum = 0.3
        [variants.full]
        """,
    )

    def found(variant: str, model: str) -> tuple[int, int, float]:
        settings = cell(spec, variant, model).settings
        return settings.steps, settings.batch_size, settings.momentum

    assert found("plain", "transvg-tiny") == (10, 8, 0.3)
    assert found("full", "transvg-tiny") == (10, 8, 0.2)
    assert found("plain", "vltvg-tiny") == (10, 4, 0.3)
    assert found("full", "vltvg-tiny") == (10, 4, 0.1)
    # What nobody set is the model's own recipe.
    assert cell(spec, "full", "vltvg-tiny").settings == Settings.for_model(
        "vltvg-tiny", steps=10, batch_size=4, momentum=0.1, data="builtin:refcoco"
    )


def test_tables_in_tables_are_merged(tmp_path: Path) -> None:
    spec = load(
        tmp_path,
        TOP
        + """
        [settings]
        loss = { alpha_ar = 0.1, alpha_l1 = 2.0, rho = "off" }
        model_options = { dim = 32, heads = 2 }
        [models.deep]
        model = "vltvg-tiny"
        loss = { alpha_l1 = 3.0 }
        model_options = { layers = 6, dim = 96 }
        [variants.plain]
        [variants.full]
        loss = { rho = [1, 0.5, 0.25], weight_mrc = 0.0 }
        model_options = { layers = 5 }
        """,
    )
    plain, full = (cell(spec, variant, "deep").settings for variant in ("plain", "full"))
    assert plain.model == full.model == "vltvg-tiny"
    assert plain.loss == AttBalanceConfig(alpha_ar=0.1, alpha_l1=3.0, alpha_giou=2.0, rho="off")
    assert plain.model_options == {"dim": 96, "heads": 2, "layers": 6}
    assert full.loss == AttBalanceConfig(
        alpha_ar=0.1, alpha_l1=3.0, alpha_giou=2.0, rho=(1.0, 0.5, 0.25), weight_mrc=0.0
    )
    assert full.model_options == {"dim": 96, "heads": 2, "layers": 5}


def test_labels_notes_and_comparisons(tmp_path: Path) -> None:
    spec = load(
        tmp_path,
        TOP
        + TABLES
        + """
        label = "with"
        note = "as published"
        [variants.other]
        against = ["full"]
        """,
    )
    plain, full, other = spec.variants.values()
    assert (plain.label, plain.note, plain.against) == ("plain", "", ())
    assert (full.label, full.note, full.against) == ("with", "as published", ("plain",))
    assert (other.label, other.against) == ("other", ("full",))


def test_equal_settings_look_the_same_however_they_are_written(tmp_path: Path) -> None:
    """A run that two studies share is found by its settings."""
    spec = load(
        tmp_path,
        TOP
        + TABLES
        + """
        loss = { alpha_ar = 1, rho = [1, 0, 1] }
        momentum = 1
        frozen_parts = ["text"]
        [variants.same]
        loss = { rho = [1.0, 0.0, 1.0] }
        momentum = 1.0
        frozen_parts = ["text"]
        """,
    )
    one, other = (cell(spec, variant).settings for variant in ("full", "same"))
    assert identity(one) == identity(other)
    assert one.frozen_parts == ("text",)
    assert Settings.from_dict(one.to_dict()) == one


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        # the study itself
        ("title", "titel", "unknown names titel"),
        ("[settings]", "[setings]", "unknown names setings"),
        ('question = "Q?"\n', "", "missing: question"),
        ('baseline = "plain"\n', "", "missing: baseline"),
        ('"Q?"', "3", "question must be a text, got 3"),
        ('"T"', '""', "title is empty"),
        ("[0, 1]", "3", "seeds must be a list, got 3"),
        ("[0, 1]", "[]", "seeds is empty"),
        ("[0, 1]", "[0, true]", "an item of seeds must be a whole number, got True"),
        ("[0, 1]", "[0, 1.0]", "an item of seeds must be a whole number, got 1.0"),
        ("[0, 1]", "[4, 5, 4]", "seeds has 4 twice"),
        ('["builtin:refcoco"]', "[]", "data is empty"),
        ('["builtin:refcoco"]', '"builtin:refcoco"', "data must be a list"),
        ('["builtin:refcoco"]', "[3]", "an item of data must be a text, got 3"),
        ('["builtin:refcoco"]', '["builtin:refcoco", "builtin:refcoco"]', "data has 'builtin:refcoco' twice"),
        ('["builtin:refcoco"]', '["builtin:coco"]', "no data set 'builtin:coco'; there are builtin:refcoco"),
        ('["builtin:refcoco"]', '["own"]', "no data set 'own'"),
        ("seeds", "splits = []\nseeds", "splits is empty"),
        ("seeds", 'splits = ["fresh", "fresh"]\nseeds', "splits has 'fresh' twice"),
        ("seeds", 'splits = ["testA"]\nseeds', "no split 'testA'; there are train, val"),
        # its tables
        ("[models.transvg-tiny]", "[models.transvg]", "unknown model 'transvg'; there is: transvg-tiny"),
        ("[models.transvg-tiny]", "[models.deep]\nmodel = 'deeper'", "unknown model 'deeper'"),
        ("[models.transvg-tiny]", "[models.deep]\nmodel = ['deeper']", "models.deep: model must be a text"),
        ("[models.transvg-tiny]", "[models]\ntransvg-tiny = 3", "models.transvg-tiny must be a table, got 3"),
        ("[models.transvg-tiny]", "", "missing: models"),
        ("[models.transvg-tiny]", "[models]", "models is empty"),
        ('baseline = "plain"', 'baseline = "none"', "baseline 'none' is no variant; there is: plain, full"),
        ("[variants.full]", "[variants.full]\nagainst = ['none']", "variants.full is compared with 'none'"),
        (
            "[variants.full]",
            "[variants.full]\nagainst = 'plain'",
            "variants.full: against must be a list of texts, got 'plain'",
        ),
        ("[variants.full]", "[variants.full]\nagainst = ['full']", "variants.full is compared with itself"),
        ("[variants.full]", "[variants.full]\nlabel = 3", "variants.full: label must be a text, got 3"),
        # settings
        ("steps = 10", "step = 10", "settings: unknown settings: step"),
        ("steps = 10", 'label = "x"', "settings: unknown settings: label"),
        ("steps = 10", "seed = 3", "settings: seed cannot be set in a table"),
        ("attbalance = false", "data = 'x'", "variants.plain: data cannot be set in a table"),
        ("attbalance = false", "atbalance = false", "variants.plain: unknown settings: atbalance"),
        ("attbalance = false", 'attbalance = "no"', "variants.plain: attbalance must be true or false, got 'no'"),
        ("attbalance = false", "attbalance = 0", "variants.plain: attbalance must be true or false, got 0"),
        ("steps = 10", "steps = 10.0", "settings: steps must be a whole number, got 10.0"),
        ("steps = 10", "steps = true", "settings: steps must be a whole number, got True"),
        ("steps = 10", "steps = 0", "steps must be at least 1, got 0"),
        ("steps = 10", 'learning_rate = "fast"', "settings: learning_rate must be a number, got 'fast'"),
        ("steps = 10", "learning_rate = nan", "settings: learning_rate must be a number, got nan"),
        ("steps = 10", "clip = inf", "settings: clip must be a number, got inf"),
        ("steps = 10", "momentum = true", "settings: momentum must be a number, got True"),
        ("steps = 10", "frozen_parts = 'text'", "settings: frozen_parts must be a list, got 'text'"),
        ("steps = 10", "frozen_parts = [3]", "an item of settings: frozen_parts must be a text, got 3"),
        ("steps = 10", "frozen_parts = ['words']", "unknown part of a model 'words'"),
        ("steps = 10", "terms_fraction = 1.5", "terms_fraction must lie in [0, 1], got 1.5"),
        ("steps = 10", "train_share = 0.0", "train_share must lie in (0, 1], got 0.0"),
        ("steps = 10", "rule = 'nope'", "unknown rule 'nope'; there is: touch"),
        ("steps = 10", "model_options = 3", "settings: model_options must be a table, got 3"),
        ("steps = 10", "loss = 3", "settings: loss must be a table, got 3"),
        ("steps = 10", "loss = { alpha = 1.0 }", "settings.loss: unknown settings: alpha"),
        ("steps = 10", "loss = { alpha_ar = '1' }", "settings.loss: alpha_ar must be a number, got '1'"),
        ("steps = 10", "loss = { rho = 3 }", "settings.loss: rho must be a text or a list, got 3"),
        ("steps = 10", "loss = { rho = ['a'] }", "an item of settings.loss: rho must be a number, got 'a'"),
        ("steps = 10", "loss = { rho = 'nope' }", "rho must be one of batch, global, ema, off"),
        ("steps = 10", "loss = { rho_momentum = 1 }", "rho_momentum must be in [0, 1), got 1.0"),
        # no TOML
        ("[settings]", "[settings", "is no TOML"),
        ("steps = 10", "steps = 10\nsteps = 11", "is no TOML"),
    ],
)
def test_a_slip_is_named(old: str, new: str, says: str, tmp_path: Path) -> None:
    whole = TOP + TABLES
    load(tmp_path, whole)
    assert old in whole
    said = refused(tmp_path, whole.replace(old, new, 1))
    assert says in said


def test_settings_that_fail_together_name_their_cell(tmp_path: Path) -> None:
    said = refused(tmp_path, TOP + TABLES + "terms_fraction = 2.0\n")
    assert "models.transvg-tiny with variants.full: terms_fraction" in said


def test_data_in_files_have_names_and_splits_of_their_own(tmp_path: Path) -> None:
    """They are looked for when they are needed: a study can be read where they are not."""
    top = TOP.replace('"builtin:refcoco"', '"own"')
    text = 'splits = ["testA"]' + top + TABLES.replace("steps = 10", 'data_root = "no-such-folder"')
    spec = load(tmp_path, text)
    assert spec.cells[0].settings.data_root == "no-such-folder"
    assert spec.splits == ("testA",)


@pytest.mark.parametrize("content", [None, "folder", b"title = '\xff'"])
def test_a_file_that_cannot_be_read_is_named(content: bytes | str | None, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"study\.toml (cannot be read|is no TOML)"):
        load_spec(path)


def test_cells_are_chosen_by_their_names(tmp_path: Path) -> None:
    spec = load(tmp_path, TOP + TABLES + "[models.vltvg-tiny]\n")
    assert spec.chosen() == list(spec.cells)
    chosen = spec.chosen(models=["vltvg-tiny"], seeds=[1])
    assert [(c.model, c.variant, c.seed) for c in chosen] == [("vltvg-tiny", "plain", 1), ("vltvg-tiny", "full", 1)]
    assert [c.variant for c in spec.chosen(variants=["full", "plain"], models=["vltvg-tiny"], seeds=[0])] == [
        "plain",
        "full",
    ]
    assert len(spec.chosen(data=["builtin:refcoco"])) == len(spec.cells)


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"models": ["qrnet-tiny"]}, r"has no model 'qrnet-tiny'; there is: transvg-tiny"),
        ({"data": ["refcoco"]}, r"has no data 'refcoco'; there is: builtin:refcoco"),
        ({"variants": ["plain", "fully"]}, r"has no variant 'fully'; there is: plain, full"),
        ({"seeds": [2]}, r"has no seed 2; there is: 0, 1"),
    ],
)
def test_a_choice_that_is_not_there_is_named(choice: dict[str, list[str]], says: str, tmp_path: Path) -> None:
    spec = load(tmp_path, TOP + TABLES)
    with pytest.raises(UserError, match=rf"study\.toml {says}"):
        spec.chosen(**choice)  # type: ignore[arg-type]


# --- the studies of this repository -----------------------------------------------------------------------------------


def test_there_are_studies() -> None:
    assert len(STUDIES) >= 5


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_of_ours_can_be_run(path: Path) -> None:
    spec = load_spec(path)
    assert spec.title
    assert "?" in spec.question
    labels = [variant.label for variant in spec.variants.values()]
    assert len(set(labels)) == len(labels)
    assert any(variant.against for variant in spec.variants.values())


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_variants_of_ours_differ(path: Path) -> None:
    spec = load_spec(path)
    assert len({identity(cell.settings) for cell in spec.cells}) == len(spec.cells)
