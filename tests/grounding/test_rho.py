"""`attbalance rho`: each rho is SciPy's, with an interval that covers; what is undefined is said to be."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from helpers_command import call
from helpers_toy import ToyDataset, finish, toy_trainer
from scipy.stats import bootstrap, spearmanr
from torch import Tensor

from attbalance_ext import spearman_rho
from attbalance_ext.grounding import rho
from attbalance_ext.grounding.data.tokenizers import Tokenizer
from attbalance_ext.grounding.evaluate import Evaluation, evaluate
from attbalance_ext.grounding.models import GroundingModel
from attbalance_ext.grounding.rho import LayerRho, RunRho, as_document, correlate, rho_by_layer
from attbalance_ext.grounding.rho_plot import COLOURS, MARKERS, draw, write_plot
from attbalance_ext.grounding.runs import load_run
from attbalance_ext.grounding.settings import Settings
from attbalance_ext.grounding.split import PreparedSplit

SCENES = {"test": 20, "test_novel": 9}


def evaluation(in_box: Tensor, iou: Tensor, valid: Tensor | None = None) -> Evaluation:
    """in_box (L, n), iou (n,); the used attention is a half and three quarters of the supervised one."""
    every = torch.ones_like(iou, dtype=torch.bool)
    return Evaluation(
        boxes=torch.zeros(len(iou), 4),
        iou=iou,
        in_box=in_box,
        valid=every if valid is None else valid,
        box_ratio=torch.zeros_like(iou),
        used=in_box / 2,
        used_visual=in_box * 3 / 4,
    )


def related(n: int, layers: int = 3) -> Evaluation:
    """IoU is 0 for a third of the samples and attention has few values: ties on both sides."""
    iou = torch.rand(n)
    iou[: n // 3] = 0
    in_box = (10 * (0.5 * iou + torch.rand(layers, n))).round() / 15
    return evaluation(in_box, iou)


def pair(found: Evaluation, layer: int) -> tuple[np.ndarray, np.ndarray]:
    return found.in_box[layer].double().numpy(), found.iou.double().numpy()


def test_rho_is_scipys_and_the_librarys() -> None:
    found = related(211)
    library = spearman_rho(found.in_box, found.iou)
    for index, layer in enumerate(rho_by_layer(found, supervised=(1, 2), resamples=100)):
        truth = spearmanr(*pair(found, index))
        assert (layer.layer, layer.n, layer.supervised) == (index + 1, 211, index > 0)
        assert (layer.rho, layer.p) == (truth.statistic, truth.pvalue)
        assert layer.rho == pytest.approx(library[index].item(), abs=1e-6)
        means = found.in_box[index].mean().item() * np.array([1, 1 / 2, 3 / 4])
        assert [layer.in_box, layer.used_in_box, layer.used_visual] == pytest.approx(means, rel=1e-5)


def test_the_interval_is_scipys_bootstrap_of_spearmanr() -> None:
    found = related(50, layers=1)
    (layer,) = rho_by_layer(found, resamples=200, seed=3)
    truth = bootstrap(
        pair(found, 0),
        lambda x, y: spearmanr(x, y).statistic,
        paired=True,
        vectorized=False,
        n_resamples=200,
        method="percentile",
        random_state=np.random.default_rng(3),
    ).confidence_interval
    assert [layer.low, layer.high] == pytest.approx([truth.low, truth.high], abs=1e-12)
    assert layer.low is not None
    assert layer.rho is not None
    assert layer.high is not None
    assert layer.low < layer.rho < layer.high


def test_the_interval_covers_a_known_rho() -> None:
    """In about 95 % of 300 data sets; chance leaves the bounds less often than once in three hundred."""
    correlation, n, trials = 0.6, 60, 300
    true_rho = 6 / math.pi * math.asin(correlation / 2)  # of two normal variables
    y = torch.randn(trials, n)
    x = correlation * y + math.sqrt(1 - correlation**2) * torch.randn(trials, n)
    covered = 0
    for attention, iou in zip(x, y, strict=True):
        (layer,) = rho_by_layer(evaluation(attention[None], iou), resamples=300)
        assert layer.low is not None
        assert layer.high is not None
        covered += layer.low <= true_rho <= layer.high
    assert 0.91 < covered / trials < 0.985


def test_the_interval_follows_from_its_own_layer_and_the_seed() -> None:
    found = related(80)
    layers = rho_by_layer(found, resamples=100, seed=1)
    assert rho_by_layer(found, resamples=100, seed=1) == layers
    assert rho_by_layer(replace(found, in_box=found.in_box[2:]), resamples=100, seed=1)[0].low == layers[2].low
    other = rho_by_layer(found, resamples=100, seed=2)
    assert other[0].rho == layers[0].rho
    assert (other[0].low, other[0].high) != (layers[0].low, layers[0].high)


def test_invalid_samples_and_those_that_are_not_finite_are_left_out() -> None:
    found = related(40)
    found.valid[:4] = False
    found.in_box[:, 2] = 1e3
    found.iou[5] = torch.nan
    found.in_box[1, 7] = torch.inf
    layers = rho_by_layer(found, resamples=100)
    assert [layer.n for layer in layers] == [35, 34, 35]
    library = spearman_rho(found.in_box, found.iou, found.valid)
    for index, layer in enumerate(layers):
        kept = found.valid & found.iou.isfinite() & found.in_box[index].isfinite()
        assert layer.rho == spearmanr(found.in_box[index][kept], found.iou[kept]).statistic
        assert layer.rho == pytest.approx(library[index].item(), abs=1e-6)
        assert layer.in_box == pytest.approx(found.in_box[index][kept].mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("in_box", "iou"),
    [
        ([0.5] * 6, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.0] * 6),
        ([0.5], [0.5]),
        ([], []),
        ([math.nan, 0.5], [0.5, 0.6]),
    ],
)
def test_an_undefined_rho_is_none_without_a_warning(in_box: list[float], iou: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (layer,) = rho_by_layer(evaluation(torch.tensor([in_box]), torch.tensor(iou)))
    assert (layer.rho, layer.p, layer.low, layer.high) == (None, None, None, None)
    assert (layer.in_box is None) is (layer.n == 0)
    assert layer.n == sum(map(math.isfinite, in_box))


def test_an_interval_is_undefined_where_a_resample_is() -> None:
    iou = torch.zeros(12)
    iou[3] = 0.7  # a third of the resamples are without it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (layer,) = rho_by_layer(evaluation(torch.rand(1, 12), iou), resamples=100)
        (two,) = rho_by_layer(evaluation(torch.tensor([[0.1, 0.2]]), torch.tensor([0.3, 0.4])), resamples=100)
    assert layer.rho is not None
    assert layer.p is not None
    assert (layer.low, layer.high) == (None, None)
    assert two.rho == pytest.approx(1)
    assert (two.p, two.low, two.high) == (None, None, None)


def test_a_perfect_correlation_stays_within_1() -> None:
    values = torch.arange(300) / 300  # more than a byte counts
    up, down = rho_by_layer(evaluation(torch.stack([values, 1 - values]), values), resamples=100)
    assert up.high == 1
    assert up.low == pytest.approx(1)
    assert down.low == -1
    assert down.high == pytest.approx(-1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A plain run and one with AttBalance on layers 2 and 3."""
    folder = tmp_path_factory.mktemp("runs")
    for name, attbalance in (("plain", False), ("full", True)):
        finish(toy_trainer(folder / name, attbalance=attbalance))
    return [folder / "plain", folder / "full"]


def toy_split(settings: Settings, name: str, tokenizer: Tokenizer, model: GroundingModel, **_: object) -> PreparedSplit:
    return PreparedSplit(ToyDataset(SCENES[name]), tokenizer, model, torch.device("cpu"))


@pytest.fixture
def toy_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rho, "open_split", toy_split)
    monkeypatch.setattr(rho, "open_pictures", lambda settings, split, **_: ToyDataset(SCENES[split]))


def strict_json(text: str) -> Any:
    """NaN and infinity are no JSON."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.usefixtures("toy_data")
def test_several_runs_and_splits_as_json_and_files(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = ["--split", "test", "--split", "test_novel"]
    out = tmp_path / "made" / "here"
    arguments = ["rho", *folders, *splits, "--resamples", "150", "--seed", "4"]
    assert call(*arguments, "--json", "--out", out) == 0
    printed = capsys.readouterr()
    document = strict_json(printed.out)
    assert strict_json((out / "rho.json").read_text()) == document
    assert f"wrote {out / 'rho.json'} and {out / 'rho.svg'}" in printed.err
    assert sorted(path.name for path in out.iterdir()) == ["rho.json", "rho.svg"]

    assert document["interval"] == {
        "method": "percentile bootstrap",
        "confidence": 0.95,
        "resamples": 150,
        "seed": 4,
    }
    assert {"attbalance_ext", "torch", "scipy"} <= document["versions"].keys()
    results = document["results"]
    assert [(result["split"], result["name"]) for result in results] == [
        (split, name) for split in SCENES for name in ("plain", "full")
    ]
    for result in results:
        run = load_run(folders[result["name"] == "full"])
        assert result["run"] == str(run.directory)
        assert (result["checkpoint"], result["step"], result["model"]) == ("best.pt", run.step, "transvg-tiny")
        assert (result["data"], result["samples"]) == (run.settings.data, 2 * SCENES[result["split"]])
        split = toy_split(run.settings, result["split"], run.tokenizer, run.model)
        found = evaluate(run.model, split)
        assert [layer["supervised"] for layer in result["layers"]] == [False, *[result["name"] == "full"] * 2]
        for index, layer in enumerate(result["layers"]):
            truth = spearmanr(found.in_box[index], found.iou)
            assert layer["n"] == len(split)
            assert (layer["rho"], layer["p"]) == pytest.approx((truth.statistic, truth.pvalue), rel=1e-9)
            assert layer["used_in_box"] == pytest.approx(found.used[index].mean().item(), rel=1e-5)

    picture = (out / "rho.svg").read_bytes()
    assert call(*arguments, "--json", "--out", out) == 0  # once more, over the old files
    assert (out / "rho.svg").read_bytes() == picture


@pytest.mark.usefixtures("toy_data")
def test_tables_fit_80_columns_and_say_the_same(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["rho", *folders, "--resamples", "100"]
    assert call(*arguments) == 0
    tables = capsys.readouterr().out
    assert call(*arguments, "--json") == 0
    results = strict_json(capsys.readouterr().out)["results"]
    assert max(map(len, tables.splitlines())) <= 80
    for result in results:
        assert f"{result['name']} at step {result['step']}, {result['data']} test" in tables
        for layer in result["layers"]:
            row = [
                f"{layer['layer']}",
                "yes" if layer["supervised"] else "no",
                f"{layer['n']}",
                *(f"{layer[name]:+.3f}" for name in ("rho", "low", "high")),
                f"{layer['p']:.1e}",
                *(f"{layer[name]:.3f}" for name in ("in_box", "used_in_box")),
            ]
            assert row in [line.split() for line in tables.splitlines()]


@pytest.mark.usefixtures("toy_data")
def test_what_is_undefined_is_said_in_table_json_and_picture(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    constant = evaluation(torch.stack([torch.rand(30), torch.full((30,), 0.5)]), torch.rand(30))
    monkeypatch.setattr(rho, "evaluate", lambda *_, **__: constant)
    assert call("rho", folders[0], "--out", tmp_path) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["2", "no", "30", *["undefined"] * 3, "0.500", "0.250"] in table
    (result,) = strict_json((tmp_path / "rho.json").read_text())["results"]
    assert [layer["rho"] is None for layer in result["layers"]] == [False, True]
    assert "rho undefined in layer 2" in texts(tmp_path / "rho.svg")


@pytest.mark.usefixtures("toy_data")
def test_fewer_samples_may_be_looked_at(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("rho", folders[0] / "last.pt", "--samples", "11", "--resamples", "100", "--json") == 0
    (result,) = strict_json(capsys.readouterr().out)["results"]
    assert (result["samples"], [layer["n"] for layer in result["layers"]]) == (11, [11] * 3)
    assert (result["name"], result["checkpoint"], result["step"]) == ("plain", "last.pt", 24)


def test_mistakes_are_found_before_anything_is_evaluated(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: object, **__: object) -> NoReturn:
        raise AssertionError("evaluated")

    monkeypatch.setattr(rho, "evaluate", never)
    monkeypatch.setattr(rho, "open_split", never)
    monkeypatch.setenv("ATTBALANCE_CACHE", str(tmp_path))
    out = ["--out", tmp_path / "out"]
    for arguments, says in (
        (["no-such-run"], "no run at no-such-run"),
        ([*folders, "no-such-run"], "no run at no-such-run"),
        ([*folders, "--split", "nope"], "no split 'nope'; there are train, val, test, test_novel"),
        ([*folders, "--split", "test", "--split", "test"], "the split test is given 2 times"),
        ([folders[0], folders[1], folders[0] / "best.pt"], "best.pt is given 2 times"),
        ([tmp_path], "no checkpoint at"),
    ):
        assert call("rho", *arguments, *out) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert says in printed.err
        assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call("rho", *folders, *out) == 2
    assert "the picture needs 'matplotlib': pip install 'attbalance_ext[train]'" in capsys.readouterr().err


@pytest.mark.usefixtures("toy_data")
def test_runs_of_the_same_name_are_told_apart(folders: list[Path], tmp_path: Path) -> None:
    runs = [load_run(folders[0]), load_run(folders[1]), load_run(folders[0] / "last.pt")]
    names = [result.name for result in correlate(runs, ["test_novel"], resamples=100)]
    assert names == [str(folders[0] / "best.pt"), "full", str(folders[0] / "last.pt")]


def texts(picture: Path) -> list[str]:
    return [text for node in ElementTree.parse(picture).iter() if (text := (node.text or "").strip())]


def made_up(name: str, split: str, sizes: Sequence[int], *, undefined: Sequence[int] = ()) -> RunRho:
    """The layers after the first are supervised."""
    layers = []
    for layer, n in enumerate(sizes, 1):
        value = None if layer in undefined else 0.1 * layer
        low, high = (None, None) if value is None else (value - 0.05, value + 0.05)
        layers.append(LayerRho(layer, layer > 1, n, value, value, low, high, 0.5, 0.4, 0.9))
    return RunRho(name, f"runs/{name}", "best.pt", 9, "transvg-tiny", True, "unc", split, max(sizes), layers)


def test_the_picture_has_a_panel_for_each_set_and_a_sample_size_for_each_point(tmp_path: Path) -> None:
    write_plot(
        [
            made_up("plain", "testA", [5657] * 3),
            made_up("full", "testA", [5600, 5657, 5600]),
            made_up("plain", "testB", [5095] * 3, undefined=[2, 3]),
            made_up("a <b> & $c$ $d", "testB", [5095] * 3),
            made_up("_" + "x" * 50, "testB", [12] * 3),
        ],
        tmp_path / "rho.svg",
        resamples=2000,
    )
    found = texts(tmp_path / "rho.svg")
    for expected in (
        "unc testA",
        "plain, n = 5,657",
        "full",
        "n = 5,600 in layer 1, 3",
        "n = 5,657 in layer 2",
        "unc testB",
        "plain, n = 5,095",
        "rho undefined in layer 2, 3",
        "a <b> & $c$ $d, n = 5,095",
        f"…{'x' * 39}, n = 12",
    ):
        assert expected in found
    assert found.count("fusion layer") == 2
    assert any("95 % bootstrap intervals, 2,000 resamples" in text for text in found)


def test_points_lie_where_rho_is_and_supervised_ones_are_filled() -> None:
    figure = draw([made_up("full", "val", [100] * 4, undefined=[3])], resamples=100)
    (axis,) = figure.axes
    points = [line for line in axis.lines if line.get_marker() == MARKERS[0] and len(line.get_xdata())]
    assert [float(point.get_ydata()[0]) for point in points] == pytest.approx([0.1, 0.2, math.nan, 0.4], nan_ok=True)
    assert [float(point.get_xdata()[0]) for point in points] == [1, 2, 3, 4]
    assert [point.get_markerfacecolor() for point in points] == ["white", *[COLOURS[0]] * 3]
    ends = [bar.get_segments()[0][:, 1].tolist() for bar in axis.collections]
    assert ends == [pytest.approx([value - 0.05, value + 0.05]) for value in (0.1, 0.2, 0.4)]
    low, high = axis.get_ylim()
    assert low < 0 < 0.45 < high


def test_every_model_looks_the_same_in_all_panels_and_unlike_the_others() -> None:
    assert math.lcm(len(COLOURS), len(MARKERS)) == len(COLOURS) * len(MARKERS)
    names = [f"run {index}" for index in range(12)]
    results = [made_up(name, "val", [100]) for name in names] + [made_up(names[5], "test", [100])]
    figure = draw(results, resamples=100)
    looks = [
        [(line.get_color(), line.get_marker()) for line in axis.lines if line.get_marker() in MARKERS[:6]][::2]
        for axis in figure.axes
    ]
    assert len(set(looks[0])) == 12
    assert looks[1] == [looks[0][5]]


def test_nothing_but_finite_numbers_is_written() -> None:
    result = replace(made_up("x", "val", [0]), layers=rho_by_layer(evaluation(torch.empty(2, 0), torch.empty(0))))
    json.dumps(as_document([result], versions={}, resamples=100, seed=0), allow_nan=False)
    draw([result], resamples=100)


def test_the_picture_needs_no_pyplot(tmp_path: Path) -> None:
    """pyplot keeps every figure and may want a display."""
    before = "matplotlib.pyplot" in sys.modules
    write_plot([made_up("x", "val", [10])], tmp_path / "rho.svg", resamples=100)
    assert ("matplotlib.pyplot" in sys.modules) is before
