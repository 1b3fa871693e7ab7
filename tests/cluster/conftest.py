"""Tests on several raylets of one machine; they use the small model and the helpers of tests/serve."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112

sys.path.append(str(Path(__file__).parents[1] / "serve"))
sys.path.append(str(Path(__file__).parents[1] / "unit"))
