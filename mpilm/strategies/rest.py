"""State outside theta (buffers, frozen parameters): one for all ranks, as theta is.

At the start every rank gets rank 0's. While training each rank has its own, as its
minibatches make it. In the final model float buffers (running means) are the mean over
ranks, all else (counters, flags, frozen parameters) rank 0's. The final model is made
in float32, whatever the wire format.

Nothing of this is left to a strategy: `Strategy.start` and every `final_model_` do it.
Learners without such state (no attribute `rest`, or None) communicate nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from typing import Any
from zlib import crc32

from mpilm.errors import ModelError
from mpilm.world.base import IN_PLACE, Comm

Write = Callable[[Any, Any, Any], None]


def bcast_rest(comm: Comm, learner: Any) -> None:
    """Give every rank the state outside theta of rank 0.

    Raises:
        ModelError: on all ranks, if their models differ in names, types or shapes.

    Communicates: collective, a small allgather and up to two Bcasts, blocking.
    """
    rest = rest_of(learner)
    if rest is None or comm.size == 1:
        return
    entries = rest.entries()
    own = {s.name: f"parameter {tuple(s.shape)}" for s in learner.layout} | entries
    found = if_they_differ(comm, own)
    for rank, other in enumerate(found):
        names = [n for n in [*found[0], *other] if found[0].get(n) != other.get(n)]
        for name in names[:1]:
            here, there = (e.get(name, "missing") for e in (found[0], other))
            raise ModelError(
                f"the ranks' models differ: {name} is {here} on rank 0, {there} on rank"
                f" {rank}",
                everywhere=True,
            )
    vectors = rest.pack(entries)
    for vector in vectors:
        if len(vector):
            comm.Bcast(vector, root=0)
    rest.unpack_(entries, *vectors)


def merge_rest(comm: Comm, learner: Any, out: Any) -> None:
    """Make one of the ranks' states outside theta; the module's if `out` is its theta.

    What has another shape on another rank by now stays as it is on each.

    Communicates: collective, a small allgather, an Allreduce and a Bcast, blocking.
    """
    rest = rest_of(learner)
    if rest is None or comm.size == 1 or not len(rest):
        return
    names = rest.entries()
    for other in if_they_differ(comm, names):
        names = {n: what for n, what in names.items() if other.get(n) == what}
    averaged, copied = rest.pack(names)
    if len(averaged):
        comm.Allreduce(IN_PLACE, averaged)
        averaged /= comm.size
    if len(copied):
        comm.Bcast(copied, root=0)
    if is_same(out, learner.theta):
        rest.unpack_(names, averaged, copied)


def with_rest(write: Write) -> Write:
    """Return a `final_model_` that sees to the state outside theta as well."""

    @wraps(write)
    def final_model_(self: Any, learner: Any, out: Any) -> None:
        comm, self.comm = self.comm, self.comm.exact
        try:
            write(self, learner, out)
            merge_rest(self.comm, learner, out)
        finally:
            self.comm = comm

    return final_model_


def is_same(one: Any, other: Any) -> bool:
    """Return whether two vectors are the same memory."""
    if hasattr(one, "data_ptr") and hasattr(other, "data_ptr"):
        return bool(one.data_ptr() == other.data_ptr())
    return one is other


def rest_of(learner: Any) -> Any:
    """Return what holds the learner's state outside theta; None: it has none."""
    return getattr(learner, "rest", None)


def if_they_differ(comm: Comm, entries: dict[str, str]) -> list[dict[str, str]]:
    """Return the entries of all ranks if any differ, else nothing.

    Communicates: collective, an allgather of 8 bytes, and of the entries if any
        differ; blocking.
    """
    text = json.dumps(list(entries.items()))
    if len(set(comm.allgather(crc32(text.encode())))) == 1:
        return []
    return comm.allgather(entries)
