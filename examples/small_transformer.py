"""A small transformer: tied weights, decay groups, warm-up, ranks out of lockstep.

    mpirun -n 4 python examples/small_transformer.py             # or without mpirun
    mpilm report runs/transformer

It learns to sort. docs/library.md explains the call.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader

import mpilm

LENGTH, SYMBOLS, WIDTH = 12, 16, 32


def rows(number):
    """Return symbols, and the same ones in order: a data set is anything with rows."""
    drawn = torch.Generator().manual_seed(number)
    given = torch.randint(SYMBOLS, (number, LENGTH), generator=drawn)
    return [{"x": row, "y": row.sort().values} for row in given]


class Sorter(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, WIDTH)
        self.place = nn.Parameter(torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True)
        self.layers, self.norm = nn.TransformerEncoder(layer, 2), nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, SYMBOLS, bias=False)
        nn.init.normal_(self.out.weight, std=0.1)
        self.embed.weight = self.out.weight

    def forward(self, x):
        return self.out(self.norm(self.layers(self.embed(x) + self.place)))


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]).transpose(1, 2), batch["y"])


def adamw(parameters):
    decay = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01}
    plain = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    return torch.optim.AdamW([decay, plain], lr=3e-3)


def train(out="runs/transformer", *, samples=40_000, resume=False, world=None):
    return mpilm.fit(
        Sorter(),
        DataLoader(rows(8_000), batch_size=32, shuffle=True),
        loss,
        strategy="adpsgd",
        optimizer=adamw,
        schedule={"name": "exponential", "final_ratio": 0.1, "warmup_samples": 2_000},
        valid=DataLoader(rows(500), batch_size=100),
        samples=samples,
        clip=1.0,
        out=out,
        resume=resume,
        world=world,
    ).summary


if __name__ == "__main__":
    train()
