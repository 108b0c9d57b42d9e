"""A small transformer: tied weights, decay groups, warm-up, ranks out of lockstep.

    mpirun -n 4 python examples/small_transformer.py             # or without mpirun
    mpilm report runs/transformer

docs/library.md explains the call.
"""

from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import mpilm

LENGTH, SYMBOLS = 12, 16


class Sorted(Dataset):
    """Symbols, and after them the same ones in order: each follows from the others."""

    def __init__(self, number):
        drawn = torch.Generator().manual_seed(number)
        self.given = torch.randint(SYMBOLS, (number, LENGTH), generator=drawn)

    def __len__(self):
        return len(self.given)

    def __getitem__(self, index):
        return {"x": self.given[index], "y": self.given[index].sort().values}


class Sorter(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.embed, self.place = (
            nn.Embedding(SYMBOLS, width),
            nn.Embedding(LENGTH, width),
        )
        layer = partial(nn.TransformerEncoderLayer, width, 4, 64, 0.1, batch_first=True)
        self.layers = nn.ModuleList(layer(norm_first=True) for _ in range(2))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, SYMBOLS, bias=False)
        self.out.weight = nn.Parameter(0.1 * torch.randn(SYMBOLS, width))
        self.embed.weight = self.out.weight

    def forward(self, x):
        h = self.embed(x) + self.place.weight
        for layer in self.layers:
            h = layer(h)
        return self.out(self.norm(h))


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]).transpose(1, 2), batch["y"])


def adamw(parameters):
    decay = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.01)


def train(out="runs/transformer", *, samples=40_000, resume=False, world=None):
    train_loader = DataLoader(Sorted(8_000), batch_size=32, shuffle=True)
    return mpilm.fit(
        Sorter(),
        train_loader,
        loss,
        strategy="adpsgd",
        optimizer=adamw,
        schedule={"name": "exponential", "final_ratio": 0.1, "warmup_samples": 2_000},
        valid=DataLoader(Sorted(500), batch_size=100),
        samples=samples,
        clip=1.0,
        out=out,
        resume=resume,
        world=world,
    ).summary


if __name__ == "__main__":
    train()
