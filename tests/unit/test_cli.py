"""The command line, run as a user runs it."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from mpilm.cli import COMMANDS, main


def mpilm(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "mpilm", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def test_help_lists_every_command_quickly_without_torch_or_mpi():
    code = (
        "import sys; from mpilm.cli import main; main(['--help']);"
        "print(sorted({'torch', 'mpi4py', 'numpy'} & set(sys.modules)))"
    )
    best_s = float("inf")
    for _ in range(3):
        began_s = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        best_s = min(best_s, time.monotonic() - began_s)
    assert best_s < 0.5
    assert done.stdout.endswith("[]\n")
    for words in COMMANDS:
        assert " ".join(words) in done.stdout


def test_importing_mpilm_starts_no_mpi():
    code = "import mpilm, sys; print('mpi4py' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False False\n"


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


def test_a_missing_configuration_is_one_line_and_code_2(tmp_path):
    done = mpilm("train", str(tmp_path / "no.toml"), "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no.toml: No such file" in done.stderr
