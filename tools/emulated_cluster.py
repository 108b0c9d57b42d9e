"""A cluster on one machine: nodes in network namespaces, real TCP, shaped links.

    python tools/emulated_cluster.py --nodes 4 --rate 100mbit -- \\
        -n 4 .venv/bin/mpilm train jobs/configs/demo.toml --out runs/x

    python tools/emulated_cluster.py --nodes 4 --rate 100mbit --sweep -- \\
        mpilm sweep sweep.toml --out runs/100mbit

    with EmulatedCluster(4, rate="100mbit") as cluster:
        cluster.mpirun(["-n", "4", "mpilm", "train", ...])
        cluster.cut(2)

Every node is a network namespace with a host name of its own and one Ethernet link to a
switch (a bridge). A link has the declared rate both ways (tc's token bucket filter).
Ranks of one node reach each other through shared memory, ranks of different nodes by
TCP over these links: two levels, as on a cluster. mpirun runs outside, on an address
of the switch, and starts its daemons inside the namespaces as it would by ssh.

It needs root and Debian's iproute2 (`why_not` says what is missing). Everything it
makes carries its prefix in the name and is removed at the end, also after an error;
what a killed process left behind is removed by the next one. Nothing else is touched.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import cycle
from pathlib import Path

BIN = Path(sys.executable).parent
# mpi<process><letter>n<node>: a namespace; v<node>: its link; br: the switch. Linux
# names links in at most 15 characters.
NAME = re.compile(r"mpi(\d+)[a-z](n\d+|v\d+|br)")
LETTERS = cycle("abcdefghijklmnopqrstuvwxyz")  # of the clusters of one process
# A token bucket lets a burst pass at once after a pause: 2 ms of the rate, for a model
# must not pass for nothing. Shorter at 1 Gbit/s and TCP does not reach the rate
# (measured: 0.4 of it with 32 KB); at least ten packets.
BURST_S, BURST_BYTES = 2e-3, 16_000
MOST_NODES = 200  # a network of 10.77.x has 254 addresses
RATE = re.compile(r"(\d+(?:\.\d+)?)([kmg])bit")
# The switch drops what waits longer in front of a node's link. A host drops nothing at
# its own end: its queue is 1,000 packets of up to 64 KB, and TCP keeps it short. With
# 50 ms there, too, ranks that sent to several others at 10 Mbit/s lost a third of it.
SWITCH_QUEUE = ("latency", "50ms")
HOST_QUEUE = ("limit", "64mb")

AGENT = """\
#!/bin/sh
# mpirun calls: AGENT [options] HOST COMMAND...
while [ "${{1#-}}" != "$1" ]; do shift; done
node=${{1##*.}}; shift
exec ip netns exec {prefix}n$node unshare --uts sh -c "hostname node$node; $*"
"""


def why_not() -> str:
    """Return why there can be no emulated cluster here; "" if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc", "unshare"):
        if shutil.which(tool) is None:
            return f"{tool} is missing: apt-get install iproute2 util-linux"
    probe = f"mpi{os.getpid()}{next(LETTERS)}n0"
    made = subprocess.run(
        ["ip", "netns", "add", probe], capture_output=True, text=True, check=False
    )
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    run("ip", "netns", "del", probe)
    return ""


def run(*command: str) -> str:
    """Return what a command printed.

    Raises:
        RuntimeError: it failed; one line.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def burst(rate: str) -> str:
    """Return the burst of a token bucket, as tc writes it.

    >>> burst("1gbit"), burst("10mbit")
    ('250000b', '16000b')

    Raises:
        RuntimeError: it is no rate.
    """
    match = RATE.fullmatch(rate)
    if match is None or not float(match[1]):
        raise RuntimeError(f"{rate}: no rate; 100mbit, 1.5gbit and the like are")
    bits = float(match[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[match[2]]
    return f"{max(BURST_BYTES, int(bits / 8 * BURST_S))}b"


def slow_link(text: str) -> tuple[int, str]:
    """Return a node and the rate of its link.

    >>> slow_link("3=10mbit")
    (3, '10mbit')

    Raises:
        RuntimeError: it is no such pair.
    """
    node, _, rate = text.partition("=")
    if not node.isdecimal() or not rate:
        raise RuntimeError(f"--slow {text}: write NODE=RATE, as in 3=10mbit")
    return int(node), rate


class EmulatedCluster:
    """Nodes 1 to `nodes`; a context manager.

    Args:
        nodes: how many, at most 200.
        rate: of every link, as tc writes it: "100mbit", "1gbit"; "": no limit.
        rates: of single nodes: {3: "10mbit"}.
        slots: ranks that mpirun may start on each node.

    Raises:
        RuntimeError: it cannot be made here.
    """

    def __init__(
        self,
        nodes: int,
        *,
        rate: str = "",
        rates: Mapping[int, str] | None = None,
        slots: int = 1,
    ) -> None:
        self.nodes, self.rate, self.slots = nodes, rate, slots
        self.rates = dict(rates or {})
        if not 1 <= nodes <= MOST_NODES:
            raise RuntimeError(f"{nodes} nodes: 1 to {MOST_NODES} can be made")
        if slots < 1:
            raise RuntimeError(f"{slots} ranks on a node: 1 or more")
        for node in self.rates.keys() - set(self._numbers()):
            raise RuntimeError(f"node {node}: there are 1 to {nodes}")
        for each in filter(None, (rate, *self.rates.values())):
            burst(each)
        self.prefix = f"mpi{os.getpid()}{next(LETTERS)}"
        self.subnet = ""
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> EmulatedCluster:
        if reason := why_not():
            raise RuntimeError(reason)
        remove_left_over()
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _make(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix=self.prefix)
        self.subnet = free_subnet()
        bridge = f"{self.prefix}br"
        run("ip", "link", "add", bridge, "type", "bridge")
        run("ip", "addr", "add", f"{self.subnet}.254/24", "dev", bridge)
        run("ip", "link", "set", bridge, "up")
        for node in range(1, self.nodes + 1):
            space, link = f"{self.prefix}n{node}", f"{self.prefix}v{node}"
            inside = ("ip", "-n", space)
            run("ip", "netns", "add", space)
            run(
                *("ip", "link", "add", link, "type", "veth"),
                *("peer", "name", "eth0", "netns", space),
            )
            run("ip", "link", "set", link, "master", bridge, "up")
            run(*inside, "addr", "add", f"{self.subnet}.{node}/24", "dev", "eth0")
            run(*inside, "link", "set", "eth0", "up")
            run(*inside, "link", "set", "lo", "up")
            self.shape(node, self.rates.get(node, self.rate))
        agent = Path(self._folder.name) / "agent.sh"
        agent.write_text(AGENT.format(prefix=self.prefix))
        agent.chmod(0o755)
        hosts = (f"{self.subnet}.{n} slots={self.slots}" for n in self._numbers())
        (agent.parent / "hosts").write_text("".join(f"{line}\n" for line in hosts))

    def _numbers(self) -> range:
        return range(1, self.nodes + 1)

    def shape(self, node: int, rate: str) -> None:
        """Give the link of a node a rate, both ways; "": none."""
        ends = (
            (SWITCH_QUEUE, f"{self.prefix}v{node}"),
            (HOST_QUEUE, "eth0", f"{self.prefix}n{node}"),
        )
        for queue, device, *space in ends:
            tc = ("ip", "netns", "exec", *space, "tc") if space else ("tc",)
            subprocess.run(
                [*tc, "qdisc", "del", "dev", device, "root"],
                stderr=subprocess.DEVNULL,
                check=False,
            )  # there may be none
            if rate:
                run(
                    *(*tc, "qdisc", "add", "dev", device, "root", "tbf"),
                    *("rate", rate, "burst", burst(rate), *queue),
                )

    def cut(self, node: int) -> None:
        """Take the link of a node down: nothing reaches it, nobody is told."""
        run("ip", "link", "set", f"{self.prefix}v{node}", "down")

    def mend(self, node: int) -> None:
        """Put the link of a node up again."""
        run("ip", "link", "set", f"{self.prefix}v{node}", "up")

    @property
    def environment(self) -> dict[str, str]:
        """What mpirun needs in its environment."""
        assert self._folder is not None, "not inside the with block"
        return {
            **os.environ,
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "OMP_NUM_THREADS": "1",
            "PRTE_MCA_plm_ssh_agent": f"{self._folder.name}/agent.sh",
            "PRTE_MCA_prte_if_include": f"{self.subnet}.0/24",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        }

    def command(self, arguments: Sequence[str], map_by: str = "slot") -> list[str]:
        """Return the command that starts ranks on the nodes.

        Args:
            arguments: of mpirun: ["-n", "4", "mpilm", "train", ...].
            map_by: "slot" fills one node after the other, "node" deals ranks out.
        """
        assert self._folder is not None, "not inside the with block"
        network = f"{self.subnet}.0/24"
        return [
            str(BIN / "mpirun"),
            *("--hostfile", f"{self._folder.name}/hosts"),
            *("--map-by", map_by, "--bind-to", "none"),
            *("--mca", "pml", "ob1", "--mca", "btl", "tcp,self,sm"),
            *("--mca", "btl_tcp_if_include", network),
            *arguments,
        ]

    def start(
        self, arguments: Sequence[str], map_by: str = "slot", **options: object
    ) -> subprocess.Popen:
        """Start ranks on the nodes; options as of Popen."""
        return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
            self.command(arguments, map_by),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            **options,
        )

    def mpirun(
        self,
        arguments: Sequence[str],
        *,
        map_by: str = "slot",
        limit_s: float = 300.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run ranks on the nodes to their end; return how it went.

        Raises:
            subprocess.TimeoutExpired: they took longer than `limit_s`; they are ended.
        """
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = self.start(arguments, map_by, **pipes)
        try:
            out, err = process.communicate(timeout=limit_s)
        except BaseException:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=10.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def close(self) -> None:
        """Remove what was made: processes inside, namespaces, links, the bridge."""
        remove(self.prefix)
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def remove(prefix: str) -> None:
    """End what runs in the namespaces of a prefix; remove them and the links."""
    for line in run("ip", "netns", "list").splitlines():
        name = line.split()[0]
        if NAME.fullmatch(name) and name.startswith(f"{prefix}n"):
            for pid in run("ip", "netns", "pids", name).split():
                if int(pid) > 1:
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
            run("ip", "netns", "del", name)  # and the link that ends in it
    for name in links():
        if NAME.fullmatch(name) and name.startswith((f"{prefix}v", f"{prefix}br")):
            subprocess.run(
                ["ip", "link", "del", name], stderr=subprocess.DEVNULL, check=False
            )


def links() -> list[str]:
    """Return the names of this machine's links."""
    lines = run("ip", "-o", "link", "show").splitlines()
    return [line.split(": ")[1].split("@")[0] for line in lines]


def remove_left_over() -> None:
    """Remove what processes that are gone have left."""
    spaces = [line.split()[0] for line in run("ip", "netns", "list").splitlines()]
    found = (NAME.fullmatch(name) for name in (*spaces, *links()))
    prefixes = {(match[1], match[0].removesuffix(match[2])) for match in found if match}
    for pid, prefix in prefixes:
        if not Path(f"/proc/{pid}").exists():
            remove(prefix)


def free_subnet() -> str:
    """Return the first three numbers of a private network that nothing here uses."""
    used = run("ip", "-o", "-4", "addr", "show")
    for number in range(256):
        if f" 10.77.{number}." not in used:
            return f"10.77.{number}"
    raise RuntimeError("no free network in 10.77.0.0/16")


def main() -> int:
    """Run a command of mpirun on an emulated cluster."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--rate", default="", help="of every link: 100mbit")
    parser.add_argument("--slots", type=int, default=1, help="ranks on a node")
    parser.add_argument(
        "--slow", nargs="*", default=[], metavar="NODE=RATE", help="3=10mbit"
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="run a command that starts mpirun itself, by LAUNCH: mpilm sweep",
    )
    parser.add_argument("arguments", nargs="+", help="of mpirun, after --")
    given = parser.parse_args()
    try:
        rates = dict(map(slow_link, given.slow))
        with EmulatedCluster(
            given.nodes, rate=given.rate, rates=rates, slots=given.slots
        ) as cluster:
            if given.sweep:
                launch = {"LAUNCH": shlex.join(cluster.command([]))}
                command = list(given.arguments)
                environment = {**cluster.environment, **launch}
                return subprocess.run(command, env=environment, check=False).returncode
            return cluster.start(given.arguments).wait()
    except RuntimeError as error:
        print(f"emulated_cluster: {error}", file=sys.stderr)
        return 2
    except FileNotFoundError as error:
        print(f"emulated_cluster: no {error.filename} here", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
