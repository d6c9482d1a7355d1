"""The seed of a run, and seeds derived from it."""

from __future__ import annotations

import os
import random


def global_seed() -> int | None:
    """Return the seed of ``seed_everything``, which Lightning stores in the environment; None if it is not set."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    return None if seed is None else int(seed)


def hashed_seed(key: str) -> int:
    """Return a seed derived from a key, such as ``"<seed> <epoch>"``, by hashing.

    With the sum of seed and epoch instead, epoch 1 of seed 0 would equal epoch 0 of seed 1.
    """
    return random.Random(key).getrandbits(32)
