"""The clock of the real world, and the pauses between two looks at something.

Pauses grow with the time waited. Each look costs some 45 us beside computing
(measured, docs/mpi-world.md).
"""

from __future__ import annotations

import time

SPIN_S = 2e-4  # look without pausing for so long, if the learner has nothing to do
FIRST_PAUSE_S = 20e-6
LAST_PAUSE_S = 1e-3
BESIDE_PAUSE_S = 3e-3  # while the learner computes
WAIT_SHARE, BESIDE_SHARE = 1 / 8, 1 / 2  # of the time waited; overshoots by as much
TICK_S = 0.05  # between two looks at control messages

clock = time.perf_counter


def pause_s(
    waited_s: float, share: float = WAIT_SHARE, longest_s: float = LAST_PAUSE_S
) -> float:
    """Return how long to sleep before the next look, in seconds.

    >>> pause_s(0.0), pause_s(0.004), pause_s(60.0)
    (2e-05, 0.0005, 0.001)
    """
    return min(longest_s, max(FIRST_PAUSE_S, waited_s * share))
