"""A model, an optimiser and data of one's own, trained by any strategy of mpilm.

    mpirun -n 4 python examples/own_model.py

Without mpirun, four ranks in this process and in virtual time: `run_virtual` in the
last line instead of `run_mpi`, as it says there. docs/library.md explains each line.
"""

from typing import NamedTuple

import torch

from mpilm import Learner, run_mpi, run_virtual, strategy  # noqa: F401 - last line


class Batch(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor
    num_samples: int


class Points:
    """Points in the plane: inside the unit circle or not; other ones on each rank."""

    def __init__(self, seed):
        self.random = torch.Generator().manual_seed(seed)

    def next(self):
        x = 3 * torch.rand(50, 2, generator=self.random) - 1.5
        return Batch(x, (x.norm(dim=1) < 1).long(), len(x))


def loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch.x), batch.y)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def train(world):
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2)
    )
    learner = Learner(
        model,
        Points(seed=world.rank),
        adam,
        loss=loss,
        compute=world.compute,
        device=world.device(),
    )
    chosen = strategy("adpsgd", world, mixing="random_pairs")
    chosen.start(learner)  # all ranks begin with the model of rank 0
    for _ in range(300):
        chosen.step(learner)
    chosen.finish(learner)  # nothing is under way any more
    chosen.final_model_(learner, learner.theta)  # the mean of all ranks
    test = Points(seed=1000)
    found = learner.evaluate(test.next() for _ in range(20))
    if world.rank == 0:
        print(f"loss {found.nll / found.num_targets:.3f}, ranks: {world.size}")


if __name__ == "__main__":
    run_mpi(train)  # run_virtual(train, 4)
