"""An LSTM of one's own learns to write like Python's argparse, by gossip and momentum.

    mpirun -n 4 python examples/own_lstm.py                      # or without mpirun
    mpilm report runs/own-lstm

docs/library.md explains the call.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mpilm

TEXT = torch.tensor(list(Path(argparse.__file__).read_bytes()[:64_000])).clamp(max=127)
WINDOWS = TEXT[: len(TEXT) // 33 * 33].view(-1, 33)  # 32 characters, and the next ones


class Writer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(128, 32), nn.Linear(64, 128)
        self.lstm = nn.LSTM(32, 64, batch_first=True)

    def forward(self, characters):
        return self.out(self.lstm(self.embed(characters))[0])


def loss(model, batch):
    (windows,) = batch
    guessed = model(windows[:, :-1])
    return nn.functional.cross_entropy(guessed.flatten(0, 1), windows[:, 1:].flatten())


def train(out="runs/own-lstm", *, epochs=4, resume=False, world=None):
    model = Writer()
    found = mpilm.fit(
        model,
        DataLoader(TensorDataset(WINDOWS[100:]), batch_size=16, shuffle=True),
        loss,
        strategy={"name": "gossip_bmuf", "group_size": 2, "period": 10},
        optimizer=torch.optim.Adam,
        optimizer_settings={"lr": 5e-3},
        valid=DataLoader(TensorDataset(WINDOWS[:100]), batch_size=50),
        clip=1.0,
        epochs=epochs,
        out=out,
        resume=resume,
        world=world,
    )
    return found.summary


if __name__ == "__main__":
    train()
