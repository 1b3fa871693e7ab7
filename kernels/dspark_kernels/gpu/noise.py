"""Noise inside kernels: the bits of `philox.py`, and its Gumbel noise in float64 or approximately in float32.

A number is addressed by (seed, stream, position, token id). Four ids share one Philox call: id // 4 is a counter word,
id % 4 picks the output word.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """`philox.philox_4x32` of uint32 words. One 64-bit product is one instruction; its halves would take two."""
    for _ in tl.static_range(10):
        even = c0.to(tl.uint64) * 0xD2511F53
        odd = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (odd >> 32).to(tl.uint32) ^ c1 ^ k0, (odd & 0xFFFFFFFF).to(tl.uint32)
        c2, c3 = (even >> 32).to(tl.uint32) ^ c3 ^ k1, (even & 0xFFFFFFFF).to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def philox_bits(seed, position, stream: tl.constexpr, token_ids):
    """32 random bits (uint32) per id; seed, position int64 and token_ids integer, broadcast against each other."""
    block = (token_ids >> 2).to(tl.uint32)
    zero = block * 0
    # Seed and position are int64 scalars or tensors; their halves are two words of key and counter.
    key = seed.to(tl.uint64) + zero.to(tl.uint64)
    place = position.to(tl.uint64) + zero.to(tl.uint64)
    low, high = (place & 0xFFFFFFFF).to(tl.uint32), (place >> 32).to(tl.uint32)
    b_0, b_1, b_2, b_3 = _philox(
        block + low * 0,
        low,
        high,
        low * 0 + stream,
        (key & 0xFFFFFFFF).to(tl.uint32),
        (key >> 32).to(tl.uint32),
    )
    word = (token_ids & 3) + (zero + low * 0).to(token_ids.dtype)
    return tl.where(word < 2, tl.where(word == 0, b_0, b_1), tl.where(word == 2, b_2, b_3))


@triton.jit
def philox_tile(b_seeds, b_positions, stream: tl.constexpr, first_block, SIZE: tl.constexpr):
    """`philox_bits` [R, SIZE] of ids from 4 * first_block on, for seeds and positions [R]; one call for four ids."""
    o_blocks = (first_block + tl.arange(0, SIZE // 4)).to(tl.uint32)[None, :]
    key, place = b_seeds.to(tl.uint64)[:, None], b_positions.to(tl.uint64)[:, None]
    low, high = (place & 0xFFFFFFFF).to(tl.uint32), (place >> 32).to(tl.uint32)
    b_0, b_1, b_2, b_3 = _philox(
        o_blocks,
        low,
        high,
        low * 0 + stream,
        (key & 0xFFFFFFFF).to(tl.uint32),
        (key >> 32).to(tl.uint32),
    )
    # A join adds a last dimension, so the outer join varies fastest.
    b_words = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))
    return tl.reshape(b_words, [b_seeds.shape[0], SIZE])


@triton.jit
def uniform(bits):
    """float64 in (0, 1), as `philox.uniform_noise`."""
    return (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32


@triton.jit
def gumbel(bits):
    """float32 noise of the bits: computed in float64 and rounded once, as `philox.gumbel_noise`."""
    return (-tl.log(-tl.log(uniform(bits)))).to(tl.float32)


@triton.jit
def _below_one(bits):
    """1 - `uniform` in float32, precise where the uniform is close to 1 and the noise is large."""
    return ((bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def rough_gumbel(bits):
    """Gumbel noise in float32 arithmetic, at most 2^-18 off `gumbel`.

    Kernels use it to exclude tokens that cannot win: few tokens need float64.
    """
    below = _below_one(bits)
    near = tl.where(below < 0.5, 1.0 - below, (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10)
    # -log(u): its argument `near` is u rounded; close to 1 the logarithm changes by as much as the rounding did, which
    # is added back. An error of 2^-22 of the value remains, and as much of the second logarithm, which is at most 23.
    exponential = (below - (1.0 - near)) - tl.log(near)
    return -tl.log(exponential)


@triton.jit
def least_exponential(bits):
    """A lower bound of exp(-gumbel), up to 2^-22 of it, without a logarithm; tight where the noise is large."""
    below = _below_one(bits)
    return below + 0.5 * below * below
