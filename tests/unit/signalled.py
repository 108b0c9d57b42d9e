"""Commands of `mpilm` in processes of their own, signalled at a chosen moment.

    with Warm() as warm:
        ended = warm.run(["export", "runs/x", "--out", "m.safetensors"], event=2)

A process that has loaded torch forks a child for each command. Moments: the so-many-th
time that Python opens a file for writing, renames, removes or makes one (an audit hook
sees it); a share of the command's CPU time, for what HDF5 does; a call of a method. A
second signal comes a moment later, or, where the first one ended the command, at the
next of these events: while it tidies up.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir"}
LIMIT_S = 120
AGAIN_S = 0.7  # between a first and a second SIGINT; more than an echo (signals.py)


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    code     its exit code, negative: the signal that ended it
    said     what it printed on stderr
    events   changes of files, as far as Python made them
    seconds  of CPU
    """

    code: int
    said: str
    events: int = 0
    seconds: float = 0.0


class Warm:
    """A process with everything loaded that runs commands in children."""

    def __enter__(self) -> Warm:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.unit.signalled"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate("")

    def run(
        self,
        words: Sequence[object],
        inside: Path,
        *,
        numbers: Sequence[int] = (signal.SIGINT,),
        event: int = 0,
        seconds: float = 0.0,
        call: tuple[str, int] = ("", 0),
    ) -> Ended:
        """Run a command; signal it at its so-many-th event, CPU second or call.

        Args:
            inside: only what happens in this folder is an event.
            numbers: signals, one after the other.
            event: 0: at none.
            seconds: 0: at none.
            call: "module:Class.method" and which call of it.
        """
        request = {"words": [str(w) for w in words], "inside": str(inside)}
        request |= {"numbers": [int(n) for n in numbers], "call": call}
        request |= {"event": event, "seconds": seconds}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))


def in_child(request: dict[str, Any], screen: Path) -> int:
    """Be the child: run the command; return its exit code."""
    from mpilm.cli import main

    num_events, began_s = 0, time.process_time()

    ahead, num_sent = list(request["numbers"]), 0

    def strike(*_: object) -> None:
        nonlocal num_sent
        while ahead:
            time.sleep(AGAIN_S if num_sent else 0.0)
            num_sent += 1
            os.kill(os.getpid(), ahead.pop(0))

    def seen(name: str, arguments: tuple[object, ...]) -> None:
        nonlocal num_events
        if name not in EVENTS or not str(arguments[0]).startswith(request["inside"]):
            return
        if name == "open" and not int(arguments[2]) & (os.O_WRONLY | os.O_RDWR):
            return
        num_events += 1
        if num_sent and ahead:
            os.kill(os.getpid(), ahead.pop(0))
        elif num_events == request["event"]:
            strike()

    where, which = request["call"]
    if where:
        module, _, path = where.partition(":")
        owner, _, method = path.partition(".")
        strike_at(getattr(import_module(module), owner), method, which, strike)
    if request["seconds"]:
        signal.signal(signal.SIGPROF, strike)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
    sys.addaudithook(seen)
    try:
        return main(request["words"])
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        counts = {"events": num_events, "seconds": time.process_time() - began_s}
        screen.with_suffix(".counts").write_text(json.dumps(counts))
        sys.stderr.flush()


def strike_at(kind: Any, method: str, which: int, strike: Any) -> None:
    """Call `strike` before a method is called for the so-many-th time."""
    original, calls = getattr(kind, method), []

    @wraps(original)
    def struck(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == which:
            strike()
        return original(*arguments, **options)

    setattr(kind, method, struck)


def serve() -> None:
    """Run what is asked for on stdin, one command after the other."""
    import tempfile

    import torch

    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)  # loads the rest
    screen = Path(tempfile.mkdtemp(prefix="mpilm-signalled-")) / "screen"
    for line in sys.stdin:
        request = json.loads(line)
        counts = screen.with_suffix(".counts")
        counts.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            signal.alarm(LIMIT_S)
            file = os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = 70
            try:
                code = in_child(request, screen)
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = json.loads(counts.read_text()) if counts.exists() else {}
        ended = Ended(code, screen.read_text(errors="replace"), **found)
        print(json.dumps(asdict(ended)), flush=True)


if __name__ == "__main__":
    serve()
