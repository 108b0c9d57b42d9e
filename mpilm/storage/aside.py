"""A vector that waits while another one takes its place, without memory where it can.

A validation and a checkpoint put the final model where the rank's own is. Its own waits
in a file without a name in the run folder, which has room for models: at V = 267,735,
H = 512 that is 566 MB of memory less on each rank, for about a second of writing and
reading. A short vector, one on a GPU, or one that finds no room there waits in memory.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from mpilm.errors import CheckpointError
from mpilm.storage.files import reason, write_fully
from mpilm.vectors import copy_of, lending, to_array

# Bytes of a vector that goes to a file. Chosen, not tuned: less is little beside a
# process with torch, 400 MB.
LEAST_BYTES = 64 << 20


class Aside:
    """What `vector` is now, until `put_back_`; a context that lets go of it.

    Args:
        vector: (P,), numpy or torch.
        folder: of the file; None: in memory.

    copy  it, if it waits in memory
    """

    def __init__(self, vector: Any, folder: Path | None = None) -> None:
        self.vector, self.folder, self.copy = vector, folder, None
        self._file: Any = None
        on_host = not getattr(vector, "is_cuda", False)
        if folder is not None and on_host and vector.nbytes >= LEAST_BYTES:
            with suppress(OSError):  # no room there
                self._file = self._written(folder)
        if self._file is None:
            self.copy = copy_of(vector)

    def _written(self, folder: Path) -> Any:
        file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  __exit__ does
        try:
            write_fully(file.fileno(), self._bytes(), 0)
        except OSError:
            file.close()
            raise
        return file

    def _bytes(self) -> memoryview:
        """Return the vector's own memory."""
        with lending():
            return memoryview(to_array(self.vector)).cast("B")

    def put_back_(self) -> None:
        """Give the vector the values that it had.

        Raises:
            CheckpointError: they cannot be read any more.
        """
        if self._file is None:
            self.vector[:] = self.copy
            return
        left, place = self._bytes(), 0
        try:
            while left:
                count = os.preadv(self._file.fileno(), [left], place)
                if not count:
                    raise OSError("it is shorter than it was written")
                left, place = left[count:], place + count
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: the model that waited in a file there: {reason(error)}"
            ) from error

    def __enter__(self) -> Aside:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.copy = None
        if self._file is not None:
            self._file.close()
