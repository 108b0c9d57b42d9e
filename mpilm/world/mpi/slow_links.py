"""Declared slow links in the real world: messages that start late.

    sender     Isend ....... | due: MPI's Isend
    link             |--n/B--|----L----|

A message goes to MPI when a link of such latency L and bandwidth B would have brought
it; whoever polls starts it, so it may be some milliseconds later still. Messages of one
communicator to one rank start in the order of their calls, as MPI promises.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from mpilm.world import machine
from mpilm.world.faults import Faults
from mpilm.world.machine import Link
from mpilm.world.mpi.clock import clock
from mpilm.world.mpi.progress import Progress
from mpilm.world.mpi.requests import Transfer
from mpilm.world.mpi.staging import Stage


class SlowSend(Transfer):
    """A send over a slow link.

    Args:
        progress: the rank's.
        start: begins the send; returns mpi4py's request.
        due_s: when to call it.
        before: the send that must have begun before.
        what: for reports of stalls.
        stage: the buffer.
        waited_for: the caller waits for it at once.
    """

    def __init__(
        self,
        progress: Progress,
        start: Callable[[], Any],
        due_s: float,
        before: SlowSend | None,
        what: str,
        *,
        stage: Stage,
        waited_for: bool,
    ) -> None:
        self.start, self.due_s, self.before = start, due_s, before
        nbytes = stage.host.nbytes
        super().__init__(
            progress, None, what, nbytes=nbytes, stages=(stage,), waited_for=waited_for
        )

    def look(self) -> bool:
        if self.request is None:
            if self.before is not None and self.before.request is None:
                return False
            if clock() < self.due_s:
                return False
            self.before = None
            self.request = self.start()
        return super().look()


class SlowLinks:
    """The slow links that end at one rank."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._lock = threading.Lock()
        self._free_s: dict[int, float] = {}  # by world rank: its link is free again
        self._last: dict[tuple[int, int], SlowSend] = {}  # by communicator and peer

    def send(
        self,
        start: Callable[[], Any],
        key: int,
        peer: int,
        link: Link,
        what: str,
        *,
        stage: Stage,
        waited_for: bool,
    ) -> SlowSend:
        """Return a send that is under way, slowly.

        Args:
            start: begins it; returns mpi4py's request.
            key: of the communicator.
            peer: the receiver's rank in the world.
            link: to it.
            what: for reports of stalls.
            stage: the buffer.
            waited_for: the caller waits for it at once.
        """
        with self._lock:
            begins_s = max(clock(), self._free_s.get(peer, 0.0))
            free_s = begins_s + stage.host.nbytes / link.bandwidth_Bps
            self._free_s[peer] = free_s
            sent = SlowSend(
                self.progress,
                start,
                free_s + link.latency_s,
                self._last.get((key, peer)),
                what,
                stage=stage,
                waited_for=waited_for,
            )
            self._last[key, peer] = sent
        return sent


def collective_delay_s(
    faults: Faults | None, members: list[int], rank: int, name: str, msg_bytes: int
) -> float:
    """Return how much longer a collective takes by the slow links of a rank, seconds.

    The costs are those of machine.py on a link with the declared figures alone.

    Args:
        faults: what is declared.
        members: the world ranks of the group.
        rank: in the group.
        name: the MPI name of the collective.
        msg_bytes: length of its buffer.
    """
    if faults is None or not faults.profile:
        return 0.0
    if not faults.ends_link(members[rank], members):
        return 0.0
    link, size = faults.link_within(members), len(members)
    if name.endswith("llreduce"):
        cost = machine.allreduce(machine.as_messages(link), size, msg_bytes)
    elif name == "Bcast":
        cost = machine.broadcast(machine.as_messages(link), size, msg_bytes)
    else:
        cost = machine.barrier(machine.as_messages(link), size)
    return cost.total_s
