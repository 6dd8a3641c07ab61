"""Addresses of what lies in a folder or on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path


def address(name: str) -> tuple[str, str | None]:
    """(folder or hub id, revision or None) of a folder, a hub id or ``id@revision``. Hub ids have no @."""
    source, at, revision = name.rpartition("@")
    return (source, revision) if at and not Path(name).is_dir() else (name, None)
