"""mpilm with a failure on one rank: python inject.py RANK FAILURE ARGUMENT...

FAILURE is what happens on that rank after 100 steps: `raise`, an exception that nobody
foresaw; `model`, a parameter that is no number; or a number in the place of the loss.
`slow` is another one: on that rank the last validation takes ten minutes.
"""

import math
import sys
import time

from mpilm.cli import main
from mpilm.train.loop import Trainer

rank, failure, *arguments = sys.argv[1:]
record, validate = Trainer.record, Trainer.validate


def inject(trainer: Trainer, samples: int, loss: float) -> None:
    if trainer.world.rank == int(rank) and trainer.totals.step >= 100:
        if failure == "raise":
            raise RuntimeError("the disk\ncaught fire")
        if failure == "model":
            trainer.learner.theta[0] = math.nan
        elif failure != "slow":
            loss = float(failure)
    record(trainer, samples, loss)


def delay(trainer: Trainer) -> None:
    if failure == "slow" and trainer.world.rank == int(rank):
        time.sleep(600.0)
    validate(trainer)


Trainer.record, Trainer.validate = inject, delay
sys.exit(main(arguments))
