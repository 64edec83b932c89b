"""Who is trained on and who is kept for the measures: a split by person, never by clip."""

from __future__ import annotations

from proteus_deploy.errors import InputError

__all__ = ["HELD_OUT_SEEDS", "is_held_out", "training_seed", "training_seeds"]

# The miniature of Proteus-Bench: thirty people that no training ever sees. Number 25 isn't among them: in
# her reference photo the tiny detector takes the skin between fringe and brows for a second, small face.
HELD_OUT_SEEDS: tuple[int, ...] = tuple(seed for seed in range(31) if seed != 25)
# The gap leaves room for people of tests and documents, who are neither trained on nor measured.
_FIRST_TRAINING_SEED = 1000


def training_seed(index: int) -> int:
    """The identity seed of training person `index`, 0 and up; no two are equal and none is held out."""
    if index < 0:
        raise InputError(f"training people are counted from 0; there is no person {index}")
    return _FIRST_TRAINING_SEED + index


def training_seeds(count: int) -> range:
    """The identity seeds of the first `count` training people."""
    if count < 1:
        raise InputError(f"{count} people can't be trained on; choose at least 1")
    return range(training_seed(0), training_seed(0) + count)


def is_held_out(identity_seed: int) -> bool:
    """Whether training must not see this person."""
    return identity_seed in HELD_OUT_SEEDS
