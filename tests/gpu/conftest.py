"""What needs a GPU. `pytest -m gpu tests/gpu`, or benchmarks/gpu.py, runs it."""

from __future__ import annotations

import pytest


@pytest.fixture
def cuda() -> str:
    """The card; a test that asks for it is skipped without one, and says so."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return "cuda:0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that asks for the card."""
    for item in items:
        if "cuda" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
