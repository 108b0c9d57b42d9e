"""`mpilm train --profile`: some steps of every rank in one timeline.

    learner    | input |== compute ==| update | mix ........ | input | ...
    messages   |--------- Iallreduce ---------|  |-- a message from rank 1 --|
    stages     |- stage -|                               |- stage -|

    input    the next minibatch        compute  the gradient, by `World.compute`
    update   the optimiser's step      mix      all else of a step: the strategy
    stage    a copy between a GPU and pinned host memory

The ranges of the learner are torch.profiler's, with its operators and kernels under
them. It does not see the threads beside the learner: messages and stages are noted
here, on the same clock. Each rank writes a Chrome trace; rank 0 merges them.

What is watched is put in the place of methods of this run's objects, and taken away
again: before the first and after the last watched step all is as without a profile.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from typing import Any

from mpilm.errors import CheckpointError
from mpilm.storage.files import reason, replace_file

FIRST = 5  # steps before the first one that is watched: warm-up. Chosen
STEPS = 20  # steps that are watched: some megabytes a rank. Chosen
QUIET = ("KINETO_LOG_LEVEL", "6")  # its progress is nobody's business


class StepProfile:
    """Watches some steps of one rank, the first FIRST of this launch left out.

    Args:
        world: this rank's, of real MPI.
        folder: of the run: profile/rank-N.json and profile.json go there.

    Communicates: collective when made, a barrier.
    """

    def __init__(self, world: Any, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.own = own_trace(folder, world.rank)
        self.events: list[dict[str, Any]] = []
        self.failure = ""
        self._numbers = count()
        self._began = 0  # steps
        self._learner: Any = None
        self._profiler: Any = None
        self._range: Any = None  # the one that the learner is in
        self._thread = threading.get_ident()
        self._watched: list[tuple[Any, str, Any]] = []
        world.comm.Barrier()
        self._mark_ns = time.time_ns()  # clocks of other hosts are set by it

    def attach(self, strategy: Any, learner: Any) -> None:
        """Count the steps of a strategy from now on."""
        self._learner = learner
        self._put(strategy, "step", self._step)

    def _step(self, step: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(learner: Any) -> Any:
            self._began += 1
            if self._began == FIRST + 1:
                self.begin()
            if self._profiler is None:
                return step(learner)
            self._enter("mix")
            try:
                return step(learner)
            finally:
                self._leave()
                if self._began == FIRST + STEPS:
                    self.end()

        return call

    def begin(self) -> None:
        """Put the ranges in place; start torch's profiler."""
        os.environ.setdefault(*QUIET)
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self._learner.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._put(self._learner.batches, "next", self._range_of("input"))
        self._put(self._learner, "compute", self._range_of("compute"))
        self._put(self._learner, "update", self._range_of("update"))
        resources = self.world.resources
        self._put(resources.staging, "finish", self._noted("stage"))
        self._put(resources.progress, "watch", lambda _: self._message)
        self._profiler = profile(activities=activities)
        self._profiler.start()

    def end(self) -> None:
        """Take away what was put in place; write this rank's trace.

        What goes wrong is kept for `merge`: all ranks must hear of it together.
        """
        for owner, name, before in reversed(self._watched):
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        profiler, self._profiler, self._watched = self._profiler, None, []
        if profiler is None:
            return
        profiler.stop()
        try:
            self.own.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.own))
            trace = json.loads(self.own.read_bytes())
            trace["mpilm"] = {
                "rank": self.world.rank,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "mark_us": self._mark_ns / 1e3,
            }
            base_us = base_of(trace)
            for event in list(self.events):
                trace["traceEvents"].append({**event, "ts": event["ts"] - base_us})
            replace_file(self.own, json.dumps(trace).encode())
        except OSError as error:
            self.failure = f"{self.own}: cannot write: {reason(error)}"

    def merge(self) -> Path:
        """Write one timeline of all ranks; return its path.

        Raises:
            CheckpointError: a file cannot be written.

        Communicates: collective, two small allgathers.
        """
        self.end()
        path = self.folder / "profile.json"
        with self.world.all_or_none():
            if self.failure:
                raise CheckpointError(self.failure)
        with self.world.all_or_none():
            if self.world.rank == 0:
                files = [own_trace(self.folder, r) for r in range(self.world.size)]
                traces = [json.loads(f.read_bytes()) for f in files if f.exists()]
                replace_file(path, json.dumps(merged(traces)).encode())
        return path

    # ranges of the learner: it is in one at a time
    def _range_of(self, name: str) -> Callable[[Any], Any]:
        def wrap(method: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if threading.get_ident() != self._thread or self._range is None:
                    return method(*args, **kwargs)
                self._leave()
                self._enter(name)
                try:
                    return method(*args, **kwargs)
                finally:
                    self._leave()
                    self._enter("mix")

            return call

        return wrap

    def _enter(self, name: str) -> None:
        from torch.profiler import record_function

        self._range = record_function(name)
        self._range.__enter__()

    def _leave(self) -> None:
        self._range.__exit__(None, None, None)
        self._range = None

    # beside the learner
    def _noted(self, name: str) -> Callable[[Any], Any]:
        def wrap(method: Any) -> Any:
            def call(*args: Any) -> Any:
                end = self._message(name)
                try:
                    return method(*args)
                finally:
                    end()

            return call

        return wrap

    def _message(self, what: str) -> Callable[[], None]:
        """Note what begins now; return what notes its end. Several overlap."""
        began_us = time.time_ns() / 1e3
        number = next(self._numbers)

        def end() -> None:
            event = {"cat": "mpilm", "name": what, "id": number, "pid": os.getpid()}
            stop = {**event, "ph": "e", "tid": 0, "ts": time.time_ns() / 1e3}
            self.events += [{**event, "ph": "b", "tid": 0, "ts": began_us}, stop]

        return end

    def _put(self, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        """Replace a method of one object; or what is its own attribute."""
        self._watched.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, wrap(getattr(owner, name)))


def own_trace(folder: Path, rank: int) -> Path:
    """Return where a rank's trace lies."""
    return folder / "profile" / f"rank-{rank:04d}.json"


def base_of(trace: dict[str, Any]) -> float:
    """Return what the times of a trace count from, microseconds since 1970."""
    return float(trace.get("baseTimeNanoseconds", 0)) / 1e3


def merged(traces: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the traces of all ranks as one: a process for each rank and its GPU.

    Ranks of one host share its clock. That of another host is set to the first rank's
    by the barrier that all left together, as exactly as they did.
    """
    traces = sorted(traces, key=lambda trace: int(trace["mpilm"]["rank"]))
    events: list[dict[str, Any]] = []
    for trace in traces:
        about, first = trace["mpilm"], traces[0]["mpilm"]
        shift_us = base_of(trace) - base_of(traces[0])
        if about["host"] != first["host"]:
            shift_us += first["mark_us"] - about["mark_us"]
        rank, pids = int(about["rank"]), {about["pid"]: 0}
        for event in trace["traceEvents"]:
            old, is_name = event.get("pid"), event["ph"] == "M"
            if not isinstance(old, int) or (is_name and event["name"][:4] == "proc"):
                continue  # the profiler's own, and names that are given anew below
            if is_name and old not in pids:
                continue  # a GPU that does nothing
            number = pids.setdefault(old, len(pids))
            new = {**event, "pid": 1000 * rank + number}
            if "ts" in event:
                new["ts"] = event["ts"] + shift_us
            if "id" in event:
                new["id"] = f"{rank}.{event['id']}"
            events.append(new)
        for old, number in pids.items():
            name = f"rank {rank}" if number == 0 else f"rank {rank}, GPU {old}"
            if old < 0:  # what the profiler itself took
                name = f"rank {rank}, profiler"
            common = {"ph": "M", "pid": 1000 * rank + number, "tid": 0}
            events.append({**common, "name": "process_name", "args": {"name": name}})
            order = {"sort_index": 1000 * rank + number}
            events.append({**common, "name": "process_sort_index", "args": order})
    start_us = min((e["ts"] for e in events if e["ph"] != "M"), default=0.0)
    for event in events:
        if "ts" in event:
            event["ts"] -= start_us
    return {"displayTimeUnit": "ms", "traceEvents": events}
