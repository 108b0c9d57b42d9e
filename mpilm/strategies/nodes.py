"""Ranks cut into nodes, and counts of nodes as counts of ranks (`hierarchical`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpilm.errors import CheckpointError, ConfigError
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


def ranks_of_my_node(comm: Comm, node_size: int) -> Comm:
    """Return the ranks of my node; see `Nodes`. Collective."""
    if node_size == 0:
        return comm.Split_node()
    found = comm.Split(comm.rank // node_size, comm.rank)
    assert found is not None
    return found
