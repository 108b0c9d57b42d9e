"""The examples in the docstrings of both worlds hold.

`pytest --doctest-modules` leaves out world/mpi: pytest-mpi takes the folder's name for
its mark.
"""

import doctest
from importlib import import_module

import pytest

MODULES = [
    "mpilm.convert",
    "mpilm.learner.quadratic",
    "mpilm.world.faults",
    "mpilm.world.machine",
    "mpilm.world.mpi.abort",
    "mpilm.world.mpi.clock",
    "mpilm.world.parts",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name):
    results = doctest.testmod(import_module(name))
    assert results.attempted > 0
    assert results.failed == 0
