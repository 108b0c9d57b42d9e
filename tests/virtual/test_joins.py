"""A rank joins in the virtual world: what was begun before is over."""

from __future__ import annotations

import numpy as np
import pytest

from mpilm.errors import LeftBehindError
from mpilm.world.virtual import run_virtual


def test_what_was_made_before_a_rank_joined_is_refused():
    def main(world):
        if world.joins:
            return world.comm.allgather(world.rank)
        before = world.comm.Dup()
        if world.rank == 0:
            world.recruit(("another",))
        world.sleep(60.0)  # it is ready by then
        assert world.grow() == 2
        for use in (
            before.Improbe,
            before.Ibarrier,
            lambda: before.Isend(np.ones(1), 0),
        ):
            with pytest.raises(LeftBehindError, match="before others died or joined"):
                use()
        return world.comm.allgather(world.rank)

    assert run_virtual(main, 2, can_shrink=True) == [[0, 1, 2]] * 3
