"""A request in flight."""

from __future__ import annotations

from dataclasses import dataclass, field

from dspark_ray.sampling.sampling_rows import RequestSampling
from dspark_ray.types import FinishReason, Request, SpeculationStats


@dataclass
class StatsCounter:
    """Running totals of one request, from which SpeculationStats are made."""

    num_rounds: int = 0
    num_drafted: int = 0
    num_admitted: int = 0
    num_accepted: int = 0
    histogram: list[int] = field(default_factory=list)

    def record(self, num_drafted: int, num_admitted: int, num_accepted: int) -> None:
        """Add one decoding round."""
        self.num_rounds += 1
        self.num_drafted += num_drafted
        self.num_admitted += num_admitted
        self.num_accepted += num_accepted
        self.histogram += [0] * (num_accepted + 1 - len(self.histogram))
        self.histogram[num_accepted] += 1

    def freeze(self) -> SpeculationStats:
        return SpeculationStats(
            self.num_rounds, self.num_drafted, self.num_admitted, self.num_accepted, tuple(self.histogram)
        )


class Sequence:
    """A request with its committed tokens, and how many of them the target's cache holds.

        tokens    [ prompt ........ | outputs ........ anchor ]
                  [ 0 ..... num_computed - 1 ][ not in the cache yet ]

    A sequence decodes when only its anchor is not in the cache.
    """

    def __init__(self, request: Request, eos_token_ids: tuple[int, ...], vocab_size: int) -> None:
        """Raises ValueError for token ids outside the vocabulary."""
        params = request.sampling
        self.request = request
        eos = () if params.ignore_eos else eos_token_ids
        self.stop_ids = frozenset((*eos, *params.stop_token_ids))
        """Ids that end the text once it has min_tokens."""
        self.sampling = RequestSampling(params, request.prompt_token_ids, self.stop_ids, vocab_size)
        self.tokens = [*request.prompt_token_ids, *request.output_token_ids]
        self.num_prompt = len(request.prompt_token_ids)
        self.num_computed = 0
        self.slot: int | None = None
        self.pages: list[int] = []
        self.stats = StatsCounter()
        self.finish_reason: FinishReason | None = None

    @property
    def length(self) -> int:
        """Committed tokens, the anchor included."""
        return len(self.tokens)

    @property
    def anchor(self) -> int:
        return self.tokens[-1]

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def output_token_ids(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def num_missing(self) -> int:
        """Committed tokens that are not in the cache."""
        return len(self.tokens) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        return self.slot is not None and self.num_missing == 1 and self.num_outputs > 0
