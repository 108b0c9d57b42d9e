"""A convolutional network with batch norm reads drawn digits, models averaged.

    mpirun -n 4 python examples/image_cnn.py                     # or without mpirun
    mpilm report runs/cnn

docs/library.md explains the call.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import mpilm

# seven segments: which are lit, from the top, clockwise, the middle one last
LIT = ["abcdef", "bc", "abdeg", "abcdg", "bcfg", "acdfg", "acdefg", "abc", "abcdefg"]
LIT.append("abcdfg")
PLACES = {"a": (1, 2, 0, 1), "d": (8, 2, 0, 1), "g": (4, 2, 0, 1)}
PLACES |= {"b": (2, 5, 1, 0), "c": (5, 5, 1, 0), "e": (5, 1, 1, 0), "f": (2, 1, 1, 0)}


class Digits(Dataset):
    """Digits of 10 x 8 pixels with noise that is drawn anew each time."""

    def __init__(self, number):
        self.glyphs = torch.zeros(10, 1, 10, 8)
        for digit, lit in enumerate(LIT):
            for y, x, down, right in (PLACES[segment] for segment in lit):
                for n in range(3):
                    self.glyphs[digit, 0, y + n * down, x + n * right] = 1.0
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        return self.glyphs[index % 10] + 0.7 * torch.randn(1, 10, 8), index % 10


def network():
    layers = []
    for before, after in ((1, 8), (8, 16)):
        layers += [nn.Conv2d(before, after, 3), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.1), nn.Linear(384, 10))


def loss(model, batch):
    images, digits = batch
    found = model(images)
    return nn.functional.cross_entropy(found, digits), (found.argmax(1) != digits).sum()


def train(out="runs/cnn", *, epochs=4, resume=False, world=None):
    loader = DataLoader(Digits(4_000), batch_size=25, shuffle=True, num_workers=1)
    return mpilm.fit(
        network(),
        loader,
        loss,
        strategy={"name": "model_averaging", "period": 10},
        optimizer=torch.optim.SGD,
        optimizer_settings={"lr": 0.05, "momentum": 0.9},
        schedule={"name": "exponential", "final_ratio": 0.1},
        valid=DataLoader(Digits(500), batch_size=100),
        epochs=epochs,
        out=out,
        resume=resume,
        world=world,
    ).summary


if __name__ == "__main__":
    train()
