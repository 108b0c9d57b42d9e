"""Where the time of a learner's steps goes: for the score of a slow rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Spent:
    """Seconds so far, by the learner's clock.

    data      waiting for the next minibatch: reading, a lease of the pool
    forward   from the minibatch to its loss
    backward  the rest of the gradient, and what slows a rank down artificially

    On a GPU these are the times in which the host issued the work; the device's own
    show `mpilm train --profile`. What is in none of them is the update and the mixing.
    """

    data: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
