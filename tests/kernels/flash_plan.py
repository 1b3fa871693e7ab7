"""Planning and acceptance at DeepSeek-V4-Flash shapes: one request with five drafts, and 256 of them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dspark_kernels import gpu

_GAMMA, _VOCABULARY, _Q_IDS = 5, 129280, 64


def flash_calls() -> dict[str, Callable[[], object]]:
    """Calls by name; the tensors' values mean nothing."""
    calls: dict[str, Callable[[], object]] = {}
    for num_requests in (1, 256):
        calls.update(_calls(num_requests))
    return calls


def _calls(num_requests: int) -> dict[str, Callable[[], object]]:
    num_rows = num_requests * (1 + _GAMMA)
    requests = torch.zeros(num_requests, dtype=torch.int64)
    rows = torch.zeros(num_rows, dtype=torch.int64)
    first_rows = torch.zeros(num_requests + 1, dtype=torch.int64)
    confidences = torch.empty(num_requests, _GAMMA)
    drafts = torch.empty(num_requests, _GAMMA, dtype=torch.int64)
    logits = torch.empty(num_rows, _VOCABULARY)
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
