"""`pip install .` without the checkout: the package carries all that it needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpilm.data.synthetic import prepare_synthetic

ROOT = Path(__file__).parents[2]
PACKAGED = ("mpilm", "jobs", "pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with mpilm as pip installs it, built from a copy of the sources.

    A copy, because setuptools builds in the place where the sources lie, and packs what
    an earlier build has left there.
    """
    source = tmp_path_factory.mktemp("source")
    target = tmp_path_factory.mktemp("installed")
    for name in PACKAGED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, source / name)
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"),
        *("--no-build-isolation", "--disable-pip-version-check"),
        *("--target", target, source),
        folder=target,
    )
    shutil.rmtree(source)
    return target


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    """Return what a command prints; fail if it does."""
    ended = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended
    return ended.stdout


def mpilm(installed: Path, *arguments: str | Path, folder: Path) -> str:
    """Return what the installed program prints, started in `folder`."""
    command = (sys.executable, "-m", "mpilm", *arguments)
    return run(*command, folder=folder, PYTHONPATH=str(installed))


def test_every_module_is_there(installed: Path, tmp_path: Path) -> None:
    program = (
        "import importlib, pkgutil, mpilm\n"
        "modules = pkgutil.walk_packages(mpilm.__path__, 'mpilm.')\n"
        "names = [m.name for m in modules if not m.name.endswith('__main__')]\n"
        "for name in names: importlib.import_module(name)\n"
        "print(mpilm.__file__, len(names))\n"
    )
    command = (sys.executable, "-c", program)
    said = run(*command, folder=tmp_path, PYTHONPATH=str(installed)).split()
    assert Path(said[0]).is_relative_to(installed)
    here = [p for p in (ROOT / "mpilm").rglob("*.py") if p.name != "__main__.py"]
    assert int(said[1]) == len(here) - 1  # the package itself is not in its own walk


def test_jobs_are_submitted_by_its_own_scripts(installed: Path, tmp_path: Path) -> None:
    prepare_synthetic(tmp_path / "c.h5", vocab=40, tokens=50_000, seed=3, branching=4)
    jobs = installed / "mpilm/jobs"
    said = mpilm(
        installed,
        *("submit", jobs / "configs/demo.toml", "--set", "data.corpus=c.h5"),
        *("--scheduler", "slurm", "--time", "1:00:00", "--dry-run"),
        folder=tmp_path,
    )
    script = Path(said.split()[-1])
    assert script == jobs / "slurm/train.sbatch"
    assert script.read_text() == (ROOT / "jobs/slurm/train.sbatch").read_text()
    assert (jobs / "pbs/train.pbs").exists()


def test_the_program_and_its_metadata_say_one_version(
    installed: Path, tmp_path: Path
) -> None:
    said = mpilm(installed, "--version", folder=tmp_path).split()
    (metadata,) = installed.glob("mpilm-*.dist-info/METADATA")
    assert f"\nVersion: {said[1]}\n" in metadata.read_text()
    assert "mpilm = mpilm.cli:main" in (
        metadata.with_name("entry_points.txt").read_text()
    )
