"""JSON lines: one sentence a line, the simplest format to write for one's own data."""

from __future__ import annotations

import json
from pathlib import Path

from ...files import write_text
from .view import SplitView


def write_jsonl(root: Path, views: list[SplitView], progress: bool) -> Path:
    """Write ``<root>/<split>.jsonl`` and ``<root>/images/``.

    A line is an object with image (path relative to the file), sentence, and bbox ([x, y, width, height] in pixels).
    """
    for view in views:
        view.write_images(root / "images", progress)
        records = (
            {"image": f"images/{view.image_name(row.scene)}", "sentence": row.sentence, "bbox": view.xywh(row.box)}
            for row in view.rows()
        )
        lines = (f"{json.dumps(record)}\n" for record in records)
        write_text(root / f"{view.split}.jsonl", "".join(lines))
    return root
