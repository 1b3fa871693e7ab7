"""Calls of planning and acceptance, to compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from model_shapes import GAMMA, ROWS, VOCABULARY

from dspark_kernels import gpu

_Q_IDS = 64


def calls() -> dict[str, Callable[[], object]]:
    """Calls to compile, by name and number of rows: verify blocks of six rows, or a single row."""
    found: dict[str, Callable[[], object]] = {}
    for num_rows in ROWS:
        found |= _calls(num_rows, -(-num_rows // (1 + GAMMA)))
    return found


def _calls(num_rows: int, num_requests: int) -> dict[str, Callable[[], object]]:
    requests = torch.zeros(num_requests, dtype=torch.int64)
    rows = torch.zeros(num_rows, dtype=torch.int64)
    first_rows = torch.zeros(num_requests + 1, dtype=torch.int64)
    confidences = torch.empty(num_requests, GAMMA)
    drafts = torch.empty(num_requests, GAMMA, dtype=torch.int64)
    logits = torch.empty(num_rows, VOCABULARY)
    q_ids = torch.empty(num_rows, _Q_IDS, dtype=torch.int64)
    q_probabilities = torch.empty(num_rows, _Q_IDS)
    thresholds, budget = torch.empty(num_requests), torch.tensor(num_rows)
    suffix = f"[N={num_rows}]"
    return {
        f"admit_prefixes {suffix}": lambda: gpu.admit_prefixes(confidences, requests, thresholds, budget),
        f"pack_rows {suffix}": lambda: gpu.pack_rows(requests, requests, drafts, requests, num_rows),
        f"accept_coupled {suffix}": lambda: gpu.accept_coupled(rows, rows, first_rows),
        f"accept_rejection {suffix}": lambda: gpu.accept_rejection(
            rows, logits, q_ids, q_probabilities, requests, rows, first_rows
        ),
    }
