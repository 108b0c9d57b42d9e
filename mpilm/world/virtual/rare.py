"""Rare branches of the virtual world, taken on purpose under a seed.

What MPI allows and a quiet machine hardly ever shows:

    late_send    a send is complete long after its message has left
    not_yet      Test says no some times, though it is done
    other_order  of messages from several ranks, any rank's first one is found first
    late_start   a background activity begins late
    spread_end   a collective ends at another time on every rank
    clog         for a while nothing passes a link one way; then all of it, in order

And one of the learners' there:

    bad_gradient  the gradient of a minibatch is not finite: the step is skipped

A seed decides which of them happen in a run at all, how likely each is and how long it
lasts. None of them breaks a promise of MPI: messages from one rank keep their order, no
collective ends before all have come, and whoever asks again is told in the end. The
models are FoundationDB's "buggify" and clogged links.
"""

from __future__ import annotations

import random

POINTS = (
    "late_send",
    "not_yet",
    "other_order",
    "late_start",
    "spread_end",
    "clog",
)
LIKELY = (0.05, 0.25, 0.75)  # chosen, not tuned, as is all of this page
PAUSES_S = (1e-4, 0.01, 1.0)
CLOGGED = 10.0  # times as long as the other delays
BAD = (0.0, 0.0, 0.05, 0.25)  # how likely a gradient is not finite, in a run


class Rare:
    """Which rare branches one simulation takes, and for how long.

    likely    of each point that happens at all, its probability at each occasion
    are_bad   probability that a gradient is not finite; drawn apart, as are they: what
              else a seed does stays as it is

    >>> sorted(Rare(7).likely.items())
    [('late_start', 0.05), ('other_order', 0.75), ('spread_end', 0.75)]
    """

    def __init__(self, seed: int) -> None:
        draw = random.Random(f"mpilm rare {seed}")
        self.likely = {p: draw.choice(LIKELY) for p in POINTS if draw.random() < 0.5}
        self.pause_s = draw.choice(PAUSES_S)
        self.draw = draw
        self.seed = seed
        self.are_bad = random.Random(f"mpilm bad gradients {seed}").choice(BAD)
        self._clogged_until_s: dict[tuple[int, int], float] = {}

    def happens(self, point: str) -> bool:
        """Return whether a branch is taken now."""
        likely = self.likely.get(point)
        return likely is not None and self.draw.random() < likely

    def delay_s(self, point: str) -> float:
        """Return for how long something is late, seconds; mostly 0."""
        return self.pause_s * self.draw.random() if self.happens(point) else 0.0

    def spoils(self, rank: int, step: int) -> bool:
        """Return whether the gradient of a rank's step is not finite."""
        if not self.are_bad:
            return False
        draw = random.Random(f"mpilm bad gradient {self.seed} {rank} {step}")
        return draw.random() < self.are_bad

    def free_s(self, source: int, dest: int, now_s: float) -> float:
        """Return when a message that leaves now can arrive at the earliest."""
        link = (source, dest)
        until_s = max(now_s, self._clogged_until_s.get(link, 0.0))
        if until_s == now_s:
            until_s += CLOGGED * self.delay_s("clog")
            self._clogged_until_s[link] = until_s
        return until_s


def drawn_rare(seed: int) -> Rare | None:
    """Return the rare branches of a random schedule; every other one has none."""
    return Rare(seed) if random.Random(f"is rare {seed}").random() < 0.5 else None
