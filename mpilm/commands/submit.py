"""`mpilm submit`."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mpilm.commands.queued import Submitted, make, require_free
from mpilm.convert import counts_in
from mpilm.errors import ConfigError, WorldError, say

if TYPE_CHECKING:
    from mpilm.config import Config

JOBS = Path(__file__).parents[1] / "jobs"
SCRIPTS = {"slurm": JOBS / "slurm/train.sbatch", "pbs": JOBS / "pbs/train.pbs"}
COMMANDS = {"slurm": "sbatch", "pbs": "qsub"}
SUBMIT_S = 60.0  # a scheduler that has not answered by then is not well


@dataclass(frozen=True)
class Size:
    """What a job asks of each node, and how many nodes.

    Divides ranks over nodes, equally.

    >>> Size.of(16, ranks_per_node=4, gpus_per_node=4)
    Size(nodes=4, ranks_per_node=4, gpus_per_node=4)
    >>> Size.of(2, ranks_per_node=4, gpus_per_node=4)
    Size(nodes=1, ranks_per_node=2, gpus_per_node=2)
    """

    nodes: int
    ranks_per_node: int
    gpus_per_node: int

    @classmethod
    def of(cls, ranks: int, *, ranks_per_node: int, gpus_per_node: int) -> Size:
        """Return the size of a job of so many ranks.

        Raises:
            ConfigError: they do not fill whole nodes.
        """
        if ranks <= ranks_per_node:
            return cls(1, ranks, min(gpus_per_node, ranks))
        if ranks % ranks_per_node:
            raise ConfigError(
                f"--ranks {ranks}: is no multiple of --ranks-per-node {ranks_per_node}"
            )
        return cls(ranks // ranks_per_node, ranks_per_node, gpus_per_node)

    @property
    def ranks(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Job:
    """One job: what the script reads from the environment, and the command.

    variables  CONFIG, RUN and so on
    command    of the scheduler; the script is its last word
    """

    variables: dict[str, str]
    command: list[str]

    def __str__(self) -> str:
        pairs = [f"{k}={shlex.quote(v)}" for k, v in self.variables.items()]
        return " ".join([*pairs, shlex.join(self.command)])


def submit(
    config: tyro.conf.Positional[Path],
    /,
    *,
    time: str,
    warn: int = 120,
    scheduler: Literal["auto", "slurm", "pbs"] = "auto",
    nodes: int = 1,
    ranks_per_node: Annotated[int, tyro.conf.arg(name="ranks-per-node")] = 1,
    gpus_per_node: Annotated[int, tyro.conf.arg(name="gpus-per-node")] = 0,
    cpus_per_rank: Annotated[int, tyro.conf.arg(name="cpus-per-rank")] = 1,
    ranks: str = "",
    out: Path | None = None,
    set_: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set")
    ] = (),
    env: Path | None = None,
    queue: str = "",
    account: str = "",
    after: str = "",
    chain: bool = False,
    option: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    dry_run: Annotated[bool, tyro.conf.arg(name="dry-run")] = False,
) -> int:
    """Check a configuration, then submit it to SLURM or PBS; print the job's number.

    The job writes a checkpoint before its time limit and goes on by itself until the
    run is done (jobs/README.md). With --ranks there is one job, and one run folder, for
    each number of ranks: a scaling sweep. Nothing is submitted if a run is at work in
    one of the folders, or a job in the queue is for it.

    Args:
        config: TOML file
        time: limit of the job, hours:minutes:seconds
        warn: seconds before it at which the ranks stop and write a checkpoint
        scheduler: auto: the one whose command is on PATH
        nodes: of the job
        ranks_per_node: MPI ranks on each node
        gpus_per_node: GPUs on each node; one rank per GPU is best
        cpus_per_rank: cores of each rank
        ranks: numbers of ranks in the place of --nodes, such as 4,8,16,32
        out: run folder; runs/NAME of the configuration if not given; a sweep adds -r4
        set_: override a setting: section.key=value
        env: file that the job sources first; the virtual environment of this mpilm if
            not given
        queue: SLURM's partition, PBS's queue
        account: to charge
        after: number of a job to wait for, whatever becomes of it
        chain: each job of a sweep waits for the one before
        option: one more word for sbatch or qsub, such as --option=--exclusive
        dry_run: print the commands and submit nothing
    """
    from mpilm.config import read_config

    kind = find_scheduler(scheduler, dry_run=dry_run)
    counts = {"--nodes": nodes, "--ranks-per-node": ranks_per_node}
    counts["--cpus-per-rank"] = cpus_per_rank
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name} {value}: must be 1 or more")
    if gpus_per_node < 0:
        raise ConfigError(f"--gpus-per-node {gpus_per_node}: must be 0 or more")
    limit = time_of(time)
    require_time(limit, warn)
    per_node = {"ranks_per_node": ranks_per_node, "gpus_per_node": gpus_per_node}
    if ranks:
        sizes = [Size.of(number, **per_node) for number in counts_in("--ranks", ranks)]
    else:
        sizes = [Size(nodes, **per_node)]
    settings = read_config(config, set_)
    check_run(settings, [size.ranks for size in sizes])
    for note in settings.notes:
        say(f"note: {note}")
    threads = settings.train.threads
    if threads < cpus_per_rank and not gpus_per_node:
        say(
            f"note: a rank computes with {threads} of its {cpus_per_rank} cores: --set"
            f" train.threads={cpus_per_rank}"
        )
    folder = out or Path("runs") / config.stem
    runs = [folder.with_name(f"{folder.name}-r{s.ranks}") for s in sizes]
    if not ranks:
        runs = [folder]
    for one in runs:
        if one.exists() and not one.is_dir():
            raise ConfigError(f"--out {one}: is no folder")
        require_free(one, after=after)
    previous = after
    for size, one in zip(sizes, runs, strict=True):
        if (one / "summary.json").exists():
            say(f"note: {one} holds a run that has ended: the job goes on only to more")
        job = build(
            kind,
            size,
            variables=script_variables(config, one, set_, env),
            time=limit,
            warn=warn,
            cpus_per_rank=cpus_per_rank,
            queue=queue,
            account=account,
            after=previous,
            options=option,
        )
        if dry_run:
            print(job)
            identifier = f"JOB_OF_{size.ranks}_RANKS"
        else:
            make(one)
            identifier = start(job)
            Submitted(kind, identifier).write(one)
            say(f"{size.ranks} ranks -> {one}, job {identifier}")
            print(identifier)
        previous = identifier if chain else after
    return 0


def find_scheduler(name: str, *, dry_run: bool) -> str:
    """Return "slurm" or "pbs".

    Raises:
        WorldError: it is not here, or it is not clear which one.
    """
    here = [kind for kind, command in COMMANDS.items() if shutil.which(command)]
    if name != "auto":
        if name not in here and not dry_run:
            raise WorldError(f"--scheduler {name}: no {COMMANDS[name]} on PATH")
        return name
    if len(here) == 1:
        return here[0]
    found = "both sbatch and qsub are" if here else "neither sbatch nor qsub is"
    raise WorldError(f"{found} on PATH: say --scheduler slurm or pbs")


def time_of(text: str) -> str:
    """Return a time limit as both schedulers read it.

    >>> time_of("8:00:00"), time_of("30:00"), time_of("90:00")
    ('8:00:00', '0:30:00', '1:30:00')

    Raises:
        ConfigError: it is no such time, or a bare number: minutes to SLURM, but
            seconds to PBS.
    """
    parts = text.split(":")
    fine = 2 <= len(parts) <= 3 and all(part.isdecimal() for part in parts)
    if not fine or not any(map(int, parts)) or any(int(p) > 59 for p in parts[1:]):
        raise ConfigError(f"--time {text}: write hours:minutes:seconds, as in 8:00:00")
    *hours, minutes, seconds = parts
    whole, rest = divmod(int(minutes), 60)
    return f"{int(hours[0]) if hours else whole}:{rest:02}:{int(seconds):02}"


def require_time(limit: str, warn: int) -> None:
    """Raise unless a job has time to train before it is warned of its limit.

    Raises:
        ConfigError: one line that says what would do.
    """
    hours, minutes, seconds = map(int, limit.split(":"))
    limit_s = 3600 * hours + 60 * minutes + seconds
    if warn < 1:
        raise ConfigError(f"--warn {warn}: must be 1 or more seconds")
    if limit_s <= warn:
        raise ConfigError(
            f"--time {limit}: the ranks stop --warn {warn} s before it, so nothing is"
            " left to train; a longer limit, or a smaller --warn"
        )


def check_run(config: Config, numbers: list[int]) -> None:
    """Raise unless the run can begin on each of these numbers of ranks.

    Raises:
        ConfigError, DataError: one line; what the job would have said hours later.
    """
    from mpilm.train.task import open_task

    task = open_task(config.data.corpus, config.model)
    for number in numbers:
        config.faults.check(number)
        for rank in {0, number - 1}:
            place: Any = SimpleNamespace(rank=rank, size=number)
            task.batches(config, place, lockstep=True)
            task.require_evaluated(config.train, rank, number)


def script_variables(
    config: Path, run: Path, settings: tuple[str, ...], env: Path | None
) -> dict[str, str]:
    """Return what the job scripts read from their environment.

    Raises:
        ConfigError: a setting holds a blank, or the file to source is missing.
    """
    for setting in settings:
        if len(setting.split()) != 1:
            raise ConfigError(
                f"--set {setting}: job scripts cannot pass blanks; write it into"
                f" {config}"
            )
    if env is not None and not env.is_file():
        raise ConfigError(f"--env {env}: no such file")
    activate = Path(sys.prefix) / "bin" / "activate"
    if env is None and sys.prefix != sys.base_prefix and activate.is_file():
        env = activate
    variables = {"CONFIG": str(config), "RUN": str(run)}
    if settings:
        variables["SETTINGS"] = " ".join(settings)
    if env is not None:
        variables["MPILM_ENV"] = str(env)
    return variables


def build(
    scheduler: str,
    size: Size,
    *,
    variables: Mapping[str, str],
    time: str,
    warn: int,
    cpus_per_rank: int = 1,
    queue: str = "",
    account: str = "",
    after: str = "",
    options: tuple[str, ...] = (),
) -> Job:
    """Return the job of a scheduler."""
    name = Path(variables["RUN"]).name
    if scheduler == "slurm":
        command = ["sbatch", "--parsable", f"--job-name={name}"]
        command += [f"--nodes={size.nodes}", f"--ntasks-per-node={size.ranks_per_node}"]
        command += [f"--cpus-per-task={cpus_per_rank}"]
        if size.gpus_per_node:
            command += [f"--gpus-per-node={size.gpus_per_node}"]
        command += [f"--time={time}", f"--signal=B:USR1@{warn}", "--export=ALL"]
        command += [f"--output={variables['RUN']}/job-%j.log"]
        command += [f"--partition={queue}"] if queue else []
        command += [f"--account={account}"] if account else []
        command += [f"--dependency=afterany:{after}"] if after else []
    else:
        command = ["qsub", "-N", pbs_name(name)]
        ncpus = size.ranks_per_node * cpus_per_rank
        select = f"select={size.nodes}:ncpus={ncpus}:mpiprocs={size.ranks_per_node}"
        if size.gpus_per_node:
            select += f":ngpus={size.gpus_per_node}"
        command += ["-l", select, "-l", "place=scatter", "-l", f"walltime={time}"]
        command += ["-o", f"{variables['RUN']}/"]
        command += ["-q", queue] if queue else []
        command += ["-A", account] if account else []
        command += ["-W", f"depend=afterany:{after}"] if after else []
        variables = {**variables, "WALLTIME": time, "WARN": str(warn)}
        settings = variables.get("SETTINGS", "")
        if (encoded := without_quotes(settings)) != settings:
            variables |= {"SETTINGS": encoded, "PERCENT": "1"}
        # by name: qsub takes the values from its environment, commas and all
        command += ["-v", ",".join(variables)]
    return Job(dict(variables), [*command, *options, str(SCRIPTS[scheduler])])


def without_quotes(text: str) -> str:
    """Return a text without what PBS garbles in a variable; train.pbs reads it back.

    OpenPBS 23.06 was seen to make a backslash of a quote, and two of one.

    >>> without_quotes('strategy.name="bmuf"')
    'strategy.name=%22bmuf%22'
    """
    return re.sub(r"""[%"'\\]""", lambda found: f"%{ord(found[0]):02X}", text)


def pbs_name(name: str) -> str:
    """Return a name as PBS takes it: 15 characters, the first one a letter.

    >>> pbs_name("2x"), pbs_name("bmuf,period=20-slow=no-r4")
    ('r2x', 'bmuf_period_20-')
    """
    name = name if name[:1].isalpha() else f"r{name}"
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", name)[:15]


def start(job: Job) -> str:
    """Submit a job; return its number.

    Raises:
        WorldError: the scheduler refuses, or does not answer.
    """
    name = job.command[0]
    try:
        done = subprocess.run(
            job.command,
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=SUBMIT_S,
            env={**os.environ, **job.variables},
        )
    except subprocess.TimeoutExpired:
        raise WorldError(f"{name}: no answer within {SUBMIT_S:.0f} s") from None
    except OSError as error:
        raise WorldError(f"{name}: {error.strerror}") from None
    if done.returncode:
        said, _, _ = (done.stderr or done.stdout).partition("\nusage:")  # of qsub
        lines = said.strip().splitlines()
        raise WorldError("; ".join(lines) or f"{name}: exit code {done.returncode}")
    # sbatch --parsable: "123" or "123;cluster"
    return done.stdout.strip().split(";")[0]
