"""What a module holds outside theta is one for all ranks, under every strategy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpilm.errors import ModelError
from mpilm.learner.learner import Learner
from mpilm.strategies import STRATEGIES, strategy
from mpilm.strategies.ema import Ema, EmaConfig
from mpilm.train.best_model import BestModel
from mpilm.train.evaluate import swapped
from mpilm.world.virtual import run_virtual
from tests.strategies.cases import CASES
from tests.strategies.modules import FLOATS, STEPS, faults, make, states


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_start_gives_all_of_the_model_and_the_end_makes_one_of_all(name, size):
    assert {case.name for case in CASES.values()} == set(STRATEGIES)
    every = run_virtual(lambda world: states(world, name), size)
    assert faults(every) == []
    if size > 1:
        first, trained = every[1][0], every[1][2]
        for key in ("frozen.weight", "mask", "count", *FLOATS):
            assert not torch.equal(first[key], every[0][0][key]), f"{key}: a poor test"
        for key in ("norm.running_mean", "norm.running_var"):
            assert not torch.equal(trained[key], every[0][2][key])
        assert trained["count"] == every[0][0]["count"] + STEPS


@pytest.mark.parametrize("ema", [False, True])
def test_a_look_in_mid_training_leaves_each_rank_its_own(ema):
    def main(world):
        learner = make(world)
        chosen = strategy("model_averaging", world, period=2)
        chosen.start(learner)
        source = Ema(EmaConfig(syncs=3), chosen, learner) if ema else chosen
        for _ in range(3):
            chosen.step(learner)
        before = learner.model.everything()
        with swapped(learner, source):
            inside = learner.model.everything()
        return before, inside, learner.model.everything()

    ranks = run_virtual(main, 3)
    mean = torch.stack([before["norm.running_mean"] for before, *_ in ranks]).mean(0)
    for before, inside, after in ranks:
        for name, value in after.items():
            assert torch.equal(value, before[name]), name
        assert torch.allclose(inside["norm.running_mean"], mean)
        assert not torch.equal(inside["norm.running_mean"], before["norm.running_mean"])
        assert torch.equal(inside["count"], ranks[0][0]["count"])


def test_going_back_to_the_best_model_takes_the_buffers_along():
    def main(world):
        learner = make(world)
        best = BestModel(learner)
        learner.gradient()
        best.judge(is_kept=True)
        kept = learner.model.everything()
        learner.gradient()
        moved = learner.model.everything()
        state = best.state()
        best.judge(is_kept=False)
        back = learner.model.everything()
        other = make(world, seed=9)
        resumed = BestModel(other)
        resumed.load_state(state)
        resumed.judge(is_kept=False)
        return kept, moved, back, other.model.everything()

    ((kept, moved, back, resumed),) = run_virtual(main, 1)
    assert not torch.equal(kept["norm.running_mean"], moved["norm.running_mean"])
    for name in set(kept) - {"table"}:  # it is not persistent
        assert torch.equal(kept[name], back[name]), name
        assert torch.equal(kept[name], resumed[name]), name


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda model: setattr(model, "used", nn.Linear(2, 3)),
            r"used\.weight is parameter \(1, 2\) on rank 0, parameter \(3, 2\) on rank",
        ),
        (
            lambda model: model.register_buffer("mask", torch.ones(4)),
            r"mask is torch\.bool \(5,\) on rank 0, torch\.float32 \(4,\) on rank 2",
        ),
        (
            lambda model: model.register_buffer("extra", torch.ones(4)),
            r"extra is missing on rank 0, torch\.float32 \(4,\) on rank 2",
        ),
    ],
)
def test_ranks_with_different_models_are_refused_in_one_line(change, line):
    def main(world):
        learner = make(world)
        if world.rank == 2:
            model = learner.model
            change(model)
            learner = Learner(
                model, None, lambda p: torch.optim.SGD(p, lr=0.1), compute=world.compute
            )
        with pytest.raises(ModelError, match=line) as found:
            strategy("allreduce", world).start(learner)
        assert found.value.everywhere
        return str(found.value)

    assert len(set(run_virtual(main, 3))) == 1


def test_a_buffer_of_another_length_by_now_stays_each_ranks_own():
    def main(world):
        learner = make(world)
        chosen = strategy("local", world)
        chosen.start(learner)
        learner.model.mask = torch.ones(world.rank + 1)
        learner.model.later = torch.ones(3) * world.rank
        chosen.final_model_(learner, learner.theta)
        return learner.model.everything()

    ranks = run_virtual(main, 2)
    assert [len(rank["mask"]) for rank in ranks] == [1, 2]
    assert ranks[0]["later"].tolist() == ranks[1]["later"].tolist() == [0.5] * 3
    assert torch.equal(ranks[0]["wide"], ranks[1]["wide"])


def test_a_strategy_from_elsewhere_needs_to_do_nothing():
    class First(STRATEGIES["local"]):
        """The final model is rank 0's."""

        def final_model_(self, learner, out):
            out[:] = learner.theta
            self.comm.Bcast(out, root=0)

    def main(world):
        learner = make(world)
        chosen = First(world, First.Config())
        chosen.start(learner)
        chosen.step(learner)
        before = learner.model.norm.running_mean.clone()
        chosen.final_model_(learner, learner.theta)
        return before, learner.model.norm.running_mean

    ranks = run_virtual(main, 2)
    mean = (ranks[0][0] + ranks[1][0]) / 2
    assert all(torch.allclose(after, mean) for _, after in ranks)
