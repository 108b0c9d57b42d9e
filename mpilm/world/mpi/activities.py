"""Activities of a rank on threads, and the locks between them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from mpilm.errors import LeftBehindError, RanksDiedError
from mpilm.world.base import Activity
from mpilm.world.mpi.progress import Progress, Stopped


class ThreadActivity(Activity):
    """An activity on a thread of a `MpiWorld`."""

    def __init__(self, world: Any, work: Callable[[], None], name: str) -> None:
        self.world, self.work, self.name = world, work, name
        self.error: BaseException | None = None
        self.finished = False
        world.progress.thread(self._run, f"mpilm {name}")

    def _run(self) -> None:
        try:
            self.work()
        except (Stopped, RanksDiedError, LeftBehindError):
            pass
        except BaseException as error:
            self.error = error
            if self.world.on_failure is not None:
                self.world.on_failure(error)
            self.world.progress.fail(error)
        self.finished = True
        self.world.progress.notify()

    def join(self) -> None:
        world = self.world
        world.wait(lambda: self.finished or None, f"the end of {self.name}")
        if self in world.activities:
            world.activities.remove(self)
        if self.error is not None:
            world.progress.reported(self.error)
            raise self.error


class NotifyingLock(AbstractContextManager[None]):
    """A lock whose release lets everybody in `world.wait` look again."""

    def __init__(self, progress: Progress, name: str) -> None:
        self.progress, self.name = progress, name
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        self.progress.notify()
