"""Who is at work in a run folder: one run at a time.

    RUN/owner.json   host, boot, pid, started, job, since, token; there as long as a
                     run is in the folder

Rank 0 holds it for all ranks: it has the file open with a lock (flock) and touches it
every BEAT_S. Another start refuses the folder, with one line that names the owner,
unless the owner is dead:

    lock held                        alive
    lock free, same boot             dead: the kernel frees the lock of a dead process
    no locks here, same boot         dead if no process `pid` began at `started`
    lock free or none, other boot    dead if the file was not touched for DEAD_S

The lock alone would not do: on some file systems there is none (flock fails), or it
holds on one host only. Times of the last kind are both the file system's own, so hosts
need not have the same clock. A dead owner's file is overwritten. An owner that was only
taken for dead (a suspended process on another host) finds that out before it writes
its next checkpoint, and ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mpilm.errors import CheckpointError
from mpilm.storage.files import reason, write_fully

NAME = "owner.json"
# Chosen, not tuned: a node's clients of NFS and Lustre see a touch after 60 s at most.
BEAT_S = 20.0
DEAD_S = 120.0
SETTLE_S = 1.0  # without locks: for two starts at the same moment to see each other
LENGTH = 1000  # of the file, more than any record

JOBS = {"SLURM_JOB_ID": "SLURM job", "PBS_JOBID": "PBS job"}


@dataclass(frozen=True)
class Record:
    """What owner.json says.

    host     name of the machine
    boot     another one for each start of a machine's kernel; "": not known
    pid      of rank 0
    started  when that process began, clock ticks since the boot
    job      of the scheduler, such as "SLURM job 17"; "": none
    since    date and time, UTC
    token    another one for each run
    """

    host: str
    boot: str
    pid: int
    started: int
    job: str
    since: str
    token: str

    @classmethod
    def here(cls) -> Record:
        """Return the record of this process."""
        named = (
            f"{what} {os.environ[k]}" for k, what in JOBS.items() if k in os.environ
        )
        return cls(
            host=socket.gethostname(),
            boot=boot(),
            pid=os.getpid(),
            started=started(os.getpid()),
            job=next(named, ""),
            since=time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
            token=uuid.uuid4().hex,
        )

    @classmethod
    def read(cls, path: Path) -> Record | None:
        """Return what stands in a file; None: nothing that can be understood."""
        try:
            return cls(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    @property
    def is_of_here(self) -> bool:
        """Whether it was written since this machine's kernel has started."""
        return bool(self.boot) and self.boot == boot()

    @property
    def is_there(self) -> bool:
        """Whether its process is there; to be asked where it is of here."""
        return self.started == started(self.pid)

    @property
    def process(self) -> str:
        """Which process of which machine it is."""
        return f"{self.pid}-{self.started}@{self.host}"

    def to_bytes(self) -> bytes:
        """Return it as JSON, always as long: of two written at once one stands."""
        return json.dumps(asdict(self)).ljust(LENGTH).encode()

    def __str__(self) -> str:
        job = f", {self.job}" if self.job else ""
        return f"pid {self.pid} on {self.host}{job}, since {self.since} UTC"


def is_owned_by(folder: Path, process: str) -> bool:
    """Return whether a process, see `Record.process`, owns a run folder, and lives.

    Of one on another host that has died it is said until the next owner has come.
    """
    found = Record.read(folder / NAME)
    if found is None or found.process != process:
        return False
    return found.is_there if found.is_of_here else True


class Owner:
    """The ownership of a run folder, from `take` to `release`.

    Args:
        folder: the run folder, which is there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / NAME
        self.record = Record.here()
        self._descriptor = -1
        self._end = threading.Event()
        self._life = threading.Thread(target=self._beat, name=NAME, daemon=True)

    def take(self) -> Owner:
        """Own the folder; return self.

        Raises:
            CheckpointError: another run owns it, or the file cannot be written.
        """
        try:
            has_lock = self._open()
            self._require_free(has_lock)
            os.ftruncate(self._descriptor, 0)
            write_fully(self._descriptor, self.record.to_bytes(), 0)
            if not has_lock:
                time.sleep(SETTLE_S)
                if Record.read(self.path) != self.record:
                    raise self._in_use()
        except OSError as error:
            self._close()
            raise CheckpointError(
                f"{self.path}: cannot write: {reason(error)}"
            ) from None
        except BaseException:
            self._close()
            raise
        self._life.start()
        return self

    def require(self) -> None:
        """Raise unless this run still owns the folder.

        Raises:
            CheckpointError: another one has taken it over.
        """
        found = Record.read(self.path)
        if found != self.record:
            by = f"taken over by {found}" if found else f"taken away: {NAME} is gone"
            raise CheckpointError(f"{self.folder}: was {by}; this run writes no more")

    def release(self) -> None:
        """Let another run have the folder. May be called again."""
        if self._descriptor >= 0:
            if Record.read(self.path) == self.record:
                with suppress(OSError):
                    self.path.unlink()
            self._close()

    def _open(self) -> bool:
        """Open the file and lock it; return whether there are locks here."""
        while True:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._in_use() from None
            except OSError:
                return False
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._descriptor), os.stat(self.path)):
                    return True
            os.close(self._descriptor)  # the owner removed it just before: once more

    def _require_free(self, has_lock: bool) -> None:
        """Raise if the record in the file is of a run that may be alive."""
        found = Record.read(self.path)
        if found is None:
            return  # a new file, or a run that died before it had written its name
        if found.is_of_here:
            if not has_lock and found.is_there:
                raise self._in_use()
            return
        silent_s = self._now_s() - os.fstat(self._descriptor).st_mtime
        if silent_s < DEAD_S:
            raise self._in_use(
                f"; its last sign of life was {max(silent_s, 0.0):.0f} s ago: if it is"
                f" dead, start again when that is {DEAD_S:.0f} s, or remove {self.path}"
            )

    def _now_s(self) -> float:
        """Return the time by the clock of the file system."""
        probe = self.path.with_name(f"{NAME}.{self.record.token}")
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _in_use(self, more: str = "") -> CheckpointError:
        found = None
        for _ in range(10):  # it may be about to write its name
            if found := Record.read(self.path):
                break
            time.sleep(0.05)
        who = found or "a run that has just begun"
        more = more or "; two runs cannot share a folder: take another --out"
        return CheckpointError(f"{self.folder}: is in use by {who}{more}")

    def _beat(self) -> None:
        while not self._end.wait(BEAT_S):
            with suppress(OSError):
                os.utime(self._descriptor)

    def _close(self) -> None:
        self._end.set()
        if self._life.is_alive():
            self._life.join(SETTLE_S)  # a file system that hangs holds it up
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def boot() -> str:
    """Return what tells this start of this machine from all others; "": not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def started(pid: int) -> int:
    """Return when a process began, clock ticks since the boot; -1: there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return -1
    # "pid (name) state ppid ...": the name may hold anything; the time is field 22
    state, *fields = text.rpartition(")")[2].split()
    return -1 if state in {"Z", "X"} else int(fields[18])
