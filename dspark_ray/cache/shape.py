"""Size of the target's KV cache: ring lengths, staging rows and pages."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_ray.config import CSA_RATIO, ModelConfig


@dataclass(frozen=True)
class CacheShape:
    """Ring lengths, staging and paging, from the model and the longest verify block (docs/model.md, KV cache)."""

    window: int
    window_ring: int
    raw_rings: dict[int, int]
    """Ring length of raw compressor rows by ratio."""
    pooled_rows: dict[int, int]
    """Raw rows under one entry: 2r where windows overlap (CSA), else r."""
    page_size: int
    block_length: int
    """Tokens of the longest verify block: longer segments go through staging."""
    num_slots: int
    max_rows: int
    """Rows of the largest forward."""

    @staticmethod
    def of(config: ModelConfig, gamma: int, page_size: int, num_slots: int, max_rows: int) -> CacheShape:
        """The shortest rings in which no row of a verify block overwrites a row that is still needed.

        The last row of a block of 1+gamma is `gamma` positions ahead of the first, which looks back over a full
        window: a ring needs `gamma` rows more than the window.
        """
        ratios = sorted(set(config.compress_ratios) - {0})
        pooled = {ratio: 2 * ratio if ratio == CSA_RATIO else ratio for ratio in ratios}
        return CacheShape(
            window=config.sliding_window,
            window_ring=config.sliding_window + gamma,
            raw_rings={ratio: pooled[ratio] + gamma for ratio in ratios},
            pooled_rows=pooled,
            page_size=page_size,
            block_length=1 + gamma,
            num_slots=num_slots,
            max_rows=max_rows,
        )

    def pool_rows(self, ring: int) -> int:
        """Rows of a pool with rings of this length."""
        return self.num_slots * ring + self.max_rows
