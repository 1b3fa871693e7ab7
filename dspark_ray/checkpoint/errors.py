"""The error of a checkpoint's files, apart from the reader, which imports torch."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded; the message names file, tensor, the expected and the found value."""
