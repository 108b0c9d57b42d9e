"""The examples in the docstrings of the commands and what they stand on hold."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest

MODULES = [
    "mpilm.checks.children",
    "mpilm.checks.facts",
    "mpilm.checks.findings",
    "mpilm.commands.doctor",
    "mpilm.commands.simulate",
    "mpilm.commands.submit",
    "mpilm.report.page",
    "mpilm.report.reader",
    "mpilm.simulation",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name):
    results = doctest.testmod(import_module(name))
    assert results.attempted > 0
    assert results.failed == 0
