"""Every strategy with learners on the card does what it does on the CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from mpilm.data.streams import Streams
from mpilm.learner.learner import Learner
from mpilm.models.lstm_lm import LstmLm
from mpilm.models.sampled_softmax import SampledSoftmax
from mpilm.strategies import STRATEGIES, strategy
from mpilm.world.virtual import run_virtual

TOKENS = np.random.default_rng(0).integers(0, 50, 5000).astype(np.uint16)
SHORT = {
    "model_averaging": {"period": 2},
    "bmuf": {"period": 2},
    "gossip_bmuf": {"period": 2},
    "noloco": {"period": 2},
    "des_loc": {},
    "sparse_loco": {"period": 2},
    "eager_diloco": {"period": 2},
}


def trained(name: str, device: str, *, sparse: bool) -> list[Any]:
    """Return the final model, as rank 0 has it, and each rank's own, on the CPU."""

    def train(world: Any) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(1)

        def softmax(num_inputs: int, num_words: int) -> SampledSoftmax:
            all_of = {"num_frequent": 5, "num_random": num_words}
            return SampledSoftmax(num_inputs, num_words, **all_of, sparse=True)

        extra: Any = {"softmax": softmax, "sparse": True} if sparse else {}
        learner = Learner(
            LstmLm(50, embed=8, hidden=8, layers=2, **extra),
            Streams(TOKENS, 4, 5, world.rank, world.size),
            partial(torch.optim.SGD, lr=0.1),
            compute=world.compute,
            device=device,
            flat=True,
            sparse=sparse,
        )
        chosen = strategy(name, world, **SHORT.get(name, {}))
        chosen.start(learner)
        for _ in range(8):
            chosen.step(learner)
        chosen.finish(learner)
        chosen.load_state(chosen.state())
        final = torch.zeros_like(learner.theta)
        chosen.final_model_(learner, final)
        return final.cpu(), learner.theta.cpu()

    return [tensor for pair in run_virtual(train, 3) for tensor in pair]


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "rows"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_on_the_card(cuda: str, name: str, sparse: bool) -> None:
    if sparse and not STRATEGIES[name].takes_rows:
        pytest.skip(f"{name} takes no rows")
    gpu = trained(name, cuda, sparse=sparse)
    cpu = trained(name, "cpu", sparse=sparse)
    for one, other in zip(gpu, cpu, strict=True):
        assert (one - other).abs().max() < 0.02 * other.abs().max()
