"""Finds the golden numbers and lists their cases; a new case of a known kind needs no new code."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor


def golden_dir() -> Path:
    """The folder of golden numbers: `DSPARK_GOLDEN_DIR`, or the one beside this file."""
    return Path(os.environ.get("DSPARK_GOLDEN_DIR", Path(__file__).parent))


def case_files(pattern: str) -> list[Path]:
    """JSON files matching `pattern` below the golden folder; raises FileNotFoundError where there is none."""
    found = sorted(golden_dir().glob(pattern))
    if not found:
        raise FileNotFoundError(f"{golden_dir()}/{pattern}: no golden case; DSPARK_GOLDEN_DIR tells where they are")
    return found


def case_name(path: Path) -> str:
    """The name of the case in test ids."""
    return path.parent.name if path.stem == "golden" else path.stem


@dataclass(frozen=True)
class GoldenCase:
    """A JSON description and the tensors beside it."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    @staticmethod
    def load(path: Path) -> GoldenCase:
        """Read `X.json` and `X.safetensors`."""
        return GoldenCase(json.loads(path.read_text()), load_file(path.with_suffix(".safetensors")))

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with `prefix`, under the rest of their names."""
        found = {name: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}

    @property
    def num_rounds(self) -> int:
        """Recorded rounds `round0.`, `round1.`, ..."""
        numbers = {name.split(".")[0] for name in self.tensors if name.startswith("round")}
        return len(numbers)
