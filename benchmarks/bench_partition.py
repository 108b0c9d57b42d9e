"""A node is cut off: who waits, who goes on, who ends, and after how long?

    python benchmarks/bench_partition.py --out benchmarks/results/partition.json

`mpilm train` on the four nodes of an emulated cluster (tools/emulated_cluster.py: root,
Debian's iproute2), one rank a node, 100 Mbit/s; an LSTM of 3,080 parameters, steps of
0.1 s, mostly asleep. The link of the last node is cut, and mended after some seconds or
never. Every rank writes down when it takes a step (partition_ranks.py).

    stood_s     longest time without a step: of the rank that stood longest
    steps       of all ranks from the cut to the end of the case
    ended_s     seconds from the cut until no rank is left; -1: they all go on
    mpirun_s    the same of mpirun itself; -1: it had not ended
    code        mpirun's exit code; None: it had not ended

A case ends 30 steps after all ranks go on, when all have ended, or after a limit.
Without root it is skipped; --smoke cuts for one second. Cases that are in --out are not
measured again.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from harness import parser, report

from mpilm.data.synthetic import prepare_synthetic

sys.path.insert(0, str(Path(__file__).parents[1]))
from tools.emulated_cluster import EmulatedCluster, run, why_not

NODES, STEP_S, WARM = 4, 0.1, 40
TITLE = "A node of four is cut off, 100 Mbit/s"
ULFM = ("--with-ft", "ulfm")
DETECTOR = (*ULFM, "--mca", "mpi_ft_detector", "true")
QUICK = {"time": 10, "intvl": 5, "probes": 3}
CONFIG = """\
[data]
corpus = "{corpus}"
[model]
embed = 12
hidden = 16
[train]
batch = 4
unroll = 10
samples = 100_000_000
[checkpoint]
every = 8000
[strategy]
name = "{strategy}"
"""


class Case(NamedTuple):
    """What is done. `quick`: mpirun gives a node up after 10 + 3 x 5 s."""

    strategy: str
    cut_s: float = 0.0  # 0: for ever
    mpirun: Sequence[str] = ()
    settings: Sequence[str] = ()
    quick: bool = False
    limit_s: float = 150.0

    @property
    def name(self) -> str:
        """What stands in the table."""
        return " ".join(
            [
                self.strategy,
                f"{self.cut_s:g} s" if self.cut_s else "for ever",
                *self.mpirun,
                *self.settings,
                *(["keepalive 10+3x5"] if self.quick else []),
            ]
        )


CASES = (
    Case("bmuf", 5.0),
    Case("adpsgd", 5.0),
    Case("bmuf", 60.0),
    Case("adpsgd", 60.0),
    Case("bmuf", 60.0, ULFM),
    Case("bmuf", quick=True),
    Case("adpsgd", quick=True),
    Case("bmuf", mpirun=ULFM, quick=True),
    Case("bmuf", settings=("world.silence_s=20",)),
    Case("adpsgd", settings=("world.silence_s=20",)),
    Case("bmuf", mpirun=DETECTOR, settings=("world.silence_s=0",)),
    Case("bmuf", limit_s=760.0),
)


def stamps(folder: Path, rank: int) -> list[float]:
    """Return when a rank took its steps, seconds since the epoch."""
    try:
        data = (folder / f"rank-{rank}").read_bytes()
    except FileNotFoundError:
        return []
    return [at for (at,) in struct.iter_unpack("d", data[: len(data) // 8 * 8])]


def num_ranks_left(cluster: EmulatedCluster) -> int:
    """Return how many ranks are there."""
    left = 0
    for node in range(1, NODES + 1):
        for pid in run("ip", "netns", "pids", f"{cluster.prefix}n{node}").split():
            with suppress(OSError):
                left += b"partition_ranks" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return left


def measured(case: Case) -> dict[str, Any]:
    """Do it; return a row of the table."""
    with (
        tempfile.TemporaryDirectory(prefix="mpilm-partition-") as name,
        EmulatedCluster(NODES, rate="100mbit") as cluster,
    ):
        place = Path(name)
        prepare_synthetic(place / "c.h5", vocab=40, tokens=50_000, seed=3, branching=4)
        text = CONFIG.format(corpus=place / "c.h5", strategy=case.strategy)
        (place / "train.toml").write_text(text)
        (place / "stamps").mkdir()
        ranks = Path(__file__).with_name("partition_ranks.py")
        command = [sys.executable, ranks, place / "stamps", STEP_S]
        command += ["train", place / "train.toml", "--out", place / "run"]
        settings = [
            *case.settings,
            *(['world.on_death="go_on"'] if case.mpirun else []),
        ]
        command += [f"--set={text}" for text in settings]
        own = {f"PRTE_MCA_oob_tcp_keepalive_{k}": str(v) for k, v in QUICK.items()}
        os.environ.update(own if case.quick else {})
        options = [*case.mpirun, "-x", "PYTHONPATH", "-n", str(NODES)]
        with (place / "screen").open("w") as screen:
            process = cluster.start(
                [*options, *map(str, command)], "node", stdout=screen, stderr=screen
            )
        for key in own:
            os.environ.pop(key, None)
        try:
            found = watched(case, cluster, process, place / "stamps")
        finally:
            cluster.mend(NODES)
            process.kill()
            process.wait()
        said = (place / "screen").read_text(errors="replace").splitlines()
        lines = (line.replace(f"{place}/", "") for line in said)
        found["said"] = [line for line in lines if line.startswith("mpilm: ")]
        return {"case": case.name, **found}


def watched(
    case: Case, cluster: EmulatedCluster, process: Any, folder: Path
) -> dict[str, Any]:
    """Cut the node off, and look what happens."""
    began_s = time.time()
    while min(len(stamps(folder, rank)) for rank in range(NODES)) < WARM:
        assert process.poll() is None, "it has ended before it was cut off"
        assert time.time() - began_s < 200.0, "it does not start"
        time.sleep(0.1)
    cluster.cut(NODES)
    cut_s, mended_s, ended_s, mpirun_s = time.time(), 0.0, -1.0, -1.0
    while (now_s := time.time()) < cut_s + case.limit_s:
        if case.cut_s and not mended_s and now_s >= cut_s + case.cut_s:
            cluster.mend(NODES)
            mended_s = now_s
        if ended_s < 0.0 and not num_ranks_left(cluster):
            ended_s = now_s - cut_s
        if mpirun_s < 0.0 and process.poll() is not None:
            mpirun_s = now_s - cut_s
        if mpirun_s >= 0.0 and ended_s >= 0.0:
            break
        steps = [[s for s in stamps(folder, r) if s > mended_s] for r in range(NODES)]
        if mended_s and min(map(len, steps)) >= 30:
            break
        time.sleep(0.2)
    end_s = time.time()
    stood_s, num_steps = 0.0, 0
    for rank in range(NODES):
        found = [s for s in stamps(folder, rank) if s >= cut_s]
        num_steps += len(found)
        times = [cut_s, *found, end_s if ended_s < 0.0 else cut_s + ended_s]
        gaps = [after - before for before, after in pairwise(times)]
        stood_s = max(stood_s, *gaps)
    code = process.poll()
    return {
        "stood_s": round(stood_s, 1),
        "steps": num_steps,
        "ended_s": round(ended_s, 1),
        "mpirun_s": round(mpirun_s, 1),
        "code": code,
    }


def main() -> None:
    arguments = parser(__doc__, warmup=0, loops=1)
    arguments.add_argument("--only", default="", help="cases that begin so")
    args = arguments.parse_args()
    if reason := why_not():
        print(f"skipped: {reason}")
        return
    cases = [Case("bmuf", 1.0)] if args.smoke else CASES
    rows: list[dict[str, Any]] = []
    if args.out and args.out.exists():
        rows = json.loads(args.out.read_text())["tables"][0]["rows"]
    for case in cases:
        done = {row["case"] for row in rows}
        if case.name in done or not case.name.startswith(args.only):
            continue
        rows.append(measured(case))
        report("partition", TITLE, rows, args)


if __name__ == "__main__":
    main()
