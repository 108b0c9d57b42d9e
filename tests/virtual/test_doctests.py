"""The examples in the docstrings of the virtual world hold."""

import doctest
from importlib import import_module

import pytest

MODULES = [
    "mpilm.convert",
    "mpilm.learner.quadratic",
    "mpilm.world.faults",
    "mpilm.world.machine",
    "mpilm.world.parts",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name):
    results = doctest.testmod(import_module(name))
    assert results.attempted > 0
    assert results.failed == 0
