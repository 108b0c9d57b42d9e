"""`mpilm` that leaves a time stamp before every step: python partition_ranks.py FOLDER
STEP_S ARGUMENTS of mpilm.

A step takes STEP_S seconds more, asleep: the network is looked at, not the cores.
"""

from __future__ import annotations

import struct
import sys
import time
from pathlib import Path

from mpilm.cli import main
from mpilm.train.loop import Trainer

folder, step_s, *arguments = sys.argv[1:]
refresh_lr = Trainer.refresh_lr


def stamped(trainer: Trainer) -> None:
    """Append seconds since the epoch to this rank's file."""
    number = trainer.world.number  # type: ignore[attr-defined]
    with (Path(folder) / f"rank-{number}").open("ab") as stream:
        stream.write(struct.pack("d", time.time()))
    time.sleep(float(step_s))
    refresh_lr(trainer)


if __name__ == "__main__":
    Trainer.refresh_lr = stamped  # type: ignore[method-assign]
    sys.exit(main(arguments))
