"""The real world: one MPI process per rank, real time, threads."""

from mpilm.world.mpi.abort import abort_on_error
from mpilm.world.mpi.world import MpiWorld, run_mpi

__all__ = ["MpiWorld", "abort_on_error", "run_mpi"]
