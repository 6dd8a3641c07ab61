"""Exceptions of the public API."""

from __future__ import annotations


class BackendUnavailable(RuntimeError):
    """An explicitly requested backend cannot run here; the message lists the reasons."""
