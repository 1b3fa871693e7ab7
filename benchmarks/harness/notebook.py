"""Finished parts of a measurement, kept so that an interrupted run continues from them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


class Notebook:
    """Finished parts, one JSON line each; lines with another fingerprint are ignored."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path, self._fingerprint = path, fingerprint
        path.parent.mkdir(parents=True, exist_ok=True)

    def entries(self, part: str) -> list[dict[str, Any]]:
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        entries = [json.loads(line) for line in lines]
        return [e for e in entries if e["part"] == part and e["fingerprint"] == self._fingerprint]

    def add(self, part: str, figures: dict[str, Any]) -> None:
        entry = {"part": part, "fingerprint": self._fingerprint, **figures}
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def fingerprint_of(settings: str, root: Path, checkpoint: Path) -> str:
    """Changes with the code, the checkpoint and the settings."""
    digest = hashlib.sha256(settings.encode())
    folders = (root / "dspark_ray", root / "kernels", root / "deployments", checkpoint)
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
        if path.suffix in (".py", ".json", ".yaml"):
            digest.update(path.read_bytes())
        elif path.suffix == ".safetensors":
            digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
