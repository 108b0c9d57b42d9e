"""Readers of files from outside, fed by a fuzzer that their coverage guides.

    pip install atheris
    python -m tests.fuzz.guided all --minutes 1 --out build/fuzz
    python -m tests.fuzz.guided wav --replay build/fuzz/wav/crash-...

libFuzzer (atheris) changes the bytes of one of a kind's files, and goes on from those
that have reached a branch of mpilm which none before them had reached. What a reader
must keep to stands in readers.py, which draws its damage by seed instead. The first
file that breaks it ends a kind, and is kept. --out holds all files that were worth it:
the next run begins with them.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

GRACE_S = 120  # for the start, and for a reader that does not end


def fuzz(kind: str, options: list[str]) -> None:
    """Be the fuzzer of a kind; does not return. `options`: libFuzzer's, and folders."""
    import atheris

    with atheris.instrument_imports(include=["mpilm"]):
        from tests.fuzz import readers

    readers.be_ready()
    files = readers.READERS[kind][0](Path(tempfile.mkdtemp()))
    whole = [(path, path.read_bytes()) for path in files]
    corpus = Path(options[-1])
    for index, (_, data) in enumerate(whole):
        (corpus / f"whole-{index}").write_bytes(bytes([index]) + data)

    def read(data: bytes) -> None:
        """Read what the fuzzer has made of one of the files."""
        for path, original in whole:
            path.write_bytes(original)
        verdict = readers.read_one(kind, put(data, files))
        if verdict.startswith("FAULT"):
            raise AssertionError(f"{kind}: {verdict}")

    # time is watched by readers.py and by the parent: one alarm is enough
    longest = 2 * max(len(data) for _, data in whole)
    limits = [f"-max_len={longest}", "-timeout=0", "-rss_limit_mb=2048"]
    atheris.Setup([sys.argv[0], *limits, *options], read)
    atheris.Fuzz()


def put(data: bytes, files: list[Path]) -> Path:
    """Write what the fuzzer made into one of the files, the first byte's; return it."""
    path = files[data[0] % len(files)] if data else files[0]
    path.write_bytes(data[1:])
    return path


def run(kind: str, minutes: float, out: Path) -> tuple[int, int, str]:
    """Fuzz a kind; return how many were read, how many kept, and what is wrong."""
    corpus = out / kind / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={max(1, round(60 * minutes))}"]
    options += ["-print_final_stats=1", f"-artifact_prefix={out / kind}/", str(corpus)]
    command = [sys.executable, "-m", "tests.fuzz.guided", kind, "--", *options]
    wrong = ""
    with tempfile.TemporaryDirectory() as place:  # libFuzzer leaves without tidying up
        try:
            done = subprocess.run(
                command,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, "TMPDIR": place},
                text=True,
                errors="replace",
                timeout=60.0 * minutes + GRACE_S,
            )
            said = done.stderr
            if done.returncode:
                fault = re.search(r"FAULT.*", said)
                wrong = fault[0] if fault else f"ends with {done.returncode}"
        except subprocess.TimeoutExpired as error:
            said = (error.stderr or b"").decode(errors="replace")
            wrong = "FAULT does not end"
    (out / kind / "log").write_text(said)
    counted = re.search(r"number_of_executed_units: (\d+)", said)
    return int(counted[1]) if counted else 0, len(list(corpus.iterdir())), wrong


def replay(kind: str, path: Path) -> str:
    """Return how a file that was kept goes now."""
    from tests.fuzz import readers

    readers.be_ready()
    with tempfile.TemporaryDirectory() as place:
        files = readers.READERS[kind][0](Path(place))
        return readers.read_one(kind, put(path.read_bytes(), files))


def main() -> int:
    """Do as the header says; return the exit code."""
    if "--" in sys.argv:
        fuzz(sys.argv[1], sys.argv[3:])
    from tests.fuzz.readers import READERS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["all", *READERS])
    parser.add_argument("--minutes", type=float, default=1.0, help="of each kind")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--replay", type=Path, help="a file that was kept")
    options = parser.parse_args()
    if options.replay:
        print(verdict := replay(options.kind, options.replay))
        return int(verdict.startswith("FAULT"))
    if find_spec("atheris") is None:
        print("skipped: there is no atheris for this Python")
        return 0
    num_faults = 0
    for kind in READERS if options.kind == "all" else [options.kind]:
        num_read, num_kept, wrong = run(kind, options.minutes, options.out)
        num_faults += bool(wrong)
        print(
            f"{kind}: {num_read:,} read, {num_kept:,} kept; {wrong or 'none at fault'}"
        )
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
