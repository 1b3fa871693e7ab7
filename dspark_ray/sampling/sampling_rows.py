"""Sampling parameters of every row of logits, as a few small tensors that are sent to every rank.

Letters: n rows of logits, m edited (row, token) pairs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from dspark_ray.types import MAX_TOKEN_ID, SamplingParams

_UNLIMITED_TOP_K = 2**31
_LOWEST_TEMPERATURE = 1e-5
"""At lower ones float32 logits would swallow the noise, which hardly matters at this temperature already."""


class Packed:
    """A dataclass of tensors that can move between devices; pickled as numpy arrays, which is ten times faster."""

    def to(self, device: torch.device | str) -> Self:
        """The same values with every tensor on `device`."""
        if all(tensor.device == torch.device(device) for tensor in self._tensors().values()):
            return self
        moved = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return replace(self, **moved)  # type: ignore[type-var]

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {name: tensor.cpu().numpy() for name, tensor in self._tensors().items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            value = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class SamplingTensors(Packed):
    """Temperature, filters and noise address of n rows; each row follows one request's `SamplingParams`."""

    integers: Tensor
    """[3, n] int64: seeds, positions, top_k (2^31 where it filters nothing)."""
    floats: Tensor
    """[3, n] float64: temperatures, top_p, min_p."""
    any_sampled: bool
    """Whether a row has a temperature above 0."""
    any_filtered: bool
    widest_top_k: int
    """The largest top_k of all rows: the most logits per row that a filter has to sort."""

    @property
    def seeds(self) -> Tensor:
        return self.integers[0]

    @property
    def positions(self) -> Tensor:
        """Absolute index of the token that each row predicts: the address of its noise."""
        return self.integers[1]

    @property
    def top_k(self) -> Tensor:
        return self.integers[2]

    @property
    def temperatures(self) -> Tensor:
        return self.floats[0]

    @property
    def top_p(self) -> Tensor:
        return self.floats[1]

    @property
    def min_p(self) -> Tensor:
        return self.floats[2]

    @property
    def is_sampled(self) -> Tensor:
        """[n, 1] whether a row's temperature is above 0."""
        return (self.temperatures > 0).unsqueeze(1)

    def filters(self, vocab_size: int) -> tuple[Tensor, Tensor, Tensor, int] | None:
        """(top_k, top_p, min_p, widest top_k) for `dspark_kernels.filter_threshold`; None where no row has a filter."""
        if not self.any_filtered:
            return None
        return self.top_k, self.top_p, self.min_p, min(self.widest_top_k, vocab_size)

    @property
    def num_rows(self) -> int:
        return self.integers.shape[1]


def pack_sampling(params: Sequence[SamplingParams], positions: Sequence[int]) -> dict[str, Any]:
    """Fields of `SamplingTensors`, one row per entry."""
    top_k = [p.top_k or _UNLIMITED_TOP_K for p in params]
    temperatures = [max(p.temperature, _LOWEST_TEMPERATURE) if p.temperature else 0.0 for p in params]
    integers = np.array([[p.seed for p in params], positions, top_k], dtype=np.int64)
    floats = np.array([temperatures, [p.top_p for p in params], [p.min_p for p in params]], dtype=np.float64)
    return {
        "integers": torch.from_numpy(integers),
        "floats": torch.from_numpy(floats),
        "any_sampled": any(temperatures),
        "any_filtered": any(p.has_filter for p in params),
        "widest_top_k": max(top_k, default=1),
    }


@dataclass(frozen=True)
class LogitEdits(Packed):
    """Changes of single logits: logit = scaled(logit, factor) + offset, each pair (row, token) once."""

    rows: Tensor
    """[m] int64"""
    token_ids: Tensor
    """[m] int64"""
    factors: Tensor
    """[m] float32 repetition penalty: divides positive logits, multiplies negative ones."""
    offsets: Tensor
    """[m] float32 frequency and presence penalties and bias; -inf forbids."""

    def select(self, mask: Tensor) -> LogitEdits:
        """The pairs where mask [m] is true."""
        return LogitEdits(*(getattr(self, field.name)[mask] for field in fields(self)))


_NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class RowEdits:
    """Changes of single logits of one row, each token id once; arrays are [m], as the fields of `LogitEdits`."""

    token_ids: np.ndarray
    factors: np.ndarray
    offsets: np.ndarray


class RequestSampling:
    """Sampling data shared by all rows of one request, computed once when the request is added."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int] = (),
        stop_ids: Collection[int] = (),
        vocab_size: int = MAX_TOKEN_ID + 1,
    ) -> None:
        """`stop_ids` are forbidden before min_tokens. Raises ValueError for ids that are not in the vocabulary."""
        self.params = params
        self._biased = _ids(params.logit_bias)
        self._biases = np.fromiter(params.logit_bias.values(), dtype=np.float64, count=len(params.logit_bias))
        self._stops = _ids(sorted(stop_ids))
        self._prompt = np.unique(_ids(prompt_token_ids)) if params.repetition_penalty != 1 else _NONE
        for token_ids in (self._biased, self._stops, self._prompt):
            outside = token_ids[(token_ids < 0) | (token_ids >= vocab_size)]
            if len(outside):
                raise ValueError(f"token ids {outside[:5]}: expected 0..{vocab_size - 1}")

    def edits(self, output_token_ids: Sequence[int], before_min_tokens: bool) -> RowEdits | None:
        """Edits of the row that follows `output_token_ids`, which are read only where penalties need them."""
        params = self.params
        if not (params.has_penalties or len(self._biased) or (before_min_tokens and len(self._stops))):
            return None
        forbidden = self._stops if before_min_tokens else _NONE
        outputs, counts = np.unique(_ids(output_token_ids if params.has_penalties else ()), return_counts=True)
        token_ids = np.unique(np.concatenate((self._prompt, outputs, self._biased, forbidden)))
        factors, offsets = np.ones(len(token_ids), np.float32), np.zeros(len(token_ids), np.float32)
        if params.repetition_penalty != 1:
            factors[np.searchsorted(token_ids, self._prompt)] = params.repetition_penalty
            factors[np.searchsorted(token_ids, outputs)] = params.repetition_penalty
        offsets[np.searchsorted(token_ids, outputs)] -= params.presence_penalty + params.frequency_penalty * counts
        offsets[np.searchsorted(token_ids, self._biased)] += self._biases
        offsets[np.searchsorted(token_ids, forbidden)] = -np.inf
        return RowEdits(token_ids, factors, offsets)


class RowContext:
    """Sampling of one row, which predicts the token at `position` of a request."""

    def __init__(
        self,
        sampling: RequestSampling,
        position: int,
        output_token_ids: Sequence[int] = (),
        before_min_tokens: bool = False,
        wants_distribution: bool = False,
    ) -> None:
        """`position` is the absolute index of the predicted token, prompt included. `output_token_ids` are the
        committed outputs and the block's drafts before this row, read only where penalties need them.
        `before_min_tokens` forbids stop tokens. `wants_distribution` asks for the processed row besides a token, as
        rejection verification needs it; ignored for greedy rows.
        """
        params = sampling.params
        self.params, self.position = params, position
        self.edits = sampling.edits(output_token_ids, before_min_tokens)
        self.wants_distribution = wants_distribution and params.temperature > 0

    @property
    def needs_full_vocab(self) -> bool:
        """Whether one rank must see the logits of the full vocabulary."""
        return self.wants_distribution or self.params.logprobs is not None or self.params.has_filter


@dataclass(frozen=True)
class SamplingRows(SamplingTensors):
    """Everything that turns each of n rows of logits into a token."""

    edits: LogitEdits | None
    logprobs: tuple[int | None, ...]
    """Per row how many alternatives to report, None for no report."""
    wants_distribution: tuple[bool, ...]
    full_vocab_rows: tuple[int, ...]
    """Rows whose full logits one rank must see; the others are decided shard by shard."""

    def to(self, device: torch.device | str) -> SamplingRows:
        rows = super().to(device)
        return rows if rows.edits is None else replace(rows, edits=rows.edits.to(device))

    def select(self, indices: Sequence[int]) -> SamplingRows:
        """Only the rows `indices`, renumbered 0, 1, ...; sorted and without repetition."""
        if len(indices) == self.num_rows:
            return self
        index, full = torch.tensor(indices, device=self.integers.device), frozenset(self.full_vocab_rows)
        return replace(
            self,
            integers=self.integers[:, index],
            floats=self.floats[:, index],
            edits=self._select_edits(index),
            logprobs=tuple(self.logprobs[i] for i in indices),
            wants_distribution=tuple(self.wants_distribution[i] for i in indices),
            full_vocab_rows=tuple(new for new, old in enumerate(indices) if old in full),
        )

    def _select_edits(self, index: Tensor) -> LogitEdits | None:
        if self.edits is None:
            return None
        number = index.new_full((self.num_rows,), -1)
        number[index] = torch.arange(len(index), device=index.device)
        rows = number[self.edits.rows]
        return replace(self.edits, rows=rows).select(rows >= 0)


def build_sampling_rows(contexts: Sequence[RowContext]) -> SamplingRows:
    """Pack n contexts, on the CPU."""
    return SamplingRows(
        **pack_sampling([context.params for context in contexts], [context.position for context in contexts]),
        edits=_join_edits([context.edits for context in contexts]),
        logprobs=tuple(context.params.logprobs for context in contexts),
        wants_distribution=tuple(context.wants_distribution for context in contexts),
        full_vocab_rows=tuple(row for row, context in enumerate(contexts) if context.needs_full_vocab),
    )


def _join_edits(edits: Sequence[RowEdits | None]) -> LogitEdits | None:
    """None where no row has any."""
    by_row = [(row, own) for row, own in enumerate(edits) if own is not None]
    if not by_row:
        return None
    rows = np.repeat([row for row, _ in by_row], [len(own.token_ids) for _, own in by_row])
    columns = zip(*((own.token_ids, own.factors, own.offsets) for _, own in by_row), strict=True)
    return LogitEdits(*map(torch.from_numpy, (rows, *map(np.concatenate, columns))))


def _ids(token_ids: Collection[int]) -> np.ndarray:
    return np.fromiter(token_ids, dtype=np.int64, count=len(token_ids))
