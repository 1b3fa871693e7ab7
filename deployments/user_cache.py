"""The folder in which files are kept from one start to the next."""

from __future__ import annotations

import platformdirs


def cache_directory() -> str | None:
    """The user's cache folder for this project, on the node where this is called; None for a user without a home."""
    path = platformdirs.user_cache_path("dspark-ray")
    return str(path) if path.is_absolute() else None
