"""How long is too long? What a rank's own waits of the same kind were like.

    limit = least + median + K * MAD

of the last waits, where MAD is the median of |wait - median|: a rank that always waits
90 s for a slow one is used to it, and one that waits 10 ms is not, soon after. The
stall inspector of the MPI world goes by it, and `mpilm status` with the steps of a log.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from statistics import median

K = 10.0  # an outlier by any rule; of a normal distribution 6.7 standard deviations
KNOWN = 8  # waits of a kind before it counts as known; chosen, not tuned
KEPT = 64  # the last ones; chosen, not tuned
MOST_KINDS = 256  # remembered; the one that began first is forgotten
LEAST = 1 / 3  # of the limit before anything is known, whatever the waits were like


def typical_limit(waits_s: Sequence[float], least_s: float = 0.0) -> float:
    """Return the wait from which on one is out of line with these, seconds.

    >>> typical_limit([1.0, 2.0, 3.0]), typical_limit([0.0, 0.0, 60.0], least_s=20.0)
    (12.0, 20.0)
    """
    middle = median(waits_s)
    spread = median(abs(wait_s - middle) for wait_s in waits_s)
    return least_s + middle + K * spread


class WaitLimits:
    """What the waits of one rank were like, by kind.

    Args:
        first_s: the limit of a kind that is not known yet.
    """

    def __init__(self, first_s: float) -> None:
        self.first_s = first_s
        self._kinds: dict[Hashable, deque[float]] = {}

    def note(self, kind: Hashable, waited_s: float) -> None:
        """Remember a wait that is over."""
        waits = self._kinds.get(kind)
        if waits is None:
            if len(self._kinds) >= MOST_KINDS:
                del self._kinds[next(iter(self._kinds))]
            waits = self._kinds[kind] = deque(maxlen=KEPT)
        waits.append(waited_s)

    def limit_s(self, kind: Hashable) -> float:
        """Return the seconds from which on a wait of this kind is too long."""
        waits = self._kinds.get(kind)
        if waits is None or len(waits) < KNOWN:
            return self.first_s
        return typical_limit(list(waits), LEAST * self.first_s)
