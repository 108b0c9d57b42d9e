"""Training goes on after ranks have died: what the others have becomes one model again.

    rank 1 (dead)
    rank 0  step | RanksDiedError, own state | shrink | merge, start anew | agree | step
    rank 2  step ... | RanksDiedError, own state | shrink | merge, start anew | agree |

It is a resume at another number of ranks (merged.py) without a file: the states are
those that the ranks hold. A step that was cut off counts where the model was updated,
and nowhere else. If another rank dies meanwhile, the ranks do not agree, and all begin
again with what they had. Leases of the pool that no rank is known to have had are given
again. Where ranks have copies of each other (peer_copies.py), what one holds of a dead
rank is merged as that rank's state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from mpilm.errors import RanksDiedError
from mpilm.storage.merged import Gathered, Merged
from mpilm.storage.saved import State, nested, saved_state
from mpilm.train.peer_copies import PeerCopies, copies_of_dead
from mpilm.train.resume_point import ResumePoint
from mpilm.world.base import Comm

# As the first rank left has it: what decides when the ranks communicate.
ALIKE = ("schedule/", "validations/", "totals/step")
IN_LOCKSTEP = (*ALIKE, "strategy/")  # at a death some ranks are a step ahead


@dataclass
class Left:
    """What a rank has when others have died; nothing else is looked at afterwards.

    It stays as it is, however often the others die while all go on.

    state      what is merged of it
    samples    in its model; known: of all ranks, as far as it knows
    rest       samples beside those of the ranks
    step       minibatches
    exchanged  `Strategy.exchanged`
    lockstep   of the strategy
    size       number of ranks before
    ranks      those that are left, by their numbers then
    moments    of ranks that died before
    """

    state: State
    samples: int
    known: int
    rest: int
    step: int
    exchanged: Any
    lockstep: bool
    copies: PeerCopies | None
    size: int
    ranks: list[int]
    moments: list[State]
    began_s: float


def left_here(trainer: Any) -> Left:
    """Return what this rank has. No communication."""
    learner, strategy, batches = trainer.learner, trainer.strategy, trainer.batches
    exchanged = strategy.exchanged
    strategy.survive(learner)
    state = nested("learner", learner.state(data=False))
    state |= nested("learner/batches", batches.survive())
    state |= nested("strategy", saved_state(strategy, strategy.inherited))
    state |= nested("totals", asdict(trainer.totals))
    for name, part in trainer.parts.items():
        if name not in {"learner", "strategy"}:
            state |= nested(name, part.state())
    return Left(
        state,
        learner.samples,
        batches.counts.known(learner.samples),
        batches.counts.rest,
        trainer.totals.step,
        exchanged,
        strategy.lockstep,
        trainer.saving.copies,
        trainer.world.size,
        list(range(trainer.world.size)),
        trainer.left_moments,
        trainer.world.now_s(),
    )


def go_on(trainer: Any, left: Left) -> ResumePoint | None:
    """Return where the ranks that are left go on; None: the run is over.

    Args:
        trainer: this rank's `Trainer`; it gets the line that people are told.
        left: what this rank has; its `ranks` become those that are left.

    Raises:
        RanksDiedError: another one died: all call it again.

    Communicates: collective among the ranks that are left.
    """
    world, size = trainer.world, left.size
    here = world.shrink()
    if not here:
        return None
    ranks = left.ranks = [left.ranks[rank] for rank in here]
    comm = world.comm
    found = comm.allgather((left.samples, left.known, left.step))
    copies = copies_of_dead(left.copies, comm, ranks, left.exchanged)
    done = [samples for samples, *_ in found]
    total = sum(done) + left.rest
    if left.lockstep:
        total += (size - len(ranks)) * min(done)
        total += sum(samples - min(done) for samples in copies.samples.values())
    else:
        total = max(total, *(known for _, known, _ in found))
    alike = IN_LOCKSTEP if left.lockstep else ALIKE
    merged = merge(
        comm, ranks, size, left.state, total, alike=alike, copies=copies.here
    )
    trainer.left_moments = left.moments + copies.moments
    dead = sorted({*range(size)} - {*ranks})
    trainer.news = (
        f"{RanksDiedError(dead)}; {len(ranks)} go on from the mean of their models"
        f"{copies.news} at {total:,} samples, {world.now_s() - left.began_s:.2f} s"
        " later"
    )
    step = max(step for *_, step in found)
    return ResumePoint(merged.state, step, total, [], False, merged)


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
