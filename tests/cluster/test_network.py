"""Training over real TCP between the nodes of an emulated cluster."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

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
