"""Every reader of files from outside, fed with damaged ones, by seed.

    python -m tests.fuzz.readers wav 17         # replay a seed
    python -m tests.fuzz.readers all 0 1000     # seeds 0..999 of each

A reader reads a file, or says in one line what is wrong with it (an MpilmError that
names the file, or the utterance or key in it). It raises nothing else, ends within
20 s, does not end the process, and takes no more memory than twice the file and 8 MB
(what numpy and Python take is counted, what HDF5 takes is not). Each batch of seeds
runs in a child process; how a seed went is written before the next, so a crash has a
seed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import traceback
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mpilm.config import read_config
from mpilm.data.frame_corpus import FrameCorpus
from mpilm.data.hdf5 import Corpus, read_tokens
from mpilm.data.kaldi import Alignments, KaldiFolder
from mpilm.data.kaldi_archives import Archives, Bad
from mpilm.data.kaldi_prepare import prepare_kaldi
from mpilm.data.synthetic import prepare_synthetic
from mpilm.data.text import prepare_text
from mpilm.data.wav import WavReader, list_recordings
from mpilm.errors import MpilmError
from mpilm.storage.runlog import RunLog, read_log
from mpilm.storage.state_file import read_state, write_state
from mpilm.train.changes import Change, read_changes, write_changes
from mpilm.train.folder import RunFolder
from mpilm.train.metrics import LOG_FIELDS
from tests.fuzz.mutate import damage_hdf5_, damaged, other_value
from tests.unit.kaldi_files import make_folder
from tests.unit.tones import tone, write_wav

LIMIT_S = 20
MEMORY_BYTES = 8_000_000  # what a reader takes for a file of any size: blocks
BATCH = 100  # seeds in a child process


class Hung(BaseException):
    """A reader took too long."""


def read_corpus(path: Path) -> None:
    """Read all of a text corpus."""
    with Corpus.open(path) as corpus:
        assert len(corpus.vocabulary) == len(corpus.ids)
        for name in corpus.splits:
            tokens = corpus.split(name)
            for start in range(0, min(len(tokens), 1 << 20), 1 << 15):
                read_tokens(tokens, start, start + (1 << 15))


def read_frames(path: Path) -> None:
    """Read all of a frames corpus."""
    with FrameCorpus.open(path) as corpus:
        for name in corpus.splits:
            for _ in corpus.split(name):
                pass


def read_kaldi(path: Path) -> None:
    """Read the features of a folder, and alignments, of which a file is damaged."""
    archives, folder = Archives(), KaldiFolder(path.parent)
    for name, place in folder.places():
        folder.features(archives, name, place)
        folder.speaker(name)
    for kind in ("pdf.ark", "pdf.scp", "pdf.txt"):
        alignments = Alignments([path.parent / kind], Bad())
        for name in folder.names():
            if name in alignments:
                alignments.labels(name)


def read_wav(path: Path) -> None:
    """Read the recordings of a folder, of which one is damaged."""
    reader = WavReader()
    for recording in list_recordings(path.parent):
        reader.read(recording)


def read_text(path: Path) -> None:
    """Make a corpus of a text."""
    level: Any = ("word", "char")[path.stat().st_size % 2]
    prepare_text(path, None, None, path.with_suffix(".h5"), level=level)


def read_folder(path: Path) -> None:
    """Read what stands beside a run's checkpoints."""
    folder = RunFolder(path.parent)
    folder.read_summary()
    read_changes(folder.changes)
    folder.read_vocabulary()
    folder.read_config()


def make_text(folder: Path) -> list[Path]:
    """Write a text."""
    words = random.Random(1).choices(
        ["the", "a", "of", "to", "in", "model", "mean"], k=400
    )
    lines = [" ".join(words[n : n + 8]) for n in range(0, 400, 8)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n\u00e9t\u00e9 \u4e2d\n")
    return [folder / "text.txt"]


def make_corpus(folder: Path) -> list[Path]:
    """Write a text corpus."""
    prepare_synthetic(folder / "c.h5", vocab=12, tokens=3000, seed=1, branching=3)
    return [folder / "c.h5"]


def make_frames(folder: Path) -> list[Path]:
    """Write a frames corpus."""
    kaldi = make_folder(folder / "kaldi")
    splits = {"train": KaldiFolder(kaldi), "valid": KaldiFolder(kaldi)}
    chosen: Any = {name: found.path for name, found in splits.items()}
    prepare_kaldi(chosen, folder / "f.h5", alignments=[kaldi / "pdf.ark"])
    return [folder / "f.h5"]


def make_kaldi(folder: Path) -> list[Path]:
    """Write a data folder of Kaldi."""
    kaldi = make_folder(folder / "k")
    return sorted(path for path in kaldi.iterdir())


def make_compressed(folder: Path) -> list[Path]:
    """Write a data folder of Kaldi with compressed features."""
    return [make_folder(folder / "k", compression=2) / "feats.ark"]


def make_wav(folder: Path) -> list[Path]:
    """Write two recordings and what is said in them."""
    written = [
        write_wav(folder / f"w/{w}.wav", tone(w, 1, 0.05)) for w in ("low", "rise")
    ]
    (folder / "w/text").write_text("low low\nrise rise\n")
    (folder / "w/wav.scp").write_text("low low.wav\nrise rise.wav\n")
    return [written[1], folder / "w/text", folder / "w/wav.scp"]


def make_checkpoint(folder: Path) -> list[Path]:
    """Write a checkpoint's file of a rank."""
    state = {"learner/theta": np.ones(50, np.float32), "learner/steps": 2**70}
    state |= {"strategy/name": "bmuf", "raw": b"12", "lr": 0.5, "on": True}
    state["random/state"] = np.arange(20, dtype=np.uint64)
    write_state(folder / "rank-0000.h5", state, step=3, size=2, rank=0)
    return [folder / "rank-0000.h5"]


def make_log(folder: Path) -> list[Path]:
    """Write a rank's log."""
    with RunLog(folder / "log.h5", 0, LOG_FIELDS) as log:
        for step in range(30):
            log.row(**dict.fromkeys(LOG_FIELDS, 1) | {"step": step})
            log.event("compute", 0.0, 1.0, step=step)
    return [folder / "log.h5"]


CONFIG = """\
[data]
corpus = "c.h5"
[model]
embed = 12
hidden = 16
dropout = 0.1
[optim]
name = "adamw"
lr = 0.01
[train]
batch = 4
unroll = 10
samples = 80_000
[strategy]
name = "bmuf"
period = 4
[faults]
slow = { 3 = 10.0 }
[[faults.profile]]
kind = "spikes"
ranks = [0, 1]
probability = 0.02
factor = 20.0
"""


def make_config(folder: Path) -> list[Path]:
    """Write a configuration."""
    (folder / "c.toml").write_text(CONFIG)
    return [folder / "c.toml"]


def make_run(folder: Path) -> list[Path]:
    """Write what stands beside a run's checkpoints."""
    run = folder / "r"
    run.mkdir()
    read_config(make_config(folder)[0])
    (run / "config.toml").write_text(CONFIG)
    (run / "vocabulary.json").write_text('{"words": ["<eos>", "a"], "level": "word"}')
    (run / "summary.json").write_text('{"samples": 12, "steps": 3, "changes": []}')
    write_changes(
        RunFolder(run).changes,
        [Change(12, 3, "optim.lr", 0.1, 0.2)],
    )
    return [RunFolder(run).changes, *sorted(run.glob("*.json")), run / "config.toml"]


# kind -> (writes whole files, of which one is damaged; reads them)
READERS: dict[str, tuple[Callable[[Path], list[Path]], Callable[[Path], Any]]] = {
    "config": (make_config, read_config),
    "run": (make_run, read_folder),
    "corpus": (make_corpus, read_corpus),
    "frames": (make_frames, read_frames),
    "checkpoint": (make_checkpoint, read_state),
    "log": (make_log, read_log),
    "kaldi": (make_kaldi, read_kaldi),
    "compressed": (make_compressed, read_kaldi),
    "wav": (make_wav, read_wav),
    "text": (make_text, read_text),
}


def damage_one(kind: str, seed: int, whole: list[tuple[Path, bytes]]) -> Path:
    """Put all files as they were but one; return that one."""
    draw = random.Random(f"{kind} {seed}")
    for path, data in whole:
        path.write_bytes(data)
    path, data = draw.choice(whole)
    if path.suffix == ".h5" and draw.random() < 0.6:
        with suppress(Exception):  # what is damaged may not bear more of it
            damage_hdf5_(draw, path)
    elif path.suffix == ".toml" and draw.random() < 0.6:
        path.write_bytes(other_value(draw, data))
    else:
        path.write_bytes(damaged(draw, data))
    return path


def read_one(kind: str, path: Path) -> str:
    """Return how reading went: read, refused, or what must not be."""
    read = READERS[kind][1]
    size = sum(each.stat().st_size for each in path.parent.iterdir() if each.is_file())
    tracemalloc.start()
    signal.alarm(LIMIT_S)
    try:
        read(path)
        verdict = "read"
    except MpilmError as error:
        text = str(error)
        verdict = "refused"
        names = (str(path.parent), path.name, "utterance ", "strategy ")
        if "\n" in text or not any(name in text for name in names):
            verdict = f"FAULT a line without its file: {text!r}"
    except Hung:
        verdict = f"FAULT takes longer than {LIMIT_S} s"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        verdict = (
            f"FAULT {type(error).__name__}: {error} ({where.filename}:{where.lineno})"
        )
    finally:
        signal.alarm(0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    if peak > 2 * size + MEMORY_BYTES and not verdict.startswith("FAULT"):
        verdict = f"FAULT takes {peak:,} bytes for files of {size:,}"
    return " ".join(verdict.split())


def ring(*_: object) -> None:
    """Be the alarm."""
    raise Hung


def be_ready() -> None:
    """Let a reader that hangs be ended, and warnings be silent, in this process."""
    signal.signal(signal.SIGALRM, ring)
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")


def run_batch(kind: str, seeds: range, out: Path) -> None:
    """Read damaged files; write a line on each. In a child process."""
    be_ready()
    with tempfile.TemporaryDirectory() as folder, out.open("a") as lines:
        files = READERS[kind][0](Path(folder))
        whole = [(path, path.read_bytes()) for path in files]
        READERS[kind][1](whole[0][0])  # whole, it is read
        for seed in seeds:
            lines.write(f"{seed} ")
            lines.flush()
            lines.write(read_one(kind, damage_one(kind, seed, whole)) + "\n")
            lines.flush()


def sweep(kind: str, seeds: range) -> tuple[Counter[str], dict[int, str]]:
    """Return how many were read and refused, and what must not be: seed -> what."""
    counts: Counter[str] = Counter()
    faults: dict[int, str] = {}
    first = seeds.start
    while first < seeds.stop:
        batch = range(first, min(first + BATCH, seeds.stop))
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "lines"
            out.touch()
            if (pid := os.fork()) == 0:
                code = 1
                try:
                    run_batch(kind, batch, out)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            _, status = os.waitpid(pid, 0)
            lines = out.read_text().splitlines()
        code = os.waitstatus_to_exitcode(status)
        for line in lines:
            seed, _, verdict = line.partition(" ")
            verdict = verdict or f"FAULT ends the process: {code}"
            if verdict.startswith("FAULT"):
                faults[int(seed)] = verdict
            counts[verdict.split()[0]] += 1
        if code and not lines:
            raise RuntimeError(f"{kind}: no file could be read at all")
        first += len(lines)
    return counts, faults


def main(kind: str, first: str, stop: str | None = None) -> int:
    """Run one seed, or a range of seeds; return the exit code."""
    seeds = range(int(first), int(stop) if stop else int(first) + 1)
    num_faults = 0
    for name in READERS if kind == "all" else [kind]:
        counts, faults = sweep(name, seeds)
        num_faults += len(faults)
        print(f"{name}: {len(seeds)} damaged files, {dict(counts)}", flush=True)
        for seed, what in list(faults.items())[:20]:
            print(f"  {what}\n  replay: python -m tests.fuzz.readers {name} {seed}")
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
