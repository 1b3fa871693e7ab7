"""Continuous batching with chunked prefill, and preemption when the cache is full."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from dspark_ray.cache.pages import PagePool
from dspark_ray.config import ResolvedConfig
from dspark_ray.engine.sequence import Sequence
from dspark_ray.types import QueueFullError


@dataclass(frozen=True)
class PrefillChunk:
    """The next `num_tokens` uncomputed tokens of a sequence."""

    sequence: Sequence
    num_tokens: int

    @property
    def slot(self) -> int:
        assert self.sequence.slot is not None, "every sequence of a plan holds a slot"
        return self.sequence.slot


@dataclass(frozen=True)
class StepPlan:
    """The sequences that decode, each with room for gamma drafts, and the prefill chunks of a step."""

    decoding: tuple[Sequence, ...]
    prefill: tuple[PrefillChunk, ...]

    @property
    def is_empty(self) -> bool:
        return not self.decoding and not self.prefill


class Scheduler:
    """Owns every sequence, its slot and its pages."""

    def __init__(self, config: ResolvedConfig) -> None:
        self.config, self.gamma = config, config.gamma
        self.pool = PagePool(config.num_pages, config.page_size)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """Oldest first: the youngest is preempted first."""
        self.num_preemptions = 0
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._by_id: dict[str, Sequence] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; raises QueueFullError when max_num_seqs + max_waiting requests are unfinished.

        Running ones count too: nothing is admitted before the next step, so a burst on an idle engine passes through
        the queue. A request that continues from another engine was accepted there and is never refused.
        """
        limit = self.config.max_num_seqs + self.config.max_waiting
        if len(self._by_id) >= limit and not sequence.request.output_token_ids:
            raise QueueFullError(
                f"{len(self._by_id)} requests have not ended, max_num_seqs={self.config.max_num_seqs}"
                f" and max_waiting={self.config.max_waiting} more may wait"
            )
        self._by_id[sequence.request.request_id] = sequence
        self.waiting.append(sequence)

    def add_computed(self, sequence: Sequence) -> None:
        """Let a sequence decode at once, as if all but its last token had been computed.

        For the profiler: the cache content is arbitrary. Raises QueueFullError when there is no room.
        """
        num_positions = min(sequence.length + self.gamma, self.config.max_model_len)
        if not self._free_slots or not self.pool.can_grow([], num_positions):
            raise QueueFullError(f"{len(self.running)} sequences run, and there is no room for one more")
        self._by_id[sequence.request.request_id] = sequence
        sequence.slot = self._free_slots.pop()
        sequence.num_computed = sequence.length - 1
        self.pool.grow(sequence.pages, num_positions)
        self.running.append(sequence)

    def remove(self, request_id: str) -> Sequence | None:
        """Remove a sequence and free its slot and pages; None for an unknown id."""
        sequence = self._by_id.pop(request_id, None)
        if sequence is None:
            return None
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self._release(sequence)
        return sequence

    def plan(self) -> StepPlan:
        """Plan decoding sequences first, then prefill chunks in the remaining rows."""
        decoding = self._plan_decoding()
        rows_left = self.config.max_num_batched_tokens - len(decoding) * (1 + self.gamma)
        prefill = self._plan_prefill(rows_left)
        # A prefilling sequence may have preempted a younger one that was planned before it. That one holds no slot, or
        # was admitted again with nothing computed.
        return StepPlan(
            tuple(sequence for sequence in decoding if sequence.is_decoding),
            tuple(chunk for chunk in prefill if chunk.sequence.slot is not None),
        )

    def check_idle(self) -> None:
        """Assert that nothing is held when no sequence is left."""
        assert not self.running and not self.waiting and not self._by_id, "sequences left behind"
        assert self.pool.num_free == self.pool.num_pages, "pages left behind"
        assert len(self._free_slots) == self.config.max_num_seqs, "slots left behind"

    def _plan_decoding(self) -> list[Sequence]:
        planned = []
        for sequence in [s for s in self.running if s.is_decoding]:
            # Preempted sequences are younger than this one, or this one itself.
            if sequence.slot is not None and self._make_room(sequence, sequence.length + self.gamma):
                planned.append(sequence)
        return planned

    def _plan_prefill(self, rows_left: int) -> list[PrefillChunk]:
        chunks: list[PrefillChunk] = []
        for sequence in [s for s in self.running if not s.is_decoding]:
            if rows_left <= 0:
                return chunks
            num_tokens = min(sequence.num_missing, rows_left)
            if sequence.slot is not None and self._make_room(sequence, sequence.num_computed + num_tokens):
                chunks.append(PrefillChunk(sequence, num_tokens))
                rows_left -= num_tokens
        while rows_left > 0 and self._can_admit():
            sequence = self._admit()
            num_tokens = min(sequence.num_missing, rows_left)
            self.pool.grow(sequence.pages, num_tokens)
            chunks.append(PrefillChunk(sequence, num_tokens))
            rows_left -= num_tokens
        return chunks

    def _can_admit(self) -> bool:
        if not self.waiting or not self._free_slots:
            return False
        # Room for the whole text so far and gamma drafts, or the sequence would be preempted before it decodes.
        return self.pool.can_grow([], min(self.waiting[0].length + self.gamma, self.config.max_model_len))

    def _admit(self) -> Sequence:
        sequence = self.waiting.popleft()
        sequence.slot = self._free_slots.pop()
        self.running.append(sequence)
        return sequence

    def _make_room(self, sequence: Sequence, num_positions: int) -> bool:
        """Grow the sequence's pages, preempting the youngest sequences for it; False when it was preempted itself."""
        num_positions = min(num_positions, self.config.max_model_len)
        while not self.pool.can_grow(sequence.pages, num_positions):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        self.pool.grow(sequence.pages, num_positions)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Move a sequence to the front of the queue; it keeps its tokens, which are computed again."""
        self._release(sequence)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.running.remove(sequence)
        self.pool.release(sequence.pages)
        self._free_slots.append(sequence.slot)
        sequence.slot = None
