"""Random numbers that depend on where they are used, not on what was drawn before.

A generator for each step, or for each clip of a step, needs no saved state, and many processes draw what one
process would have drawn.
"""

from __future__ import annotations

from torch import Generator

__all__ = ["step_generator"]

_MASK = 0xFFFFFFFFFFFFFFFF


def step_generator(seed: int, step: int, *more: int) -> Generator:
    """A generator on the CPU that depends on these numbers only, however many steps ran before."""
    mixed = 0x9E3779B97F4A7C15
    for number in (seed, step, *more):
        # splitmix64: neighbouring seeds and steps get unrelated streams.
        mixed = (mixed + number + 0x9E3779B97F4A7C15) & _MASK
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        mixed ^= mixed >> 31
    return Generator().manual_seed(mixed & 0x7FFFFFFFFFFFFFFF)
