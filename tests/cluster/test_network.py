"""Training over real TCP between the nodes of an emulated cluster."""

from __future__ import annotations

import csv
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpilm.cli import main
from mpilm.data.synthetic import prepare_synthetic
from mpilm.strategies import STRATEGIES
from tools.emulated_cluster import EmulatedCluster, links, why_not

PROGRAM = (sys.executable, str(Path(__file__).with_name("over_tcp.py")))
NODES = 4
NEAR = 0.3  # of the first distance to the minimum: the final model's
AGREED = 0.4  # the farthest rank's own model's; ranks that do not talk end at 0.75

pytestmark = pytest.mark.timeout(300)


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


@pytest.mark.parametrize("name", ["allreduce", "gossip_bmuf", "adpsgd", "async_sgd"])
def test_a_node_that_is_cut_off_for_five_seconds_comes_back(
    cluster: EmulatedCluster, name: str
) -> None:
    """TCP holds what was sent: everybody waits or goes on, and nothing is lost."""

    def cut_and_mend() -> None:
        time.sleep(4.0)  # MPI has started, training goes on
        cluster.cut(3)
        time.sleep(5.0)
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
    assert seconds > 6.0, "it was over before the link was cut"


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
