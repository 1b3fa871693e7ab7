"""Everything that rows of logits need to become tokens, as a few small tensors that travel to every rank.

Letters: n rows of logits, m edited (row, token) pairs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from dspark_ray.types import SamplingParams

_UNLIMITED_TOP_K = 2**31
_LOWEST_TEMPERATURE = 1e-5
"""Colder rows would drown the noise in float32; at this temperature it hardly matters already."""


class Packed:
    """A dataclass of tensors that moves between devices, and pickles as numpy, which is ten times faster."""

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
class Draws(Packed):
    """How n rows are tempered, filtered and drawn; row i is about one request's `SamplingParams`."""

    integers: Tensor
    """[3, n] int64: seeds, positions, top_k (huge where all tokens stay)."""
    floats: Tensor
    """[3, n] float64: temperatures, top_p, min_p."""
    any_sampled: bool
    """Whether a row has a temperature above 0."""
    any_filtered: bool
    widest_top_k: int
    """Sorting this many logits per row decides every filter."""

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
        """[n, 1] whether a row is drawn with noise."""
        return (self.temperatures > 0).unsqueeze(1)

    def filters(self, vocab_size: int) -> tuple[Tensor, Tensor, Tensor, int] | None:
        """The last arguments of `dspark_kernels.lowest_kept_logit`; None where no row has a filter."""
        if not self.any_filtered:
            return None
        return self.top_k, self.top_p, self.min_p, min(self.widest_top_k, vocab_size)

    @property
    def num_rows(self) -> int:
        return self.integers.shape[1]


def pack_draws(params: Sequence[SamplingParams], positions: Sequence[int]) -> dict[str, Any]:
    """Fields of a `Draws`, one row per entry."""
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
class Edits(Packed):
    """Changes of single logits: logit = scaled(logit, factor) + offset, each pair (row, token) once."""

    rows: Tensor
    """[m] int64"""
    token_ids: Tensor
    """[m] int64"""
    factors: Tensor
    """[m] float32 repetition penalty: divides positive logits, multiplies negative ones."""
    offsets: Tensor
    """[m] float32 frequency and presence penalties and bias; -inf forbids."""

    def select(self, mask: Tensor) -> Edits:
        """The pairs where mask [m] is true."""
        return Edits(*(getattr(self, field.name)[mask] for field in fields(self)))


@dataclass(frozen=True)
class RowContext:
    """What one row predicts: the token at `position` of a request."""

    params: SamplingParams
    position: int
    """Absolute index of the predicted token, prompt included."""
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    """Committed outputs and the block's drafts before this row; read only where penalties need them."""
    forbidden_token_ids: Sequence[int] = ()
    """Tokens that may not come now (end of text before min_tokens)."""
    wants_distribution: bool = False
    """Whether acceptance needs the whole processed row, not only a token; greedy rows never do."""


@dataclass(frozen=True)
class SamplingRows(Draws):
    """How each of n rows of logits becomes a token."""

    edits: Edits | None
    logprobs: tuple[int | None, ...]
    """Per row how many alternatives to report, None for no report."""
    wants_distribution: tuple[bool, ...]
    whole: tuple[int, ...]
    """Rows of which one rank must see the whole vocabulary; the others are decided shard by shard."""

    def to(self, device: torch.device | str) -> SamplingRows:
        rows = super().to(device)
        return rows if rows.edits is None else replace(rows, edits=rows.edits.to(device))

    def select(self, indices: Sequence[int]) -> SamplingRows:
        """Only the rows `indices`, renumbered 0, 1, ...; sorted and without repetition."""
        if len(indices) == self.num_rows:
            return self
        index = torch.tensor(indices, device=self.integers.device)
        return replace(
            self,
            integers=self.integers[:, index],
            floats=self.floats[:, index],
            edits=self._select_edits(index),
            logprobs=tuple(self.logprobs[i] for i in indices),
            wants_distribution=tuple(self.wants_distribution[i] for i in indices),
            whole=tuple(new for new, old in enumerate(indices) if old in self.whole),
        )

    def _select_edits(self, index: Tensor) -> Edits | None:
        if self.edits is None:
            return None
        number = index.new_full((self.num_rows,), -1)
        number[index] = torch.arange(len(index), device=index.device)
        rows = number[self.edits.rows]
        return replace(self.edits, rows=rows).select(rows >= 0)


def build_sampling_rows(contexts: Sequence[RowContext], vocab_size: int) -> SamplingRows:
    """Pack n contexts, on the CPU. Token ids of the contexts must lie in 0..vocab_size-1."""
    return SamplingRows(
        **pack_draws([context.params for context in contexts], [context.position for context in contexts]),
        edits=_build_edits(contexts, vocab_size),
        logprobs=tuple(context.params.logprobs for context in contexts),
        wants_distribution=tuple(_wants_distribution(context) for context in contexts),
        whole=tuple(row for row, context in enumerate(contexts) if _needs_whole_row(context)),
    )


def _needs_whole_row(context: RowContext) -> bool:
    return _wants_distribution(context) or context.params.logprobs is not None or context.params.has_filter


def _wants_distribution(context: RowContext) -> bool:
    return context.wants_distribution and context.params.temperature > 0


def _build_edits(contexts: Sequence[RowContext], vocab_size: int) -> Edits | None:
    edited = [row for row, context in enumerate(contexts) if _has_edits(context)]
    if not edited:
        return None
    # The rows of a block share their prompt, which may be long.
    prompts = {id(contexts[row].prompt_token_ids): _prompt_ids(contexts[row]) for row in edited}
    parts = [_edits_of(contexts[row], prompts[id(contexts[row].prompt_token_ids)]) for row in edited]
    rows = np.repeat(edited, [len(token_ids) for token_ids, _, _ in parts])
    token_ids, factors, offsets = (np.concatenate(column) for column in zip(*parts, strict=True))
    inside = (token_ids >= 0) & (token_ids < vocab_size)
    assert inside.all(), f"token ids {token_ids[~inside]} are not in the vocabulary: requests are checked on arrival"
    return Edits(*map(torch.from_numpy, (rows, token_ids, factors, offsets)))


def _has_edits(context: RowContext) -> bool:
    params = context.params
    return bool(params.has_penalties or params.logit_bias or context.forbidden_token_ids)


def _prompt_ids(context: RowContext) -> np.ndarray:
    """Sorted distinct prompt tokens, where a penalty looks at them."""
    return np.unique(_ids(context.prompt_token_ids if context.params.repetition_penalty != 1 else ()))


def _ids(token_ids: Collection[int]) -> np.ndarray:
    return np.fromiter(token_ids, dtype=np.int64, count=len(token_ids))


def _edits_of(context: RowContext, prompt_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, factors and offsets of one row."""
    params = context.params
    penalised = context.output_token_ids if params.has_penalties else ()
    outputs, counts = np.unique(_ids(penalised), return_counts=True)
    biased, forbidden = _ids(params.logit_bias), _ids(context.forbidden_token_ids)
    token_ids = np.unique(np.concatenate((prompt_ids, outputs, biased, forbidden)))
    factors, offsets = np.ones(len(token_ids), np.float32), np.zeros(len(token_ids), np.float32)
    factors[np.isin(token_ids, np.concatenate((prompt_ids, outputs)))] = params.repetition_penalty
    penalties = params.presence_penalty + params.frequency_penalty * counts
    offsets[np.searchsorted(token_ids, outputs)] -= penalties
    offsets[np.searchsorted(token_ids, biased)] += list(params.logit_bias.values())
    offsets[np.searchsorted(token_ids, forbidden)] = -np.inf
    return token_ids, factors, offsets
