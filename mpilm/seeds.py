"""Streams of random numbers: another one for every use, seed and rank.

Seed + rank would not do: rank 1 of a run with seed 1 would draw what rank 0 of one with
seed 2 draws, and the two runs of a comparison would not be independent.
"""

from __future__ import annotations

import numpy as np

# What is drawn. Another number makes other streams: never give one away again.
DROPOUT, FRAME_ORDER, RBM_WEIGHTS, RBM_ORDER, RBM_SAMPLES = range(1, 6)


def derive(use: int, seed: int, *place: int) -> int:
    """Return the seed of a stream, below 2^63, from numpy's SeedSequence.

    Args:
        use: one of the numbers above.
        seed: of the run.
        place: what else tells it from others, such as the rank; each below 2^32.

    >>> len({derive(DROPOUT, seed, rank) for seed in (1, 2, 3) for rank in (0, 1, 2)})
    9
    >>> derive(DROPOUT, 1, 2) == derive(FRAME_ORDER, 1, 2)
    False
    """
    # words of 32 bits that say unambiguously whose they are: the seed may have several
    # and stands last; numpy takes a 0 at the end for nothing, hence the length
    words = np.random.SeedSequence([use, len(place), *place, seed])
    return int(words.generate_state(1, np.uint64)[0] >> np.uint64(1))
