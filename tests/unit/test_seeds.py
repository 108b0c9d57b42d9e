"""Streams of random numbers do not collide, as seed + rank did."""

from __future__ import annotations

import itertools

from mpilm import seeds
from mpilm.seeds import DROPOUT, derive


def test_every_use_seed_and_place_has_a_stream_of_its_own():
    uses = [value for name, value in vars(seeds).items() if name.isupper()]
    assert len(uses) == len({*uses}) == 5
    found = [
        derive(use, seed, *place)
        for use in uses
        for seed in (*range(40), 2**32, 2**32 + 7, 2**64 + 1)
        for length in range(3)
        for place in itertools.product(range(8), repeat=length)
    ]
    assert len({*found}) == len(found)
    assert all(0 <= seed < 2**63 for seed in found)


def test_a_seed_of_two_words_is_not_a_seed_and_a_rank():
    assert derive(DROPOUT, 5 + (7 << 32)) != derive(DROPOUT, 5, 7)
    assert derive(DROPOUT, 5 + (7 << 32), 0) != derive(DROPOUT, 5, 7)
    assert derive(DROPOUT, 7 + (5 << 32)) != derive(DROPOUT, 7, 5)


def test_the_streams_stay_what_they_are():
    """A run that is resumed by a later version draws what it would have drawn."""
    assert derive(DROPOUT, 1, 2) == 1_551_098_123_496_783_248
