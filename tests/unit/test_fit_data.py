"""`mpilm.fit`: where its minibatches come from; a run that goes on."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from mpilm import load_model
from mpilm.errors import CheckpointError, MpilmError
from mpilm.storage.runlog import read_run
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


class Noisy(Dataset):
    """Items that are drawn with torch's random numbers each time."""

    def __len__(self):
        return 50

    def __getitem__(self, index):
        return X[index] + 0.1 * torch.randn(3), Y[index]


class Counting:
    def __init__(self, world):
        self.index = world.rank

    def next(self):
        self.index += 2
        rows = torch.arange(self.index, self.index + 4) % 50
        return X[rows], Y[rows]


class Placed(Counting):
    def state(self):
        return {"index": self.index}

    def load_state(self, state):
        self.index = int(state["index"])


ROWS = TensorDataset(X, Y, torch.arange(50))


class Buckets:
    """A batch sampler of one's own: minibatches of 2 and of 3, shuffled by torch."""

    def __iter__(self):
        lists = [[n, n + 1] for n in range(0, 20, 2)]
        lists += [[n, n + 1, n + 2] for n in range(20, 50, 3)]
        return iter([lists[n] for n in torch.randperm(20)])

    def __len__(self):
        return 20


SAMPLERS = {
    "a sampler": lambda: {"batch_size": 5, "sampler": SubsetRandomSampler(range(50))},
    "a batch sampler": lambda: {
        "batch_sampler": BatchSampler(RandomSampler(ROWS), 5, drop_last=False)
    },
    "one's own batch sampler": lambda: {"batch_sampler": Buckets()},
}

SOURCES = {
    "shuffled loader": lambda: loader(7, shuffle=True),
    "a sampler": lambda: DataLoader(
        TensorDataset(X, Y), batch_size=7, sampler=SubsetRandomSampler(range(50))
    ),
    "noise": lambda: DataLoader(Noisy(), batch_size=7, shuffle=True),
    "a list of one's own": lambda: (
        lambda world: [
            (X[n : n + 4], Y[n : n + 4]) for n in range(4 * world.rank, 44, 8)
        ]
    ),
    "a loader of one's own": lambda: (
        lambda world: DataLoader(
            TensorDataset(X[world.rank :], Y[world.rank :]), batch_size=9, shuffle=True
        )
    ),
    "an iterator": lambda: uneven,
    "next": lambda: Counting,
    "next with a place": lambda: Placed,
}


def cases():
    """Yield every source under two strategies; all but one are long."""
    for source in SOURCES:
        for name in ("allreduce", "model_averaging"):
            is_short = (source, name) == ("noise", "allreduce")
            marks = () if is_short else (pytest.mark.long,)
            yield pytest.param(source, name, marks=marks, id=f"{source}-{name}")


@pytest.mark.parametrize(("source", "name"), list(cases()))
def test_resumed_is_uninterrupted_to_the_bit(tmp_path, source, name):
    settings = {
        "strategy": name,
        "model": partial(make_model, dropout=0.3),
        "criterion": lambda model, batch: loss(model, batch)[0],
        "samples": 240,
        "optimizer": torch.optim.AdamW,
        "optimizer_settings": {"lr": 0.01},
        "scheduler": partial(CosineAnnealingLR, T_max=40),
        "valid": loader(10),
        "valid_every": 100,
        "log_every": 1,
        "checkpoint_every": 90,
        "keep": 9,
    }
    whole, _ = trained(tmp_path / "a", SOURCES[source](), **settings)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    found = sorted((tmp_path / "b/checkpoints").iterdir())
    assert len(found) >= 2
    for path in found[1:]:
        shutil.rmtree(path)
    (tmp_path / "b/summary.json").unlink()
    parts, fitted = trained(tmp_path / "b", SOURCES[source](), resume=True, **settings)
    assert same(parts[0], whole[0])
    one, other = (read_run(tmp_path / place)[1].rows for place in "ab")
    assert one["loss"].tolist() == other["loss"].tolist()
    assert one["lr"].tolist() == other["lr"].tolist()
    assert fitted.summary["steps"] == one["step"][-1]


@pytest.mark.parametrize("what", SAMPLERS)
def test_what_a_sampler_gives_is_dealt_out_and_evaluated_once(tmp_path, what):
    trained_on, evaluated = [], []

    def watched(model, batch):
        x, y, rows = batch
        (trained_on if model.training else evaluated).append(rows.tolist())
        return loss(model, (x, y))[0]

    _, fitted = trained(
        tmp_path,
        DataLoader(ROWS, **SAMPLERS[what]()),
        criterion=watched,
        valid=DataLoader(ROWS, **SAMPLERS[what]()),
        valid_every=0,
        samples=50,
    )
    assert fitted.summary["samples"] == 50
    sizes = {len(rows) for rows in trained_on}
    assert sizes == ({2, 3} if what == "one's own batch sampler" else {5})
    # with 2 and 3 in a minibatch the ranks may end some samples before or after it
    most = max(trained_on.count(rows) for rows in trained_on)
    assert most == 1
    once = [row for rows in evaluated for row in rows]
    assert len(once) % 50 == 0
    assert sorted(once[:50]) == list(range(50))


@pytest.mark.parametrize("kind", [{}, {"shuffle": True}, {"batch_sampler": True}])
def test_a_loader_of_each_ranks_own_data_is_gone_through_whole(tmp_path, kind):
    """Ranks with 10 and 20 items of their own: one epoch has all 30."""
    seen = []

    def watched(model, batch):
        x, y, rows = batch
        seen.extend(rows.tolist())
        return loss(model, (x, y))[0]

    def own(world):
        part = Subset(ROWS, range(10 * world.rank, 10 + 20 * world.rank))
        if "batch_sampler" in kind:
            order = BatchSampler(RandomSampler(part), 5, drop_last=False)
            return DataLoader(part, batch_sampler=order)
        return DataLoader(part, batch_size=5, **kind)

    settings = {"criterion": watched, "strategy": "adpsgd"}
    _, fitted = trained(tmp_path / "a", own, epochs=1, **settings)
    assert set(seen) >= set(range(10))
    assert fitted.summary["samples"] >= 30
    seen.clear()
    trained(tmp_path / "b", own, samples=40, **settings | {"strategy": "local"})
    assert sorted(seen) == sorted([*range(10), *range(10), *range(10, 30)])
    with pytest.raises(MpilmError, match="of 10 items on rank 0, of 20 on rank 1"):
        trained(tmp_path / "c", own, epochs=1, shard=True)


def hundreds(batch):
    """As if each item were a sequence of 100 samples."""
    return 100 * len(batch[0])


def test_an_epoch_is_one_whatever_is_counted(tmp_path):
    settings = {"epochs": 2, "num_samples": hundreds}
    _, fitted = trained(tmp_path / "a", valid=loader(7), log_every=1, **settings)
    assert fitted.summary["steps"] == 10  # as without num_samples
    assert len(read_run(tmp_path / "a")[0].rows["loss"]) == 10
    for strategy in ("adpsgd", "async_sgd"):
        with pytest.raises(MpilmError, match=r"epochs: a minibatch of 5 items .* 500 "):
            trained(tmp_path / strategy, strategy=strategy, **settings)
    trained(tmp_path / "b", strategy="adpsgd", samples=4_000, num_samples=hundreds)


def test_the_length_of_an_epoch_is_known_from_a_sampler(tmp_path):
    _, fitted = trained(
        tmp_path / "a",
        loader(5, sampler=SubsetRandomSampler(range(31))),
        epochs=2,
        valid=loader(7),
    )
    assert fitted.summary["samples"] == 60  # 15 on each rank

    def distributed(world):
        given = DistributedSampler(ROWS, num_replicas=world.size, rank=world.rank)
        return loader(5, sampler=given)

    _, fitted = trained(
        tmp_path / "b",
        distributed,
        epochs=2,
        valid=loader(
            7, sampler=DistributedSampler(ROWS, num_replicas=2, rank=1, shuffle=False)
        ),
    )
    assert fitted.summary["samples"] == 100
    alone = load_model(make_model(), tmp_path / "b").eval()
    whole = float(loss(alone, (X, Y))[0].detach())
    assert fitted.summary["valid_loss"] == pytest.approx(whole, rel=1e-5)


class Reading(nn.Module):
    """An LSTM that reads on where it was, as docs/library.md shows it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.lstm, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)
        self.hidden = None

    def forward(self, x):
        found, hidden = self.lstm(x, self.hidden)
        self.hidden = tuple(part.detach() for part in hidden)
        return self.out(found).transpose(1, 2)

    def carried(self):
        return self.hidden or ()

    def load_carried(self, tensors):
        self.hidden = tuple(tensors) or None


def test_what_a_model_carries_on_goes_on_and_evaluation_begins_anew(tmp_path):
    def stretch(world):
        starts = range(20 * world.rank, 20 * world.rank + 20, 4)
        return [(X[None, n : n + 4], Y[None, n : n + 4]) for n in starts]

    settings = {
        "model": Reading,
        "criterion": lambda model, batch: nn.functional.cross_entropy(
            model(batch[0]), batch[1]
        ),
        "valid": [(X[:6].view(2, 3, 3), Y[:6].view(2, 3))],  # of two rows, not one
        "valid_every": 4,
    }
    whole, _ = trained(tmp_path / "a", stretch, samples=16, **settings)
    trained(tmp_path / "b", stretch, samples=6, **settings)
    parts, _ = trained(tmp_path / "b", stretch, samples=16, resume=True, **settings)
    assert same(whole[0], parts[0])


def test_a_run_that_has_ended_gives_its_model_again(tmp_path):
    first, _ = trained(tmp_path)
    again, fitted = trained(tmp_path, resume=True)
    assert same(first[0], again[1])
    assert fitted.summary["steps"] == 10
    with pytest.raises(MpilmError, match=r"holds a run; resume = True goes on"):
        trained(tmp_path)


def test_more_epochs_go_on(tmp_path):
    trained(tmp_path, epochs=2)
    _, fitted = trained(tmp_path, epochs=3, resume=True)
    assert fitted.summary["samples"] == 150
    assert "train.samples" in (tmp_path / "changes.toml").read_text()


def test_ranks_with_uneven_minibatches_end_at_the_same_step(tmp_path):
    _, fitted = trained(tmp_path, uneven, size=3, samples=400, log_every=1)
    steps = {len(log.rows["step"]) for log in read_run(tmp_path).values()}
    assert len(steps) == 1
    assert abs(fitted.summary["samples"] - 400) <= 3 * 4 * 5
    assert fitted.summary["samples"] == sum(fitted.summary["per_rank"]["samples"])


def test_the_moving_average_can_be_loaded(tmp_path):
    models, fitted = trained(tmp_path, ema={"samples": 30}, valid=loader(10))
    average = load_model(make_model(), tmp_path, ema=True)
    assert not torch.equal(vector(average), vector(models[0]))
    assert fitted.summary["ema_valid_loss"] != fitted.summary["valid_loss"]
    trained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="no moving average"):
        load_model(make_model(), tmp_path / "plain", ema=True)
    with pytest.raises(CheckpointError, match="other parameters"):
        load_model(nn.Linear(3, 2), tmp_path)
