"""A model and data of one's own, and `mpilm.fit` on them in the virtual world."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mpilm import fit, run_virtual

torch.manual_seed(5)
X = torch.randn(50, 3)
Y = (X.sum(dim=1) > 0).long()
DATA = TensorDataset(X, Y)
SGD = {"optimizer": torch.optim.SGD, "optimizer_settings": {"lr": 0.1}}


def make_model(dropout=0.0):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(dropout), nn.Linear(4, 2)
    )


def loss(model, batch):
    x, y = batch
    found = model(x)
    return nn.functional.cross_entropy(found, y), (found.argmax(1) != y).sum()


def loader(batch_size=5, **settings):
    return DataLoader(DATA, batch_size=batch_size, **settings)


def trained(out, batches=None, *, size=2, model=make_model, criterion=loss, **settings):
    """Return the models, one per rank, and what `fit` returned on rank 0."""
    models, fitted = [None] * size, []

    def main(world):
        models[world.rank] = made = model()
        given = batches if batches is not None else loader(shuffle=True)
        lasting = {} if "samples" in settings else {"epochs": 2}
        options = {**SGD, **lasting, **settings}
        if "optimizer" in settings and "optimizer_settings" not in settings:
            del options["optimizer_settings"]
        options = {k: v(made) if k == "of_model" else v for k, v in options.items()}
        options.update(options.pop("of_model", {}))
        found = fit(made, given, criterion, out=out, world=world, **options)
        fitted.append(found)

    run_virtual(main, size)
    return models, next(f for f in fitted if f.rank == 0)


def same(one, other):
    """Return whether two modules hold the same bits."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def vector(module):
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def uneven(world):
    """Minibatches of 2 to 5 samples, others on each rank."""
    number = world.rank
    while True:
        number += 3
        rows = slice(number % 40, number % 40 + 2 + number % 4)
        yield X[rows], Y[rows]
