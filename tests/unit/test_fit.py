"""`mpilm.fit`: a model of one's own, in the virtual world."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader, TensorDataset

from mpilm import evaluate_mean, fit, load_model, run_virtual, strategy
from mpilm.commands.report import report
from mpilm.errors import CheckpointError, MpilmError
from mpilm.learner.learner import Learner
from mpilm.storage.runlog import read_run
from mpilm.train.loop import Trainer
from tests.unit.fitting import (
    X,
    Y,
    loader,
    loss,
    make_model,
    same,
    trained,
    uneven,
    vector,
)

NAMES = ["local", "allreduce", "model_averaging", "gossip_bmuf", "adpsgd", "async_sgd"]


@pytest.mark.parametrize(
    "name",
    [n if n == "adpsgd" else pytest.param(n, marks=pytest.mark.long) for n in NAMES],
)
def test_any_strategy_trains_it_and_every_rank_gets_the_final_model(tmp_path, name):
    before = make_model()
    models, fitted = trained(tmp_path / "run", strategy=name, valid=loader(7))
    assert fitted.finished
    assert not torch.equal(vector(models[0]), vector(before))
    assert same(models[0], models[1])  # buffers as well
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert fitted.summary == summary
    assert summary["samples"] >= 100
    assert 0.0 < summary["valid_loss"] < 1.0
    assert 0.0 <= summary["valid_error"] < 0.6
    assert summary["ranks"] == 2
    loaded = load_model(make_model(), tmp_path / "run")
    assert same(loaded, models[0])


def test_it_is_plain_torch_on_one_rank(tmp_path):
    """Clipping, a scheduler and a DataLoader, against a loop written by hand."""
    settings = {"lr": 0.5, "momentum": 0.9}
    models, _ = trained(
        tmp_path,
        loader(5),
        size=1,
        epochs=3,
        clip=0.1,
        optimizer_settings=settings,
        scheduler=partial(CosineAnnealingLR, T_max=30),
    )
    plain = make_model()
    optimizer = torch.optim.SGD(plain.parameters(), **settings)
    scheduler = CosineAnnealingLR(optimizer, T_max=30)
    for _ in range(3):
        for batch in loader(5):
            optimizer.zero_grad()
            loss(plain, batch)[0].backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
    torch.testing.assert_close(vector(models[0]), vector(plain), rtol=1e-5, atol=1e-6)
    rows = read_run(tmp_path)[0].rows
    turned = torch.tensor(torch.pi * 10 / 30)  # after 10 steps
    assert rows["lr"][0] == pytest.approx(0.25 * (1 + turned.cos().item()))


def test_an_optimiser_and_a_scheduler_that_are_there_already_are_taken(tmp_path):
    def of_model(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        halved = LambdaLR(optimizer, lambda step: 0.5**step)
        return {"optimizer": optimizer, "scheduler": halved}

    given, _ = trained(
        tmp_path / "a", epochs=1, of_model=of_model, optimizer_settings=None
    )
    made, _ = trained(
        tmp_path / "b",
        epochs=1,
        optimizer_settings={"lr": 0.5},
        scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: 0.5**step),
    )
    torch.testing.assert_close(vector(given[0]), vector(made[0]))


def test_groups_of_the_optimiser_keep_their_settings(tmp_path):
    def groups(parameters):
        first, *others = parameters
        return torch.optim.SGD(
            [{"params": [first], "lr": 0.0}, {"params": others}], lr=1
        )

    models, _ = trained(tmp_path, optimizer=groups)
    before = make_model()
    assert torch.equal(models[0][0].weight, before[0].weight)
    assert not torch.equal(models[0][3].weight, before[3].weight)


@pytest.mark.long
def test_a_scheduler_steps_by_epochs_or_by_validations(tmp_path):
    def tenth(optimizer):
        return LambdaLR(optimizer, lambda epoch: 0.1**epoch)

    log = {"log_every": 1, "epochs": 2}
    trained(tmp_path / "a", scheduler=tenth, scheduler_per="epoch", **log)
    lr = read_run(tmp_path / "a")[0].rows["lr"]
    assert lr[:4] == pytest.approx([0.1] * 4)
    assert lr[6:9] == pytest.approx([0.01] * 3)
    trained(tmp_path / "class", scheduler=ReduceLROnPlateau, valid=loader(10), **log)
    plateau = partial(ReduceLROnPlateau, threshold=1e9, patience=0, factor=0.1)
    trained(tmp_path / "b", scheduler=plateau, valid=loader(10), **log)
    lr = read_run(tmp_path / "b")[0].rows["lr"]
    assert lr[0] == pytest.approx(0.1)  # the first validation is the best so far
    trained(tmp_path / "c", scheduler=plateau, valid=loader(10), valid_every=20, **log)
    assert read_run(tmp_path / "c")[0].rows["lr"][-1] < 0.011


def halving(optimizer):
    """A scheduler whose state has numbers as keys, in another one."""
    by_steps = MultiStepLR(optimizer, [8, 12], gamma=0.5)
    first = LambdaLR(optimizer, lambda step: 1.0)
    return SequentialLR(optimizer, [first, by_steps], [2])


@pytest.mark.parametrize("rate", [float, torch.tensor], ids=["number", "tensor"])
@pytest.mark.parametrize(
    "scheduler", [partial(MultiStepLR, milestones=[3, 15], gamma=0.5), halving]
)
def test_a_scheduler_goes_on_where_it_was(tmp_path, scheduler, rate):
    settings = {
        "scheduler": scheduler,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=rate(0.1)),
        "log_every": 1,
    }
    trained(tmp_path / "a", epochs=4, **settings)
    trained(tmp_path / "b", epochs=2, **settings)
    trained(tmp_path / "b", epochs=4, resume=True, **settings)
    whole, resumed = (read_run(tmp_path / name)[0].rows["lr"] for name in "ab")
    assert whole.tolist() == resumed.tolist()
    assert len(set(whole)) == 3


def test_an_optimiser_and_its_scheduler_are_trained_with_twice(tmp_path):
    def main(world):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        given = {"optimizer": optimizer, "scheduler": StepLR(optimizer, 1, gamma=0.9)}
        for name in "ab":
            out = tmp_path / name
            fit(model, loader(), loss, out=out, world=world, epochs=1, **given)
        return given["scheduler"].last_epoch

    assert run_virtual(main, 1) == [20]


@pytest.mark.parametrize("drop_last", [True, False])
def test_accumulated_minibatches_are_larger_ones(tmp_path, drop_last):
    class Plain(nn.Sequential):  # without batch norm, whose means are of a minibatch
        def __init__(self):
            torch.manual_seed(1)
            super().__init__(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

    parts, first = trained(
        tmp_path / "a", loader(3, drop_last=True), model=Plain, accumulate=2, samples=96
    )
    whole, second = trained(
        tmp_path / "b", loader(6, drop_last=True), model=Plain, samples=96
    )
    assert first.summary["steps"] == second.summary["steps"] == 8
    assert first.summary["samples"] == second.summary["samples"] == 96
    torch.testing.assert_close(vector(parts[0]), vector(whole[0]), rtol=1e-5, atol=1e-6)


def test_shared_frozen_and_unused_parameters(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.frozen = nn.Linear(3, 3).requires_grad_(False)
            self.unused = nn.Parameter(torch.ones(2))
            self.last = nn.Linear(3, 2)

        def forward(self, x):
            return self.last(self.frozen(self.second(self.first(x))))

    models, _ = trained(tmp_path, model=Odd)
    before = Odd()
    assert models[0].second.weight is models[0].first.weight
    assert torch.equal(models[0].frozen.weight, before.frozen.weight)
    assert torch.equal(models[0].unused, before.unused)
    assert not torch.equal(models[0].first.weight, before.first.weight)
    assert same(load_model(Odd(), tmp_path), models[1])


def test_a_model_in_evaluation_mode_is_trained_but_parts_stay_in_it(tmp_path):
    whole, _ = trained(tmp_path / "a", model=lambda: make_model().eval(), epochs=1)
    assert int(whole[0][1].num_batches_tracked) == 5
    assert whole[0].training

    def parts():
        model = make_model()
        model[1].eval()
        return model

    kept, _ = trained(tmp_path / "b", model=parts, epochs=1, valid=loader(10))
    assert int(kept[0][1].num_batches_tracked) == 0


@pytest.mark.long
def test_a_compiled_model_is_the_same_model(tmp_path):
    plain, _ = trained(tmp_path / "a", epochs=1)

    def compiled():
        return torch.compile(make_model(), backend="aot_eager")

    models, _ = trained(tmp_path / "b", epochs=1, model=compiled, valid=loader(10))
    torch.testing.assert_close(
        vector(models[0]), vector(plain[0]), rtol=1e-4, atol=1e-5
    )
    loaded = load_model(make_model(), tmp_path / "b")  # without compiling
    assert torch.equal(vector(loaded), vector(models[0]))


def test_autocast_computes_in_bfloat16(tmp_path):
    seen = set()

    def watched(model, batch):
        x, y = batch
        found = model(x)
        seen.add(found.dtype)
        return nn.functional.cross_entropy(found.float(), y)

    models, _ = trained(tmp_path, criterion=watched, autocast="bfloat16", epochs=1)
    assert seen == {torch.bfloat16}
    assert vector(models[0]).dtype == torch.float32


def test_the_same_data_on_all_ranks_is_noted(tmp_path, capsys):
    minibatches = [(X[n : n + 5], Y[n : n + 5]) for n in range(0, 50, 5)]
    trained(tmp_path / "a", minibatches, samples=40)
    assert "all ranks got the same first minibatch" in capsys.readouterr().out
    trained(tmp_path / "b", minibatches, samples=40, shard=True)
    assert "all ranks got the same" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["adpsgd", "allreduce"])
def test_own_data_out_of_lockstep_is_noted(tmp_path, capsys, name):
    trained(tmp_path, strategy=name, samples=40)
    noted = f"note: under {name} a slow rank's part" in capsys.readouterr().out
    assert noted == (name == "adpsgd")


@pytest.mark.parametrize("period", [5, 6])
def test_a_run_shorter_than_a_block_is_noted(tmp_path, capsys, period):
    strategy = {"name": "bmuf", "period": period}
    models, _ = trained(tmp_path, strategy=strategy, epochs=1)
    is_noted = "note: 5 steps are less than one block" in capsys.readouterr().out
    is_as_before = torch.equal(vector(models[0]), vector(make_model()))
    assert is_noted == is_as_before == (period == 6)


def test_the_report_shows_losses(tmp_path):
    trained(tmp_path / "a", valid=loader(10), valid_every=20)
    assert report([tmp_path / "a"], out=tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert "valid loss" in page
    assert "perplexity</th>" not in page


def test_a_run_shorter_than_a_row_of_the_log_has_no_training_loss(tmp_path):
    _, fitted = trained(tmp_path / "a", epochs=1)
    assert fitted.summary["train_loss"] is None
    assert report([tmp_path / "a"], out=tmp_path / "page.html") == 0
    assert "training loss, nats" not in (tmp_path / "page.html").read_text()


def test_without_valid_there_is_nothing_to_judge(tmp_path, capsys):
    _, fitted = trained(tmp_path, strategy="local")
    assert fitted.summary["valid_loss"] is None
    assert fitted.summary["consensus_distance"] > 0
    assert "valid" not in capsys.readouterr().out


def test_a_large_loss_is_no_failure(tmp_path):
    def large(model, batch):
        return 1e4 + loss(model, batch)[0]

    _, fitted = trained(tmp_path, criterion=large, valid=loader(10))
    assert fitted.summary["valid_loss"] > 1e4


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(MpilmError, match="the loss is nan"):
        trained(
            tmp_path,
            criterion=lambda model, batch: loss(model, batch)[0] * float("nan"),
            log_every=1,
        )


def test_evaluation_of_the_mean_in_the_middle_leaves_training_as_it_was():
    minibatches = [(X[n : n + 5], Y[n : n + 5]) for n in range(0, 50, 5)]

    class Cycle:
        def __init__(self, rank):
            self.number = rank

        def next(self):
            self.number += 1
            return minibatches[self.number % 10]

    def main(world, *, looks):
        learner = Learner(
            make_model(),
            Cycle(world.rank),
            partial(torch.optim.SGD, lr=0.1),
            loss=loss,
            compute=world.compute,
        )
        chosen = strategy("model_averaging", world, period=7)
        chosen.start(learner)
        found = []
        for _ in range(9):
            chosen.step(learner)
            if looks:
                share = minibatches[world.rank :: world.size]
                found.append(evaluate_mean(chosen, learner, share))
        chosen.finish(learner)
        return learner.theta.clone(), found

    plain = run_virtual(partial(main, looks=False), 2)
    looked = run_virtual(partial(main, looks=True), 2)
    for rank in range(2):
        assert torch.equal(plain[rank][0], looked[rank][0])
        assert looked[rank][1] == looked[0][1]  # the same on all ranks
    assert len({quality.loss for quality in looked[0][1]}) == 9


WRONG = {
    "no length": ({"epochs": 0}, "samples, or epochs"),
    "epochs of an unknown length": ({"batches": uneven}, "epochs: how many"),
    "a strategy": ({"strategy": "gosip_bmuf"}, "did you mean 'gossip_bmuf'"),
    "a setting": ({"strategy": {"name": "bmuf", "perod": 3}}, "perod"),
    "a strategy's type": ({"strategy": 3}, "strategy: of type int"),
    "batches": ({"batches": 3}, "batches: of type int"),
    "a tensor": ({"batches": X}, "batches: a Tensor is no series"),
    "no loss": ({"criterion": None}, "loss: give a function"),
    "an optimiser": ({"optimizer": "adam"}, "optimizer: of type str"),
    "a setting of it": ({"optimizer_settings": {"rate": 1}}, "optimizer SGD: .*rate"),
    "its rate": ({"optimizer_settings": {"lr": -1.0}}, "Invalid learning rate"),
    "a scheduler": ({"scheduler": 3}, "scheduler: of type int"),
    "a scheduler's class": ({"scheduler": StepLR}, "scheduler StepLR: .*step_size"),
    "a plateau without valid": ({"scheduler": ReduceLROnPlateau}, "give valid"),
    "a scheduler that ends": (
        {"scheduler": partial(OneCycleLR, max_lr=0.1, total_steps=5)},
        "scheduler OneCycleLR: .* this rank's own",
    ),
    "both": (
        {"scheduler": partial(CosineAnnealingLR, T_max=3), "schedule": "newbob"},
        "one of the two",
    ),
    "newbob without valid": ({"schedule": "newbob"}, "give valid"),
    "float16": ({"autocast": "float16"}, "bfloat16 only"),
    "a clip": ({"clip": -1.0}, r"optim\.clip"),
    "GPU messages": ({"gpu_messages": "pinned"}, r"world\.gpu_messages"),
    "accumulate": ({"accumulate": 0}, r"optim\.accumulate"),
    "valid is an iterator": ({"valid": iter([1])}, "valid: an iterator is used up"),
    "valid is a number": ({"valid": 3}, "valid: of type int"),
    "valid is empty": ({"valid": []}, "valid: has no minibatch"),
    "no minibatch": ({"batches": [], "samples": 9}, "rank 0: batches: an epoch of"),
    "a loss with logits": (
        {"criterion": lambda model, batch: (loss(model, batch)[0], model(batch[0]))},
        r"a pair with a Tensor of shape \(5, 2\)",
    ),
    "no samples": ({"num_samples": lambda batch: 0}, "num_samples: returned 0 for"),
    "no count": ({"num_samples": lambda batch: None}, "num_samples: returned None"),
    "a device": ({"device": "gpu"}, "device: 'gpu' is none of"),
    "epochs as text": ({"epochs": "3"}, "epochs: of type str"),
    "a moving average": ({"ema": 0.99}, "ema: of type float"),
    "no module": ({"model": lambda: 3}, "model: of type int"),
    "double": ({"model": lambda: nn.Linear(3, 2).double()}, r"model\.float\(\)"),
    "bfloat16": ({"model": lambda: nn.Linear(3, 2).bfloat16()}, r"model\.float\(\)"),
    "too little data": (
        {"batches": DataLoader(TensorDataset(X[:1]))},
        "a data set of 1 items cannot be dealt out over 2 ranks",
    ),
    "an iterator that ends": (
        {"batches": lambda world: iter([(X, Y)] * 3), "samples": 9999},
        None,
    ),
    "per": ({"scheduler_per": "month"}, "scheduler_per: 'month'"),
    "samples that cannot be counted": (
        {"batches": lambda world: [{"a": 1}], "samples": 9},
        "give the function num_samples",
    ),
    "foreign": (
        {"optimizer": lambda _: torch.optim.SGD(make_model().parameters(), lr=1)},
        "not among those",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_ends_in_one_line(tmp_path, what):
    settings, words = WRONG[what]
    if words is None:
        trained(tmp_path, **{"samples": 600, **settings} | {"samples": 600})
        return
    with pytest.raises(MpilmError, match=words) as error:
        trained(tmp_path, **settings)
    assert "\n" not in str(error.value)


OTHER = {
    "strategy": ({"strategy": "bmuf"}, r"strategy\.name: allreduce on rank 0, bmuf on"),
    "length": ({"epochs": 3}, r"train\.samples: 100 on rank 0, 150 on rank 1"),
    "folder": ({"out": "elsewhere"}, r"out: .*run on rank 0, elsewhere on rank 1"),
    "valid": ({"valid": loader(10)}, "valid: False on rank 0, True on rank 1"),
}


@pytest.mark.parametrize("what", OTHER)
def test_ranks_that_were_given_different_things_are_refused(tmp_path, what):
    other, words = OTHER[what]

    def main(world):
        settings = {"out": tmp_path / "run", "epochs": 2}
        settings |= other if world.rank else {}
        fit(make_model(), loader(), loss, world=world, **settings)

    with pytest.raises(MpilmError, match=words):
        run_virtual(main, 2)
    assert not (tmp_path / "run").exists()


def test_another_model_does_not_go_on(tmp_path):
    trained(tmp_path, epochs=1)
    with pytest.raises(MpilmError, match="the model: its set of parameters is not"):
        trained(tmp_path, resume=True, model=lambda: nn.Linear(3, 2))


def test_the_command_line_says_whose_run_it_is(tmp_path):
    from mpilm.train.folder import RunFolder
    from mpilm.train.run import TrainedModel

    trained(tmp_path, epochs=1)
    with pytest.raises(CheckpointError, match="load_model"):
        TrainedModel.read(tmp_path)
    config = RunFolder(tmp_path).read_config()
    with pytest.raises(MpilmError, match="resume = True"):
        run_virtual(lambda w: Trainer(config, w, tmp_path, resume=True), 2)
