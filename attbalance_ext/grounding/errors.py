"""The errors a user can put right."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what was asked for: one line that says what exists. The command line exits with 2."""


class TrainingFailed(Exception):
    """Training cannot go on (a loss that is not finite). The message says where the last good state lies."""


class NotWritten(OSError):
    """A file could not be written: a full disk, a folder that takes none. What lay there before is whole."""
