"""The virtual world: many ranks in one process, in virtual time."""

from mpilm.world.virtual.world import Simulation, VirtualWorld, run_virtual

__all__ = ["Simulation", "VirtualWorld", "run_virtual"]
