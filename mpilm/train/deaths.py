"""Training goes on after ranks have died: what the others have becomes one model again.

    rank 1 (dead)
    rank 0  step | RanksDiedError, own state | shrink | merge, start anew | step
    rank 2  step ... | RanksDiedError, own state | shrink | merge, start anew | step

It is a resume at another number of ranks (merged.py) without a file: the states are
those that the ranks hold. A step that was cut off counts where the model was updated,
and nowhere else. Leases of the pool that no rank is known to have had are given again.
Where ranks have copies of each other (peer_copies.py), what one holds of a dead rank is
merged as that rank's state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from mpilm.errors import RanksDiedError, WorldError
from mpilm.storage.merged import Gathered, Merged
from mpilm.storage.saved import State, nested, saved_state
from mpilm.train.peer_copies import copies_of_dead
from mpilm.train.resume_point import ResumePoint
from mpilm.world.base import Comm

# As the first rank left has it: what decides when the ranks communicate.
ALIKE = ("schedule/", "validations/", "totals/step")
IN_LOCKSTEP = (*ALIKE, "strategy/")  # at a death some ranks are a step ahead


def go_on(trainer: Any) -> ResumePoint | None:
    """Return where the ranks that are left go on; None: the run is over.

    Args:
        trainer: this rank's `Trainer`; it gets the line that people are told.

    Raises:
        WorldError: another rank died at a moment in which nobody knows who was how far.

    Communicates: collective among the ranks that are left.
    """
    world = trainer.world
    exchanged = trainer.strategy.exchanged
    state, samples = left_here(trainer)
    size, known = world.size, trainer.batches.counts.known(samples)
    ranks = list(range(size))
    began_s = world.now_s()
    while True:
        try:
            left = world.shrink()
            if not left:
                return None
            ranks = [ranks[rank] for rank in left]
            comm = world.comm
            found = comm.allgather((size, samples, known))
            if len({size for size, *_ in found}) > 1:
                raise WorldError("a rank died while the others went on after a death")
            copies = copies_of_dead(trainer.saving.copies, comm, ranks, exchanged)
            done = [samples for _, samples, _ in found]
            total = sum(done) + trainer.batches.counts.rest
            if trainer.strategy.lockstep:
                total += (size - len(ranks)) * min(done)
                total += sum(samples - min(done) for samples in copies.samples.values())
            else:
                total = max(total, *(known for *_, known in found))
            alike = IN_LOCKSTEP if trainer.strategy.lockstep else ALIKE
            merged = merge(
                comm, ranks, size, state, total, alike=alike, copies=copies.here
            )
            break
        except RanksDiedError:
            continue
    trainer.left_moments += copies.moments
    dead = sorted({*range(size)} - {*ranks})
    trainer.news = (
        f"{RanksDiedError(dead)}; {len(ranks)} go on from the mean of their models"
        f"{copies.news} at {total:,} samples, {world.now_s() - began_s:.2f} s later"
    )
    step = max(comm.allgather(trainer.totals.step))
    return ResumePoint(merged.state, step, total, [], False, merged)


def left_here(trainer: Any) -> tuple[State, int]:
    """Return what this rank has, and the samples in its model. No communication."""
    learner, strategy = trainer.learner, trainer.strategy
    strategy.survive(learner)
    state = nested("learner", learner.state(data=False))
    state |= nested("learner/batches", trainer.batches.survive())
    state |= nested("strategy", saved_state(strategy, strategy.inherited))
    state |= nested("totals", asdict(trainer.totals))
    for name, part in trainer.parts.items():
        if name not in {"learner", "strategy"}:
            state |= nested(name, part.state())
    return state, learner.samples


def merge(
    comm: Comm,
    ranks: list[int],
    size: int,
    state: State,
    samples: int,
    *,
    alike: tuple[str, ...],
    copies: Mapping[int, State],
) -> Merged:
    """Return the states of the ranks that are left, merged. Collective.

    Args:
        alike: prefixes of the entries that all take from the first rank left.
        copies: of dead ranks, that this one holds.
    """
    gathered = Gathered()
    gathered.add(ranks[comm.rank], dict(state))
    for rank, copy in copies.items():
        gathered.add(rank, copy)
    shared = {"theta": state["learner/theta"], "samples": samples}
    merged = gathered.merged(comm, size, state, shared)
    first = {n: v for n, v in merged.nearest.items() if n.startswith(alike)}
    first = comm.allgather(first if comm.rank == 0 else None)[0] or {}
    return replace(merged, nearest={**merged.nearest, **first})


def same_optimizer(comm: Comm, merged: Merged) -> Merged:
    """Return it with the optimiser's state of the first rank left. Collective."""
    prefix = "learner/optimizer/"
    own: Any = {n: v for n, v in merged.nearest.items() if n.startswith(prefix)}
    first: Any = comm.allgather(own if comm.rank == 0 else None)[0]
    return replace(merged, nearest={**merged.nearest, **first})
