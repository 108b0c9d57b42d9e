"""The command line, run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from mpilm.cli import COMMANDS, main
from mpilm.launch import LAUNCHERS, launched


def python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def mpilm(*arguments, **options):
    return python("-m", "mpilm", *arguments, **options)


def test_help_lists_every_command_quickly_without_torch_or_mpi():
    code = (
        "import sys; from mpilm.cli import main; main(['--help']);"
        "print(sorted({'torch', 'mpi4py', 'numpy'} & set(sys.modules)))"
    )
    best_s = float("inf")
    for _ in range(3):
        began_s = time.monotonic()
        done = python("-c", code)
        best_s = min(best_s, time.monotonic() - began_s)
        assert done.returncode == 0
    assert best_s < 0.5
    assert done.stdout.endswith("[]\n")
    for words in COMMANDS:
        assert " ".join(words) in done.stdout


def test_importing_mpilm_starts_no_mpi():
    code = "import mpilm, sys; print('mpi4py' in sys.modules, 'torch' in sys.modules)"
    done = python("-c", code)
    assert done.returncode == 0
    assert done.stdout == "False False\n"


def test_a_bad_configuration_is_told_of_before_torch_is_loaded(tmp_path):
    """It takes 4 s; tests/launch sees the same under mpirun."""
    (tmp_path / "bad.toml").write_text("[train]\nbatch = 'many'\n")
    code = (
        "import sys; from mpilm.cli import main\n"
        "try:\n    main(['train', 'bad.toml', '--out', 'run'])\n"
        "finally:\n    print('torch' in sys.modules)"
    )
    done = python("-c", code, cwd=tmp_path)
    assert "train.batch" in done.stderr
    assert done.stdout == "False\n", done


def test_train_help_shows_every_setting_with_its_default():
    done = mpilm("train", "--help")
    assert done.returncode == 0
    for text in ('[strategy] name = "model_averaging"', "period = 10", "unroll = 35"):
        assert text in done.stdout


def test_an_unknown_command_is_one_line_and_code_2():
    done = mpilm("trian")
    assert done.returncode == 2
    assert "no command 'trian'" in done.stderr
    assert "Traceback" not in done.stderr


def test_whole_numbers_of_options_are_written_as_in_a_configuration(tmp_path, capsys):
    out = tmp_path / "c.h5"
    words = ["prepare", "synthetic", "--out", str(out), "--vocab", "1e2"]
    assert main([*words, "--tokens", "2_000", "--branching", "4.0"]) == 0
    assert "vocabulary of 100 words" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([*words, "--tokens", "1.5"])
    assert stop.value.code == 2
    assert "1.5 is no whole number" in capsys.readouterr().err


def of(prefix: str, rank: int, size: int) -> dict[str, str]:
    names = {
        "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        "mpiexec": ("PMI_RANK", "PMI_SIZE"),
        "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        "pmix": ("PMIX_RANK", "PMIX_NAMESPACE"),
    }
    return dict(zip(names[prefix], (str(rank), str(size)), strict=True))


BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
PLACES = {
    "nowhere": ({}, (0, 1)),
    "an sbatch script": (BATCH, (0, 1)),
    "salloc": ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, (0, 1)),
    "srun -n 1": (BATCH | of("srun", 0, 1), (0, 1)),
    "srun -n 4": (BATCH | of("srun", 3, 4), (3, 4)),
    "srun -n 4 --mpi=pmi2": (of("srun", 3, 4) | of("mpiexec", 3, 4), (3, 4)),
    "srun -n 4 --mpi=pmix": (of("srun", 3, 4) | of("pmix", 3, 4), (3, 4)),
    "srun -n 1 --mpi=pmix --pty bash": (of("srun", 0, 1) | of("pmix", 0, 1), (0, 1)),
    "a single task with a number": (of("srun", 3, 1), (0, 1)),
    "the same, by pmi2": (of("srun", 3, 1) | of("mpiexec", 0, 1), (0, 1)),
    "mpirun -n 4": (of("mpirun", 2, 4), (2, 4)),
    "mpirun -n 4 in an sbatch script": (BATCH | of("mpirun", 2, 4), (2, 4)),
    "its daemon was started by srun": (of("srun", 1, 2) | of("mpirun", 6, 8), (6, 8)),
    "mpirun -n 1 in a task of srun": (of("srun", 3, 4) | of("mpirun", 0, 1), (0, 1)),
    "mpiexec -n 4 in a task of srun": (of("srun", 1, 2) | of("mpiexec", 0, 4), (0, 4)),
    "prun in a shell of srun": (of("srun", 0, 1) | of("pmix", 3, 9), (3, 4)),
    "nonsense": ({"SLURM_PROCID": "x", "PMI_RANK": ""}, (0, 1)),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_rank_is_one_of_several_that_a_launcher_started(place, monkeypatch, tmp_path):
    environment, expected = PLACES[place]
    assert launched(environment) == expected
    for name in {name for launcher in LAUNCHERS for name in launcher[1:] if name}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "c.h5"
    words = ["prepare", "synthetic", "--out", str(out), "--vocab", "20"]
    assert main([*words, "--tokens", "1000"]) == 0
    assert out.exists() == (expected[0] == 0)


def test_a_missing_configuration_is_one_line_and_code_2(tmp_path):
    done = mpilm("train", str(tmp_path / "no.toml"), "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no.toml: No such file" in done.stderr


def test_a_reader_that_has_gone_is_no_error():
    """As in `mpilm --help | head -3`."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as closed:
        command = [sys.executable, "-m", "mpilm", "--help"]
        done = subprocess.run(
            command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")
