"""Fixtures of the tests of the job scripts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.project import Project


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small corpus."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.h5"
    command = [sys.executable, "-m", "mpilm", "prepare", "synthetic", f"--out={path}"]
    subprocess.run([*command, "--vocab=50", "--tokens=20000"], check=True, timeout=60)
    return path


@pytest.fixture
def project(tmp_path: Path, corpus: Path) -> Iterator[Project]:
    """Return a fresh project folder; pytest shows its jobs' output if a test fails."""
    yield Project(tmp_path, corpus)
    for log in sorted(tmp_path.glob("job*.log")):
        print(log.read_text(errors="replace"))
