"""A SLURM cluster of several nodes on this one host, for tests.

munged, slurmctld and one slurmd for each node, all with their own ports, their own
folder and their own configuration: a cluster that this host may belong to is not
touched. Everything runs as the user who calls.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

from tests.cluster.project import wait_until

DAEMONS = ("munged", "slurmctld", "slurmd")
SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"

# Observed to work with Debian's SLURM 22.05. config_overrides: a node has the CPUs that
# are written here, whatever the host has. KillWait: seconds from SIGTERM to SIGKILL.
CONFIG = """
ClusterName=mpilm
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={port}
SlurmdPort={port_1}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=5
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{port_1}-{port_n}] \
CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def unavailable() -> str:
    """Return why there can be no test cluster here; "" if there can be one."""
    missing = [name for name in DAEMONS if not shutil.which(name, path=SBIN)]
    if missing:
        return f"no {', '.join(missing)} here: apt-get install slurm-wlm munge"
    configured = os.environ.get("SLURM_CONF") or "/etc/slurm/slurm.conf"
    if Path(configured).exists():
        return f"{configured}: this host belongs to a real SLURM cluster"
    return ""


def release() -> tuple[int, ...]:
    """Return the release of the SLURM that is installed, such as (22, 5)."""
    path = shutil.which("slurmctld", path=SBIN)
    assert path is not None
    shown = subprocess.check_output([path, "-V"], text=True)  # slurm-wlm 22.05.8
    return tuple(int(number) for number in shown.split()[-1].split(".")[:2])


class Cluster:
    """A running cluster; use it as a context manager.

    Args:
        nodes: how many there are; they are called n1, n2 and so on.
        cpus: of each node.
    """

    def __init__(self, nodes: int = 4, cpus: int = 2) -> None:
        self.nodes, self.cpus = nodes, cpus
        # a socket's path is short, so not below pytest's folders
        self.folder = Path(tempfile.mkdtemp(prefix="mpilm-slurm-"))
        # what eases mpirun in other tests must not ease it here
        foreign = ("OMP", "PRTE_", "SLURM_")
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(foreign)
        }
        self.environment["SLURM_CONF"] = f"{self.folder}/slurm.conf"
        # nor may ranks take the switch of an emulated cluster, which comes and goes:
        # seen once, an Allreduce over its address never ended
        self.environment["OMPI_MCA_btl_tcp_if_exclude"] = "127.0.0.1/8,10.77.0.0/16"
        self.daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the daemons and wait until all nodes are idle."""
        port = free_ports(self.nodes + 1)
        (self.folder / "slurm.conf").write_text(
            CONFIG.format(
                host=socket.gethostname(),
                user=getpass.getuser(),
                folder=self.folder,
                port=port,
                port_1=port + 1,
                port_n=port + self.nodes,
                nodes=self.nodes,
                cpus=self.cpus,
            )
        )
        # In a container slurmd may find no cgroups. Nothing here uses them, but 22.05
        # wants a plugin that loads; 23.11 and later can do without one.
        plugin = "disabled" if release() >= (23, 11) else "cgroup/v1"
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        names = {
            "socket": "munge.socket",
            "key-file": "munge.key",
            "pid-file": "munge.pid",
            "seed-file": "munge.seed",
            "log-file": "munge.log",
        }
        options = [f"--{option}={self.folder}/{name}" for option, name in names.items()]
        # --force: a warning instead of an error about running as root
        self.daemon("munged", "--foreground", "--force", *options)
        socket_path = self.folder / "munge.socket"
        wait_until(socket_path.exists, "munged", timeout_s=10)
        self.daemon("slurmctld", "-D")
        for node in range(1, self.nodes + 1):
            (self.folder / f"spool-n{node}").mkdir()
            self.daemon("slurmd", "-D", "-N", f"n{node}")
        try:
            wait_until(self.all_idle, "idle nodes", timeout_s=60)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def stop(self) -> None:
        """End all jobs, then the daemons, and remove the folder."""
        if any(daemon.poll() is None for daemon in self.daemons):
            user = f"--user={getpass.getuser()}"
            self.run("scancel", user, check=False)
            empty = lambda: not self.run("squeue", "-h", check=False).strip()  # noqa: E731
            wait_until(empty, "the end of all jobs", timeout_s=30)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def daemon(self, name: str, *options: str) -> None:
        """Start a daemon in the foreground, so that its process id is known."""
        path = shutil.which(name, path=SBIN)
        assert path is not None
        log = self.folder / f"{len(self.daemons)}-{name}.log"
        with log.open("wb") as output:
            self.daemons.append(
                subprocess.Popen(
                    [path, *options],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=self.environment,
                    start_new_session=True,
                )
            )

    def logs(self) -> str:
        """Return the last lines of every daemon."""
        tails = []
        for log in sorted(self.folder.glob("*-*.log")):
            lines = log.read_text(errors="replace").splitlines()[-8:]
            tails.append("\n".join([f"{log.name}:", *lines]))
        return "\n".join(tails)

    def run(self, *command: str, check: bool = True, **variables: str) -> str:
        """Return what a command of SLURM prints."""
        done = subprocess.run(
            command,
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        failed = f"{command}: exit code {done.returncode}, {done.stdout}{done.stderr}"
        assert done.returncode == 0 or not check, failed
        return done.stdout

    def all_idle(self) -> bool:
        """Return whether every node waits for work."""
        states = self.run("sinfo", "-h", "-N", "-o", "%T", check=False).split()
        return states == ["idle"] * self.nodes

    def submit(self, *command: str, folder: Path, **variables: str) -> str:
        """Submit a job from `folder`; return its id."""
        options = ("--parsable", f"--chdir={folder}")
        return self.run("sbatch", *options, *command, **variables).strip()

    def job(self, job: str, check: bool = True) -> dict[str, str]:
        """Return what SLURM says of a job: JobState, Restarts, ExitCode and so on."""
        shown = self.run("scontrol", "show", "job", "--oneliner", job, check=check)
        pairs = (word.partition("=") for word in shown.split())
        return {key: value for key, _, value in pairs}

    def wait_for(self, job: str, *states: str, timeout_s: float) -> dict[str, str]:
        """Return what SLURM says of a job once it is in one of `states`.

        Seen once in CI: while SLURM requeues a job, scontrol may fail without a word.
        """

        def arrived() -> dict[str, str] | None:
            found = self.job(job, check=False)
            return found if found.get("JobState") in states else None

        return wait_until(arrived, f"job {job} to be {' or '.join(states)}", timeout_s)


def free_ports(count: int) -> int:
    """Return the first of `count` consecutive TCP ports that nobody listens on."""
    for first in range(17000, 30000, 100):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, each in enumerate(sockets):
                each.bind(("", first + offset))
            return first
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise OSError(f"no {count} consecutive free ports")
