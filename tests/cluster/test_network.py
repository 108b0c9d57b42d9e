"""Training over real TCP between the nodes of an emulated cluster."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mpilm.cli import main
from mpilm.data.synthetic import prepare_synthetic
from mpilm.storage.checkpoint import complete_checkpoints, load_shared
from mpilm.strategies import STRATEGIES
from tools.emulated_cluster import EmulatedCluster, links, why_not

PROGRAM = (sys.executable, str(Path(__file__).with_name("over_tcp.py")))
NODES = 4
NEAR = 0.3  # of the first distance to the minimum: the final model's
AGREED = 0.4  # the farthest rank's own model's; ranks that do not talk end at 0.75

pytestmark = pytest.mark.timeout(300)
minutes = pytest.mark.skipif(
    "MPILM_MINUTES" not in os.environ, reason="takes minutes: make cluster-test"
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmulatedCluster]:
    """Return four nodes at 100 Mbit/s, or skip and say why there are none."""
    if reason := why_not():
        pytest.skip(reason)
    with EmulatedCluster(NODES, rate="100mbit", slots=2) as made:
        yield made


def lines(
    cluster: EmulatedCluster, ranks: int, *arguments: str, mapping: str = "node"
) -> dict[str, tuple[float, float, float, str]]:
    """Train; return strategy -> seconds, distances of final and worst model, nodes."""
    done = cluster.mpirun(
        ["-n", str(ranks), *PROGRAM, *arguments], map_by=mapping, limit_s=240.0
    )
    assert done.returncode == 0, done
    assert "Traceback" not in done.stderr, done
    rows = (line.split() for line in done.stdout.splitlines())
    return {
        name: (float(seconds), float(left), float(worst), where)
        for name, seconds, left, worst, where in rows
    }


def test_every_strategy_trains_over_tcp(cluster: EmulatedCluster) -> None:
    found = lines(cluster, NODES)
    assert list(found) == list(STRATEGIES)
    for name, (_, left, worst, where) in found.items():
        assert left < NEAR, found
        assert (worst < AGREED) == (name != "local"), found
        assert where == ("0,1,2,3" if name == "hierarchical" else "-"), found
    # 60 steps of 80 KB models each: the network is what they wait for
    assert found["allreduce"][0] > found["model_averaging"][0], found


def test_two_ranks_of_a_node_are_a_node(cluster: EmulatedCluster) -> None:
    found = lines(cluster, 2 * NODES, "hierarchical", mapping="slot")
    assert found["hierarchical"][3] == "0,0,1,1,2,2,3,3"
    assert found["hierarchical"][1] < NEAR


@pytest.mark.parametrize(
    ("name", "cut_s"),
    [
        *((name, 5.0) for name in ("allreduce", "gossip_bmuf", "adpsgd", "async_sgd")),
        pytest.param("bmuf", 60.0, marks=minutes),
    ],
)
def test_a_node_that_is_cut_off_comes_back(
    cluster: EmulatedCluster, name: str, cut_s: float
) -> None:
    """TCP holds what was sent: everybody waits or goes on, and nothing is lost."""

    def cut_and_mend() -> None:
        time.sleep(4.0)  # MPI has started, training goes on
        cluster.cut(3)
        time.sleep(cut_s)
        cluster.mend(3)

    cutter = threading.Thread(target=cut_and_mend)
    cutter.start()
    try:
        found = lines(cluster, NODES, name, "600")
    finally:
        cutter.join()
    seconds, left, *_ = found[name]
    # ranks that went on took their steps without the others' data
    assert left < 2 * NEAR, found
    assert seconds > cut_s + 1.0, "it was over before the link was cut"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a folder with a configuration `train.toml` that trains for long."""
    corpus = tmp_path / "corpus.h5"
    prepare_synthetic(corpus, vocab=30, tokens=20_000, seed=1, branching=4)
    (tmp_path / "train.toml").write_text(
        f'[data]\ncorpus = "{corpus}"\n[model]\nembed = 8\nhidden = 8\n'
        "[train]\nsamples = 100_000_000\nbatch = 4\nunroll = 10\n"
        '[checkpoint]\nevery = 4000\n[strategy]\nname = "bmuf"\n'
    )
    return tmp_path


def cut_for_ever(
    cluster: EmulatedCluster, project: Path, *settings: str, **environment: str
) -> tuple[subprocess.Popen, float, list[str]]:
    """Train on all nodes, cut one off after the first checkpoint, wait for the end.

    Returns:
        mpirun, killed if it has not ended by itself; seconds from the cut until no rank
        is left; what mpilm said on stderr.
    """
    run, err = project / "run", project / "stderr"
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    command = [sys.executable, "-m", "mpilm", "train", str(project / "train.toml")]
    command += ["--out", str(run), *(f"--set={text}" for text in settings)]
    options = ("-x", "PYTHONPATH") if "PYTHONPATH" in os.environ else ()
    with err.open("w") as stream:
        process = cluster.start([*options, "-n", "4", *command], "node", stderr=stream)
    try:
        wait_for(lambda: complete_checkpoints(run / "checkpoints"), "checkpoint")
        cluster.cut(4)
        began_s = time.monotonic()
        wait_for(lambda: not ranks_on(cluster), "end of all ranks")
        seconds = time.monotonic() - began_s
        with suppress(subprocess.TimeoutExpired):
            process.wait(5.0)
    finally:
        cluster.mend(4)
        process.poll() is None and process.kill()
        process.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    said = err.read_text().splitlines()
    return process, seconds, [line for line in said if line.startswith("mpilm: ")]


def ranks_on(cluster: EmulatedCluster) -> list[str]:
    """Return the processes of ranks on the nodes."""
    found = []
    for node in range(1, cluster.nodes + 1):
        pids = ["ip", "netns", "pids", f"{cluster.prefix}n{node}"]
        for pid in run_text(pids).split():
            with suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                found += [pid] if b"mpilm" in command else []
    return found


def run_text(command: list[str]) -> str:
    """Return what a command prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout


def wait_for(ready: Callable[[], object], what: str, limit_s: float = 150.0) -> None:
    """Wait until `ready()` is true."""
    deadline_s = time.monotonic() + limit_s
    while not ready():
        assert time.monotonic() < deadline_s, f"no {what} after {limit_s} s"
        time.sleep(0.1)


@minutes
def test_mpirun_ends_all_when_a_node_is_cut_off_for_ever(
    cluster: EmulatedCluster, project: Path
) -> None:
    """By its own keepalive; its exit code is 0, so the summary tells."""
    keepalive = {"time": "5", "intvl": "2", "probes": "3"}
    process, seconds, said = cut_for_ever(
        cluster,
        project,
        **{f"PRTE_MCA_oob_tcp_keepalive_{k}": v for k, v in keepalive.items()},
    )
    assert 5.0 < seconds < 60.0
    assert process.returncode == 0
    assert not (project / "run" / "summary.json").exists()
    assert said == []  # nobody has waited for a minute
    assert load_shared(project / "run" / "checkpoints")["samples"] >= 4000


@minutes
def test_ranks_end_by_themselves_when_a_node_is_cut_off_for_ever(
    cluster: EmulatedCluster, project: Path
) -> None:
    """Also the one that is cut off, whom mpirun cannot reach."""
    _, seconds, said = cut_for_ever(cluster, project, "world.silence_s=8")
    assert 14.0 < seconds < 90.0
    first, *_, last = (line for line in said if line.startswith("mpilm: rank 0: "))
    newest = complete_checkpoints(project / "run" / "checkpoints")[0].name
    words = f"; the last checkpoint is {newest}, mpilm resume {project / 'run'} goes on"
    assert f"for rank 3 (no answer from rank 3{words} from it)" in first
    assert "rank 0: no answer from rank 3 for 8 s, waiting in or for" in last
    assert last.endswith(f"ends{words} from it")


def test_one_link_ten_times_slower_holds_up_who_waits_for_it(
    cluster: EmulatedCluster,
) -> None:
    names = ("allreduce", "gossip_bmuf", "adpsgd")
    even = lines(cluster, NODES, *names)
    cluster.shape(2, "10mbit")
    try:
        slow = lines(cluster, NODES, *names)
    finally:
        cluster.shape(2, "100mbit")
    for name in names:
        assert slow[name][1] < NEAR, (name, slow)
    assert slow["allreduce"][0] > 2.0 * even["allreduce"][0], (even, slow)


def test_two_ranks_exchange_at_the_speed_of_one_direction(
    cluster: EmulatedCluster,
) -> None:
    """Also if one of them begins later: neither direction waits for the other."""
    program = (sys.executable, str(Path(__file__).with_name("both_ways.py")))
    done = cluster.mpirun(["-n", "2", *program], map_by="node", limit_s=120.0)
    assert done.returncode == 0, done
    one_s, both_s = map(float, done.stdout.split())
    assert one_s > 0.075, "1 MB over 100 Mbit/s"
    assert both_s < 1.5 * one_s, done.stdout


def test_a_reduction_takes_little_more_than_its_bytes(
    cluster: EmulatedCluster,
) -> None:
    """By the ring that mpilm's rules ask for; unless the environment has its own."""
    program = (sys.executable, str(Path(__file__).with_name("reduction.py")))
    took_s = []
    for options in ((), ("-x", "OMPI_MCA_coll_tuned_use_dynamic_rules=0")):
        arguments = [*options, "-n", "3", *program]
        done = cluster.mpirun(arguments, map_by="node", limit_s=120.0)
        assert done.returncode == 0, done
        took_s.append(float(done.stdout))
    least_s = 2 * (2 / 3) * 8e6 / 1e8  # 4/3 of 1 MB, over 100 Mbit/s
    assert 0.95 * least_s < took_s[0] < 1.4 * least_s, took_s
    assert took_s[1] > 1.4 * took_s[0], took_s


def test_what_was_made_is_removed_also_after_an_error() -> None:
    if reason := why_not():
        pytest.skip(reason)
    with pytest.raises(ZeroDivisionError), EmulatedCluster(2) as made:
        prefix = made.prefix
        assert f"{prefix}v1" in links()
        _ = 1 / 0
    assert not any(name.startswith(prefix) for name in links())
    spaces = subprocess.run(
        ["ip", "netns", "list"], capture_output=True, text=True, check=True
    ).stdout
    assert prefix not in spaces


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes=0"], "0 nodes: 1 to 200 can be made"),
        (["--nodes=2", "--slots=0"], "0 ranks on a node: 1 or more"),
        (["--nodes=2", "--rate=0mbit"], "0mbit: no rate"),
        (["--nodes=2", "--rate=100"], "100: no rate"),
        (["--nodes=2", "--slow", "3=10mbit"], "node 3: there are 1 to 2"),
        (["--nodes=2", "--slow", "x"], "--slow x: write NODE=RATE"),
        (["--nodes=1", "--sweep"], "no nosuchprogram here"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str) -> None:
    tool = Path(__file__).parents[2] / "tools" / "emulated_cluster.py"
    if "--sweep" in words and (reason := why_not()):
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, str(tool), *words, "--", "nosuchprogram"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"emulated_cluster: {said}")
    assert done.stderr.count("\n") == 1


def test_a_sweep_runs_over_the_nodes(tmp_path: Path, capfd) -> None:
    """Two ranks over the network; predicted beside measured samples/s."""
    if reason := why_not():
        pytest.skip(reason)
    corpus = tmp_path / "corpus.h5"
    prepare_synthetic(corpus, vocab=30, tokens=20_000, seed=1, branching=4)
    (tmp_path / "train.toml").write_text(
        f'[data]\ncorpus = "{corpus}"\n[model]\nembed = 8\nhidden = 8\n'
        "[train]\nsamples = 1000\nbatch = 4\nunroll = 10\n"
    )
    for name, kind in (("real", "local"), ("virtual", "protocol")):
        text = f'config = "train.toml"\nrun = "{kind}"\nranks = [2]\n[vary]\n'
        text += '"strategy.name" = ["allreduce", "bmuf"]\n'
        (tmp_path / f"{name}.toml").write_text(text)
    tool = Path(__file__).parents[2] / "tools" / "emulated_cluster.py"
    over = [sys.executable, str(tool), "--nodes=2", "--rate=100mbit", "--sweep", "--"]
    mpilm = [sys.executable, "-m", "mpilm"]
    real, virtual = (str(tmp_path / name) for name in ("real", "virtual"))
    for prefix, out in ((over, real), ([], virtual)):
        words = [*prefix, *mpilm, "sweep", f"{out}.toml", "--out", out]
        done = subprocess.run(words, timeout=200, check=False)
        assert done.returncode == 0, capfd.readouterr()
    log = (tmp_path / "real" / "log" / "bmuf-r2.log").read_text()
    assert "2 ranks" in log
    capfd.readouterr()
    table = tmp_path / "both.csv"
    assert main(["status", real, "--predicted", virtual, "--csv", str(table)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split()[2:6] == ["samples/s", "predicted", "off", "by"]
    with open(table, newline="") as stream:
        for line, row in zip(lines[1:], csv.DictReader(stream), strict=False):
            measured = float(row["samples_per_s"])
            predicted = float(row["predicted_samples_per_s"])
            assert f"{predicted / measured - 1.0:+.0%}" in line
    assert main(["status", virtual, "--predicted", real]) == 2
    assert "was not simulated" in capfd.readouterr().err
