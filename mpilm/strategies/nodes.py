"""Ranks cut into nodes, and what nodes count, in terms of ranks (`hierarchical`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mpilm.errors import CheckpointError, ConfigError
from mpilm.vectors import copy_of
from mpilm.world.base import Comm


class Nodes:
    """The nodes that the ranks of a communicator make.

    Args:
        comm: all ranks.
        node_size: consecutive ranks that make a node; 0: those that share a machine.

    mine     the ranks of this rank's node; rank 0 is its leader
    leaders  the leaders of all nodes; None on other ranks
    node_of  int64 (K,): number of the node of every rank

    Communicates: collective, two splits and two small allgathers, blocking.
    """

    def __init__(self, comm: Comm, node_size: int) -> None:
        self.comm, self.node_size = comm, node_size
        self.mine = ranks_of_my_node(comm, node_size)
        self.leaders = comm.Split(0 if self.mine.rank == 0 else None, comm.rank)
        leader = self.mine.allgather(comm.rank)[0]
        self.node_of = np.unique(comm.allgather(leader), return_inverse=True)[1]

    @property
    def num_nodes(self) -> int:
        """How many there are."""
        return int(self.node_of.max()) + 1

    def require_equal(self) -> None:
        """Raise unless all nodes have as many ranks.

        Raises:
            ConfigError: one line with the remedy.
        """
        size, sizes = len(self.node_of), np.bincount(self.node_of)
        wish = self.node_size
        if sizes.min() == sizes.max() and not wish > size > 1:
            return
        whole = " or ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        problem = f"{size} ranks make no whole nodes of {wish}"
        if not wish:
            found = ", ".join(map(str, sizes))
            problem = f"the machines have different numbers of ranks ({found})"
        raise ConfigError(
            f"strategy.node_size: {problem}; nodes of {whole} would do, or as many"
            " ranks on each machine"
        )

    def require_same(self, node_of: Any) -> None:
        """Raise unless the nodes were the same.

        Raises:
            CheckpointError: one line with the remedy.
        """
        if node_of.tolist() == self.node_of.tolist():
            return
        sizes = np.bincount(node_of)
        raise CheckpointError(
            f"the checkpoint was made with {len(sizes)} nodes of {sizes[0]} ranks:"
            f" set strategy.node_size = {sizes[0]}"
        )

    def counts_of_ranks(self, counts: Any) -> Any:
        """Return counts of leaders as counts of all ranks, int64 (K,)."""
        spread = np.zeros(len(self.node_of), np.int64)
        spread[np.unique(self.node_of, return_index=True)[1]] = counts
        return spread

    def weights_of_ranks(self, weights: Any, rounds: int) -> Any:
        """Return the weights that ranks had: each 1/m of its node's, float64 (K,).

        Args:
            weights: of the nodes in this one, 0 for itself.
            rounds: what they sum to, with the node's own on the diagonal.
        """
        weights = np.array(weights, np.float64)
        mine = self.node_of[self.comm.rank]
        weights[mine] = rounds - weights.sum()
        spread = weights[self.node_of] / self.mine.size
        spread[self.comm.rank] = 0.0
        return spread


class Relay:
    """Shows the observers of a node what its leader saw synchronised in a step.

    parts   where, in the order in which it happened
    values  copies of the parts
    """

    def __init__(self, node: Comm) -> None:
        self.node = node
        self.parts: list[slice] = []
        self.values: list[Any] = []

    def note(self, where: slice, model: Any) -> None:
        """Keep a part of the model that the leaders have just synchronised."""
        self.parts.append(where)
        self.values.append(copy_of(model))

    def show_(self, theta: Any, observe: Callable[[slice, Any], None]) -> None:
        """Call `observe` on every rank of the node with what the leader has noted.

        Args:
            theta: (P,), for the kind and place of the vectors.

        Communicates: collective in the node, a Bcast of 8 bytes and, if there is
            anything, of 16 bytes a part and of the parts; blocking.
        """
        number = np.array([len(self.parts)], np.int64)
        self.bcast_(number)
        ends = np.zeros((int(number[0]), 2), np.int64)
        if self.parts:
            ends[:] = [(part.start, part.stop) for part in self.parts]
        if len(ends):
            self.bcast_(ends.reshape(-1))
        for index, (start, stop) in enumerate(ends.tolist()):
            is_leader = index < len(self.values)
            model = self.values[index] if is_leader else copy_of(theta[start:stop])
            self.bcast_(model)
            observe(slice(start, stop), model)
        self.parts, self.values = [], []

    def bcast_(self, vector: Any) -> None:
        """Replace `vector` by the leader's."""
        if self.node.size > 1:
            self.node.Bcast(vector, root=0)


def ranks_of_my_node(comm: Comm, node_size: int) -> Comm:
    """Return the ranks of my node; see `Nodes`. Collective."""
    if node_size == 0:
        return comm.Split_node()
    found = comm.Split(comm.rank // node_size, comm.rank)
    assert found is not None
    return found
