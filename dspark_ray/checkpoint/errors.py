"""The error of a checkpoint's files, apart from the reader, which imports torch."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names file, tensor, what was expected and what was found."""
