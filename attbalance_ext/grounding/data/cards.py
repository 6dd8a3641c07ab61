"""What a built-in data set holds, in numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_text
from .attributes import HELD_OUT, VALUES
from .cache import cache_directory
from .dataset import load_arrays, sentences_of
from .expression import GROUPS
from .generate import SEEDS, Arrays, content_version
from .names import SPLITS, BuiltinName

Card = dict[str, Any]

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def card(name: str, *, cache: Path | None = None, size: int = 64, progress: bool = True) -> Card:
    """Statistics of every split of ``name``, also written as JSON beside the generated data.

    Splits that are not in the cache are generated. Shares are between 0 and 1. Per split:

    scenes, sentences, distinct_sentences, seen_in_train (share of the sentences that training has, word for word);
    words (per sentence), objects (per scene), box_ratio (box area / image area) with mean, extremes, quantiles;
    chance: accuracy, with perfect boxes, of taking any object, any object of the target's shape, and the
    largest object; clauses: for "location", "relation", "comparison" and "likeness" the share of sentences with
    such words (``present``) and the share that would fit several objects without them (``needed``).

    Raises:
        ValueError: no such data set or size.
    """
    parsed = BuiltinName.parse(name)
    found: Card = {
        "name": str(parsed),
        "content_version": content_version(),
        "image_size": size,
        "held_out_combinations": [" ".join(combination) for combination in HELD_OUT],
        "splits": {},
    }
    training: set[str] = set()
    for split in SPLITS:
        arrays = load_arrays(parsed, split, cache=cache, size=size, progress=progress)
        if split == "train":
            training = set(sentences_of(arrays))
        found["splits"][split] = {"seed": SEEDS[split], **_split_card(arrays, training)}
    stem = f"builtin-{parsed.flavour}{'-hard' if parsed.hard else ''}-{size}-{content_version()}"
    write_text(cache_directory(cache) / f"{stem}.card.json", json.dumps(found, indent=1) + "\n")
    return found


def _split_card(arrays: Arrays, training: set[str]) -> Card:
    sentences = sentences_of(arrays)
    objects = (arrays["object_labels"][..., 0] >= 0).sum(1)
    return {
        "scenes": len(objects),
        "sentences": len(sentences),
        "distinct_sentences": len(set(sentences)),
        "seen_in_train": _share([sentence in training for sentence in sentences]),
        "words": _distribution([len(sentence.split()) for sentence in sentences]),
        "objects": _distribution(objects),
        "box_ratio": _distribution(arrays["boxes"][:, 2].astype(float) * arrays["boxes"][:, 3]),
        "chance": _chance(arrays),
        "clauses": {
            group: {
                "present": _share(arrays["clause"] == index),
                "needed": _share((arrays["clause"] == index) & arrays["needed"]),
            }
            for index, group in enumerate(GROUPS)
        },
    }


def _chance(arrays: Arrays) -> dict[str, float]:
    scene, target = arrays["scene_index"], arrays["target"]
    shapes = arrays["object_labels"][scene, :, list(VALUES).index("shape")]  # (n, K), -1 in empty slots
    same_shape = (shapes == shapes[np.arange(len(target)), target][:, None]).sum(1)
    areas = arrays["object_boxes"][..., 2] * arrays["object_boxes"][..., 3]
    return {
        "any_object": _mean(1 / (shapes >= 0).sum(1)),
        "any_object_of_its_shape": _mean(1 / same_shape),
        "largest_object": _share(areas.argmax(1)[scene] == target),
    }


def _distribution(values: Any) -> dict[str, Any]:
    array = np.asarray(values, dtype=float)
    return {
        "mean": _mean(array),
        "min": round(float(array.min()), 4),
        "max": round(float(array.max()), 4),
        "quantiles": {
            f"{q:g}": round(float(v), 4) for q, v in zip(_QUANTILES, np.quantile(array, _QUANTILES), strict=True)
        },
    }


def _mean(values: Any) -> float:
    return round(float(np.mean(values)), 4)


_share = _mean
