"""Bad input: one clear line, exit code 2, at once, at any number of ranks.

None of these runs gets as far as torch: in its place stands a module that cannot be
imported.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import h5py
import pytest

from .conftest import Run, mpirun


@pytest.fixture(scope="session")
def bad(inputs: Path) -> Path:
    """A folder with every kind of bad file, and with a `torch` that is none."""
    folder = inputs / "bad"
    (folder / "modules").mkdir(parents=True)
    (folder / "modules/torch.py").write_text("raise RuntimeError('torch is loaded')")
    whole = (inputs / "small.h5").read_bytes()
    (folder / "empty.h5").touch()
    (folder / "truncated.h5").write_bytes(whole[: len(whole) // 2])
    with h5py.File(folder / "foreign.h5", "w") as file:
        file["x"] = [1, 2, 3]
    (folder / "text.h5").write_text("once upon a time")
    (folder / "latin1.txt").write_bytes("caf\u00e9 au lait\n".encode("latin-1") * 99)
    (folder / "broken.toml").write_text("[train\n")
    (folder / "typo.toml").write_text("[train]\nbacth = 3\n")
    return folder


@pytest.fixture(params=[0, 2], ids=["alone", "mpirun-2"])
def run(request: pytest.FixtureRequest, bad: Path):
    """Return a function that runs mpilm without torch, alone and on 2 ranks."""

    def run(*arguments: str | Path) -> Run:
        return mpirun(request.param, *arguments, PYTHONPATH=str(bad / "modules"))

    return run


@pytest.mark.parametrize(
    ("corpus", "words"),
    [
        ("none.h5", ["none.h5", "no such file"]),
        ("empty.h5", ["empty.h5", "empty"]),
        ("text.h5", ["text.h5", "not an HDF5 file"]),
        ("truncated.h5", ["truncated.h5", "truncated"]),
        ("foreign.h5", ["foreign.h5", "not a corpus"]),
    ],
)
def test_a_bad_corpus(run, inputs: Path, tmp_path: Path, corpus, words) -> None:
    setting = f"data.corpus={inputs / 'bad' / corpus}"
    out = tmp_path / "run"
    run("train", inputs / "tiny.toml", "--set", setting, "--out", out).refused(*words)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("none.toml", ["none.toml", "No such file"]),
        ("bad/broken.toml", ["broken.toml", "not TOML", "line 1"]),
        ("bad/typo.toml", ["typo.toml", "'bacth'", "did you mean 'batch'"]),
        ("tiny.toml --set train.batch=many", ["train.batch", "int"]),
        ("tiny.toml --set optim.lr=-1", ["optim.lr", "> 0"]),
        ("tiny.toml --set faults.slow.7=2.0", ["faults.slow.7", "ranks"]),
        ("tiny.toml --set train.batch=30000", ["batch 30000", "small.h5 has 50000"]),
    ],
)
def test_a_bad_setting(run, inputs: Path, tmp_path: Path, arguments, words) -> None:
    config, *options = arguments.split()
    out = tmp_path / "run"
    run("train", inputs / config, *options, "--out", out).refused(*words)
    assert not out.exists()


def test_more_ranks_than_the_data_can_feed(inputs: Path, bad: Path, tmp_path: Path):
    arguments = ("train", inputs / "tiny.toml", "--out", tmp_path / "run")
    enough = ("--set", "train.batch=1200")  # for 3 ranks, not for 5
    modules = {"PYTHONPATH": str(bad / "modules")}
    mpirun(5, *arguments, *enough, **modules).refused(
        "5 ranks x batch 1200", "small.h5"
    )


@pytest.mark.parametrize("out", ["tiny.toml", "tiny.toml/run", "/proc/run"])
def test_an_output_folder_that_cannot_be_written(run, inputs: Path, out) -> None:
    # as root, permissions do not bite; a file in the way and /proc do
    path = inputs / out
    run("train", inputs / "tiny.toml", "--out", path).refused(str(path), "cannot write")


@pytest.mark.parametrize("command", ["train", "evla", "prepare text"])
def test_wrong_usage_is_shown_once(run, command) -> None:
    done = run(*command.split())
    assert done.code == 2
    done.has_no_traceback()
    about = {"train": "--out PATH", "evla": "no command 'evla'"}
    assert (done.out + done.err).count(about.get(command, "--train [PATH")) == 1
    assert "\x1b" not in done.out + done.err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.txt", ["none.txt", "no such file"]),
        ("latin1.txt", ["latin1.txt", "UTF-8"]),
    ],
)
def test_text_that_cannot_be_prepared(run, bad: Path, tmp_path: Path, name, words):
    arguments = ("prepare", "text", "--train", bad / name)
    run(*arguments, "--out", tmp_path / "c.h5").refused(*words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_no_run_and_no_checkpoint(run, bad: Path, trained, tmp_path: Path, command):
    run(command, tmp_path / "none").refused("none", "no run")
    config = (trained[0] / "config.toml").read_text()
    (tmp_path / "config.toml").write_text(config)
    run(command, tmp_path).refused(str(tmp_path), "no checkpoint")


def contents(folder: Path) -> dict[str, str]:
    """Return the hash of every file below."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("ranks", "options", "words"),
    [
        (2, "", ["holds a run", "--resume", "--out"]),
        (2, "--resume --set model.hidden=8", ["model.hidden = 16", "has 8"]),
        (2, "--resume --set optim.name=sgd", ["optim.name = adamw", "has sgd"]),
        (2, "--resume --set data.corpus=OTHER", ["other.h5", "vocabulary", "step-"]),
    ],
)
def test_a_run_that_cannot_go_on_stays_as_it_is(
    bad: Path, trained, ranks, options, words
) -> None:
    inputs = bad.parent
    folder, _ = trained
    before = contents(folder)
    done = mpirun(
        ranks,
        *("train", inputs / "tiny.toml", "--out", folder),
        *options.replace("OTHER", str(inputs / "other.h5")).split(),
        PYTHONPATH=str(bad / "modules"),
    )
    done.refused(*words)
    assert contents(folder) == before


def test_evaluation_on_another_corpus_or_split(run, inputs: Path, trained) -> None:
    other = inputs / "other.h5"
    words = ("other.h5", "vocabulary", "trained")
    run("eval", trained[0], "--corpus", other).refused(*words)
    run("eval", trained[0], "--split", "dev").refused("small.h5", "'dev'", "valid")
