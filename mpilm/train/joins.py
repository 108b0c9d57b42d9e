"""Ranks are taken in while the others train: they get a model, and a share of the data.

    rank 0  step step | SYNC | state | grow | merge, start anew | step
    rank 1  step step | SYNC | state | grow | merge, start anew | step
    rank 2                   (new)   | grow | merge, start anew | step

It is a resume at another number of ranks (merged.py) without a file, as after a death
(deaths.py), but nothing is lost: all come to a sync point first. If a rank dies
meanwhile, the others, with the new one or without, begin again with what they had. What
a new rank would have read of a checkpoint, the optimiser's state for one, a peer sends
it: rank r that of rank r mod K, or of a rank that has died, where one has a copy
(peer_copies.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpilm.errors import CheckpointError, ConfigError, WorldError
from mpilm.storage.files import reason, replace_file, text_of
from mpilm.storage.merged import MEAN_OF, Gathered, is_model
from mpilm.storage.owner import Record
from mpilm.storage.packed import length_of, packed, unpacked
from mpilm.storage.saved import State, nested
from mpilm.train.resume_point import ResumePoint
from mpilm.vectors import copy_of, to_array
from mpilm.world.base import Comm, World

LOOK_S = 1.0  # between two looks for a request in the folder; chosen, not tuned
STATE_TAG = 11
# A signal to all ranks comes to a process as it starts, too: it has no handlers yet.
DEAF = ("sh", "-c", 'trap "" INT TERM USR1; exec "$@"', "sh")


class Recruiting:
    """Rank 0 has ranks started: for those that died, that are declared, or asked for.

    wanted   ranks that there should be, but for declared ones
    failure  why none is added any more; "": nothing speaks against it

    Args:
        folder: of the run; `request_ranks` leaves a request there.
        replaces: whether ranks that died are replaced.
        can_start: whether a new process knows the model and the data.

    Raises:
        ConfigError: ranks are to be replaced, and it does not know them.
    """

    def __init__(
        self, world: World, folder: Path, *, replaces: bool, can_start: bool
    ) -> None:
        if replaces and not can_start:
            raise ConfigError(
                'world.on_death = "replace": a new process does not know this model of'
                ' your own; "go_on" trains on with the ranks that are left'
            )
        self.world, self.folder, self.replaces = world, folder, replaces
        self.wanted, self.can_start = world.size, can_start
        self.failure = ""
        self._next_look_s = 0.0

    def look(self, step: int, joins: int) -> bool:
        """Ask for the ranks that are missing; return whether one is ready. On rank 0.

        Args:
            step: how far this rank is.
            joins: how many are declared until there.
        """
        world = self.world
        if world.rank or self.failure:
            return False
        if world.now_s() >= self._next_look_s:
            self._next_look_s = world.now_s() + LOOK_S
            self.wanted += take_request(self.folder)
        asked, ready = world.recruits
        missing = self.wanted + joins - world.size - asked
        if missing > 0 and not self.can_start:
            own = "a new process does not know this model of your own"
            self.failure = f"no rank is added: {own}"
            return False
        command = (*DEAF, sys.executable, "-m", "mpilm", "join", str(self.folder))
        try:
            for _ in range(missing):
                world.recruit((*command, "--spawned", Record.here().process))
        except WorldError as error:
            self.failure = str(error)
        return ready > 0

    def after_death(self, size: int) -> None:
        """Note that ranks have died, and so many are left."""
        if not self.replaces:
            self.wanted -= size - self.world.size


def request_ranks(folder: Path, count: int) -> None:
    """Ask the run in a folder for so many ranks more.

    Raises:
        CheckpointError: it cannot be written.
    """
    path = request_path(folder)
    try:
        replace_file(path, json.dumps({"ranks": count}).encode())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write: {reason(error)}") from error


def request_path(folder: Path) -> Path:
    """Return where a request stands."""
    return folder / "join.json"


def take_request(folder: Path) -> int:
    """Return how many ranks are asked for in a folder, once."""
    path = request_path(folder)
    try:
        found = json.loads(text_of(path))
        path.unlink()
        return max(0, int(found["ranks"]))
    except (OSError, ValueError, TypeError, KeyError):
        return 0


@dataclass(frozen=True)
class Held:
    """What a rank has at a sync point, before others join.

    state  what a checkpoint would hold of it
    final  the final model, (P,)
    about  samples of all ranks, step of this one, ranks that there should be
    """

    state: State
    final: Any
    about: dict[str, int]


def held_here(trainer: Any) -> Held:
    """Return what this rank has at a sync point. Collective, as a checkpoint.

    All of it: once others have joined, nothing of before can be asked.
    """
    learner = trainer.learner
    final = copy_of(learner.theta)
    trainer.strategy.final_model_(learner, final)
    state = nested("totals", asdict(trainer.totals))
    for name, part in trainer.parts.items():
        state |= nested(name, part.state())
    state |= nested("learner/batches", trainer.batches.survive())  # if one dies now
    about = {
        "samples": trainer.samples,
        "step": trainer.totals.step,
        "wanted": trainer.recruiting.wanted,
    }
    return Held(state, to_array(final), about)


def gather(
    comm: Comm, ranks: list[int], size: int, held: Held | None, moments: list[State]
) -> tuple[ResumePoint, dict[str, int]]:
    """Return where old and new ranks go on; and what rank 0 tells of the run.

    Args:
        ranks: numbers of those that are here: below `size` those from before.
        size: ranks before.
        held: what `held_here` returned; None on a new rank.
        moments: of ranks that died, that this one holds; those that are given are taken
            out.

    Communicates: collective; a peer sends a new rank its state but for vectors of the
        model's length that are averaged, an Allreduce of each of these, a Bcast of the
        final model.
    """
    mine = held or Held(State(), np.zeros(0, np.float32), {})
    found = comm.allgather((mine.about, len(moments)))
    told = found[0][0]
    if not told:
        raise WorldError("all ranks died that had a model, as another joined")
    heirs = [rank for rank, (_, num) in enumerate(found) for _ in range(num)]
    nearest, final = mine.state, mine.final
    num_before = sum(number < size for number in ranks)
    for new in range(num_before, comm.size):
        is_heir = bool(heirs)
        peer = heirs.pop(0) if is_heir else new % num_before
        if comm.rank == peer:
            sent = not_averaged(mine.state) | (moments.pop(0) if is_heir else {})
            send_state(comm, sent | {"length": len(final)}, new)
        elif comm.rank == new:
            nearest = receive_state(comm, peer)
            final = np.zeros(int(nearest.pop("length")), np.float32)
    comm.Bcast(final, root=0)
    states = Gathered()
    if held:
        states.add(ranks[comm.rank], mine.state)
    shared = {"theta": final, "samples": told["samples"]}
    merged = states.merged(comm, size, nearest, shared)
    place = ResumePoint(merged.state, told["step"], told["samples"], [], False, merged)
    return place, told


def not_averaged(state: Mapping[str, Any]) -> State:
    """Return the entries that one rank has of another, see merged.py."""
    shape = np.shape(state["learner/theta"])
    return {
        name: value
        for name, value in state.items()
        if not (name.startswith(MEAN_OF) and is_model(value, shape))
    }


def send_state(comm: Comm, state: Mapping[str, Any], dest: int) -> None:
    """Send a state to a rank. Blocking."""
    message = packed(state)
    message = message[: length_of(message)]
    comm.Send(np.array([len(message)], np.int64), dest, STATE_TAG)
    comm.Send(message, dest, STATE_TAG)


def receive_state(comm: Comm, source: int) -> State:
    """Return what `send_state` sent. Blocking."""
    length = np.zeros(1, np.int64)
    comm.Recv(length, source, STATE_TAG)
    message = np.zeros(int(length[0]), np.uint8)
    comm.Recv(message, source, STATE_TAG)
    return unpacked(message)
