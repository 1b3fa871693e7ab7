"""Counter-based noise: Philox-4x32-10 (Salmon et al., SC 2011), the same bits on every device and rank.

A number is addressed by (seed, stream, position, token id) instead of drawn from a state, so the drafter, every
tensor-parallel rank and a replay of the request compute the same number without communication (docs/dspark.md, Noise
by address).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

STREAM_SAMPLE = 0
"""Noise of the target's tokens, shared with the drafter in coupled verification."""
STREAM_DRAFT = 1
"""Noise of drafts in rejection verification, which must be independent of all other noise."""
STREAM_ACCEPT = 2
"""Uniforms of the acceptance test."""
STREAM_RECOVER = 3
"""Noise of the draw from the residual after a rejection."""

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Multipliers [2] and the ten rounds' key increments [10, 2]."""
    rounds = torch.arange(_ROUNDS, device=device).unsqueeze(1)
    return torch.tensor(_MULTIPLIERS, device=device), rounds * torch.tensor(_WEYL, device=device)


def _schedule(key: tuple[Tensor, Tensor], num_dims: int) -> tuple[Tensor, Tensor]:
    """Multipliers [2, 1, ...] and keys [10, 2, ...] that broadcast against words of `num_dims` dimensions."""
    k0, k1 = torch.broadcast_tensors(*key)
    trailing = (1,) * (num_dims - k0.dim()) + k0.shape
    multipliers, increments = _constants(k0.device)
    keys = torch.stack((k0, k1)).view(2, *trailing) + increments.view(_ROUNDS, 2, *(1,) * num_dims)
    return multipliers.view(2, *(1,) * num_dims), keys & _MASK


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds over four counter words and two key words, all int64 tensors holding uint32 values.

    The words of each broadcast against each other, and the key's against the counter's.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    # Words 0 and 2 are multiplied, words 1 and 3 are not; each pair is one tensor: seven calls per round.
    even, odd = torch.stack((c0, c2)), torch.stack((c1, c3))
    multipliers, keys = _schedule(key, c0.dim())
    for round_key in keys:
        # A 32x32-bit product in int64 may wrap around, which leaves its 64 bits right.
        product = (even * multipliers).flip(0)
        even = ((product >> 32) ^ odd ^ round_key) & _MASK
        odd = product & _MASK
    return even[0], odd[0], even[1], odd[1]


def _uniform(seeds: Tensor, positions: Tensor, stream: int, first_id: int, num_ids: int) -> Tensor:
    """[N, num_ids] float64 in (0, 1), exact in 32 random bits each, for seeds, positions [N]."""
    # Four ids share one call: id // 4 is a counter word, id % 4 picks the output word.
    first_call, last_call = first_id // 4, (first_id + num_ids + 3) // 4
    calls = torch.arange(first_call, last_call, device=seeds.device)
    position, seed = positions.long().unsqueeze(1), seeds.long().unsqueeze(1)
    words = philox_4x32(
        (calls, position & _MASK, (position >> 32) & _MASK, torch.full_like(calls, stream)),
        (seed & _MASK, (seed >> 32) & _MASK),
    )
    offset = first_id - 4 * first_call
    bits = torch.stack(words, dim=-1).flatten(1)[:, offset : offset + num_ids]
    return (bits.double() + 0.5) * 2.0**-32


def uniform_noise(seeds: Tensor, positions: Tensor, stream: int) -> Tensor:
    """One uniform in (0, 1) per row [N], float64."""
    return _uniform(seeds, positions, stream, 0, 1).squeeze(1)


def gumbel_noise(seeds: Tensor, positions: Tensor, stream: int, first_id: int, num_ids: int) -> Tensor:
    """Standard Gumbel noise [N, num_ids] in float32 for token ids first_id .. first_id + num_ids - 1.

    seeds, positions [N] int64. argmax(logits + noise) is a draw from softmax(logits).
    """
    # Logarithms in float64, because libraries differ in the last bit; rounding to float32 hides that.
    return -(-_uniform(seeds, positions, stream, first_id, num_ids).log()).log().float()
