"""What a split holds, in a few characters: a run goes on with the data that it began with."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from .dataset import GroundingDataset
from .protocol import Pictures


def content(pictures: Pictures) -> dict[str, Any]:
    """The number of sentences, and a digest of sentences, boxes and pictures in their order.

    Pictures in files count by their names, wherever they lie; those in memory by their pixels too.
    """
    digest = hashlib.sha256()
    if isinstance(pictures, GroundingDataset):
        digest.update(pictures.images.contiguous().numpy().tobytes())
    for index, sentence in enumerate(pictures.sentences):
        picture = pictures.picture_key(index)
        name = picture.name if isinstance(picture, Path) else picture
        digest.update(ascii((name, *pictures.box(index), sentence)).encode())
    return {"sentences": len(pictures), "digest": digest.hexdigest()[:16]}
