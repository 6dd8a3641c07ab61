"""Does looking help? Spearman's rho between in-box attention and IoU, layer by layer (AttBalance, section 3).

The intervals are percentile bootstraps over sentences. From 30 sentences on they cover as well as bias-corrected ones
(BCa), which ask for n jackknife samples of size n: at n = 6000 that takes longer than all the rest. Sentences about one
picture are drawn one by one; drawing whole pictures gives intervals of about the same width on the built-in data.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from scipy.stats import DegenerateDataWarning, bootstrap, rankdata, spearmanr
from torch import Tensor

from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.evaluate import Evaluation, evaluate
from attbalance_ext.grounding.provenance import commit
from attbalance_ext.grounding.runs import Run
from attbalance_ext.grounding.sources import open_pictures, open_split

CONFIDENCE = 0.95
FORMAT = 1
"""Of ``rho.json``; raised when its fields change their meaning."""
_AT_A_TIME = 120_000
"""Ranks of resamples: they still lie in the cache when the next step needs them."""


@dataclass(frozen=True)
class LayerRho:
    """One fusion layer of one model on one set. None: undefined there."""

    layer: int
    """Counted from 1."""
    supervised: bool
    n: int
    """Samples behind every number here: valid, with a finite in-box attention and IoU."""
    rho: float | None
    """Undefined where the attention or the IoU is constant, or n < 2."""
    p: float | None
    """Two-sided, of no correlation. Undefined where rho is, and for n = 2."""
    low: float | None
    """The interval's ends. Undefined where rho is, or in some resample: too few samples, or too few different ones."""
    high: float | None
    in_box: float | None
    """Mean attention inside the true box, of the supervised map."""
    used_in_box: float | None
    """The same of the attention that the network itself uses, which words take a part of."""
    used_visual: float | None
    """Mean part of the used attention on visual tokens, in the box or not."""


@dataclass(frozen=True)
class RunRho:
    """One model on one set."""

    name: str
    """Short, and another one for every run."""
    run: str
    checkpoint: str
    step: int
    model: str
    attbalance: bool
    data: str
    split: str
    samples: int
    """Sentences looked at, whether or not a layer could use them."""
    layers: list[LayerRho]


def correlate(
    runs: Sequence[Run],
    splits: Sequence[str],
    *,
    samples: int | None = None,
    resamples: int = 2000,
    seed: int = 0,
    cache: Path | None = None,
) -> Iterator[RunRho]:
    """Evaluate every run on every split; one result after the other, runs on the same split together.

    Args:
        samples: look at so many sentences of a split, evenly spaced; None: at all.
        resamples, seed: of the bootstrap. Every layer and run draws the same resamples.

    Raises:
        UserError: a run or a split is given twice, or a split does not exist, before anything is evaluated.
    """
    _refuse_twice("split", list(splits))
    _refuse_twice("run", [f"{run.checkpoint.resolve()}" for run in runs])
    for settings in {_data_of(run): run.settings for run in runs}.values():
        for split in splits:
            open_pictures(settings, split, cache=cache)
    names = _names(runs)
    for split in splits:
        for name, run in zip(names, runs, strict=True):
            settings = run.settings
            data = open_split(settings, split, run.tokenizer, run.model, cache=cache)
            found = evaluate(run.model, data, rule=settings.rule, backend=settings.backend, samples=samples)
            supervised = run.model.supervised if settings.attbalance else ()
            yield RunRho(
                name=name,
                run=str(run.directory),
                checkpoint=run.checkpoint.name,
                step=run.step,
                model=settings.model,
                attbalance=settings.attbalance,
                data=settings.data,
                split=split,
                samples=len(found.iou),
                layers=rho_by_layer(found, supervised=supervised, resamples=resamples, seed=seed),
            )


def rho_by_layer(
    evaluation: Evaluation, *, supervised: Collection[int] = (), resamples: int = 2000, seed: int = 0
) -> list[LayerRho]:
    """Rho with its sample size, p-value and interval for every layer. supervised: indices of layers, from 0."""
    layers = []
    for index, in_box in enumerate(evaluation.in_box):
        kept = evaluation.valid & in_box.isfinite() & evaluation.iou.isfinite()
        x, y = (values[kept].double().numpy() for values in (in_box, evaluation.iou))
        rho, p = _spearman(x, y)
        low, high = (None, None) if rho is None else _interval(x, y, resamples, seed)
        layers.append(
            LayerRho(
                layer=index + 1,
                supervised=index in supervised,
                n=len(x),
                rho=rho,
                p=p,
                low=low,
                high=high,
                in_box=_mean(in_box[kept]),
                used_in_box=_mean(evaluation.used[index][kept]),
                used_visual=_mean(evaluation.used_visual[index][kept]),
            )
        )
    return layers


def as_document(results: Sequence[RunRho], *, versions: Mapping[str, str], resamples: int, seed: int) -> dict[str, Any]:
    """Everything in plain types, as ``rho.json`` holds it: no number in it is NaN or infinite.

    ``versions``: of what else than SciPy had a part in it, name to value.
    """
    made_by, modified = commit()
    return {
        "format": FORMAT,
        "interval": {"method": "percentile bootstrap", "confidence": CONFIDENCE, "resamples": resamples, "seed": seed},
        "versions": {**versions, "scipy": scipy.__version__},
        "commit": made_by,
        "modified": modified,
        "results": [asdict(result) for result in results],
    }


def _spearman(x: np.ndarray, y: np.ndarray) -> tuple[float | None, float | None]:
    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return None, None
    found = spearmanr(x, y)
    return _defined(found.statistic), _defined(found.pvalue)


def _interval(x: np.ndarray, y: np.ndarray, resamples: int, seed: int) -> tuple[float | None, float | None]:
    # A resample's ranks follow from the sample's, and NumPy sorts small integers several times faster.
    ranks = [rankdata(values, "dense").astype(np.min_scalar_type(len(values))) for values in (x, y)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # a constant resample: the interval is NaN
        found = bootstrap(
            ranks,
            _rho_of_rows,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=max(_AT_A_TIME // len(x), 1),
            confidence_level=CONFIDENCE,
            method="percentile",
            random_state=np.random.default_rng(seed),
        )
    low, high = np.clip(found.confidence_interval, -1.0, 1.0)  # the rounding of a perfect correlation
    return _defined(low), _defined(high)


def _rho_of_rows(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """Spearman's rho of many samples at once (``spearmanr`` takes one pair); NaN where one is constant."""
    a, b = (ranks - ranks.mean(axis, keepdims=True) for ranks in (rankdata(x, axis=axis), rankdata(y, axis=axis)))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(axis) / np.sqrt((a * a).sum(axis) * (b * b).sum(axis))


def _mean(values: Tensor) -> float | None:
    return _defined(values.double().mean().item()) if len(values) else None


def _defined(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _names(runs: Sequence[Run]) -> list[str]:
    """The folders' names, or the paths of the checkpoints where two folders have the same."""
    short = [run.directory.resolve().name for run in runs]
    return [name if short.count(name) == 1 else str(run.checkpoint) for name, run in zip(short, runs, strict=True)]


def _data_of(run: Run) -> tuple[object, ...]:
    return run.settings.data, run.settings.data_root, run.settings.wrong_boxes, run.settings.size


def _refuse_twice(what: str, given: list[str]) -> None:
    for item in given:
        if given.count(item) > 1:
            raise UserError(f"the {what} {item} is given {given.count(item)} times")
