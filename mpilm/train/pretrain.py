"""Pre-training: a stack of RBMs, layer by layer, whose weights a DNN begins with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpilm.config import Config
from mpilm.data.frame_batches import FrameShards
from mpilm.data.hdf5 import ShowProgress
from mpilm.errors import ConfigError, DivergenceError
from mpilm.learner.learner import Learner
from mpilm.learner.threads import use_threads
from mpilm.models.configs import DnnConfig
from mpilm.models.rbm import Rbm, RbmStack
from mpilm.models.weights import save_weights
from mpilm.seeds import RBM_ORDER, RBM_SAMPLES, RBM_WEIGHTS, derive
from mpilm.strategies import Strategy, find_strategy
from mpilm.train.evaluate import evaluate, swapped
from mpilm.train.screen import count
from mpilm.train.task import FrameTask, open_task
from mpilm.world.base import World

Layers = list[tuple[Tensor, Tensor]]  # (weight, bias), lowest first


class Pretrainer:
    """One rank's part in the pre-training of a DNN, under any strategy.

    Args:
        config: [model] dnn, [pretrain], [strategy], [data] and [train] seed, device.
        progress: called with minibatches done and how many there are.
        show: called with a line for each RBM.

    Raises:
        MpilmError: bad input; one line, the same on every rank.

    Communicates: collective.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        *,
        progress: ShowProgress = lambda done, total: None,
        show: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.config, self.world = config, world
        self.progress, self.show = progress, show
        settings = config.model.settings
        with world.all_or_none():
            if not isinstance(settings, DnnConfig) or settings.activation != "sigmoid":
                raise ConfigError(
                    "pretrain: RBMs begin a model dnn with activation = sigmoid"
                )
            use_threads(config.train.threads)
            task = open_task(config.data.corpus, config.model)
            assert isinstance(task, FrameTask)
            task.require_split("train")
            task.require_split("valid")
        self.task, self.settings = task, settings
        pretrain = config.pretrain
        others = (settings.layers - 1) * pretrain.bernoulli_epochs
        self.epochs = pretrain.gaussian_epochs + others
        self.done = 0

    def run(self) -> Layers:
        """Return weight and bias of every hidden layer. Collective."""
        layers: Layers = []
        for index in range(self.settings.layers):
            kind = find_strategy(self.config.strategy.name)
            strategy = kind(self.world, self.config.strategy.settings)
            with self.world.all_or_none():
                batches = self.batches(index, lockstep=strategy.lockstep)
                learner = self.learner(layers, batches)
                strategy.require(learner)
            layers.append(self.train(index, learner, batches, strategy))
        return layers

    def batches(self, index: int, *, lockstep: bool) -> FrameShards:
        """Return this rank's minibatches for a layer."""
        config, world = self.config, self.world
        return FrameShards(
            self.task.corpus.split("train"),
            self.task.view(config.train),
            config.pretrain.batch,
            config.data.cache,
            world.rank,
            world.size,
            seed=derive(RBM_ORDER, config.train.seed, index),
            world=None if lockstep else world,
        )

    def learner(self, layers: Layers, batches: FrameShards) -> Learner:
        """Return a learner of the RBM above `layers`."""
        pretrain, seed = self.config.pretrain, self.config.train.seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(RBM_WEIGHTS, seed, len(layers)))
            top = Rbm(
                len(layers[-1][1]) if layers else self.task.num_inputs,
                self.settings.hidden,
                gaussian=not layers,
                stddev=pretrain.stddev,
            )
        return Learner(
            RbmStack(layers, top, penalty=pretrain.penalty),
            batches,
            lambda parameters: torch.optim.SGD(
                parameters, lr=1.0, momentum=pretrain.first_momentum
            ),
            compute=self.world.compute,
            clock=self.world.now_s,
            device=self.world.device(self.config.train.device),
            seed=derive(RBM_SAMPLES, seed, len(layers), self.world.rank),
        )

    def train(
        self,
        index: int,
        learner: Learner,
        batches: FrameShards,
        strategy: Strategy,
    ) -> tuple[Tensor, Tensor]:
        """Train one RBM; return its weight and hidden bias. Collective."""
        pretrain, world = self.config.pretrain, self.world
        passes = pretrain.bernoulli_epochs if index else pretrain.gaussian_epochs
        lr = pretrain.bernoulli_lr if index else pretrain.gaussian_lr
        steps = passes * batches.num_batches  # of a rank, if all take as many
        in_step = pretrain.batch * world.size
        batches.start(steps * in_step)
        strategy.start(learner)
        before = self.error(learner)
        done = batches.synchronise(0)  # by all ranks
        own = 0  # by this rank, before the minibatch in work

        def refresh() -> None:
            momentum = self.momentum(batches.done(own))
            learner.optimizer.param_groups[0]["momentum"] = momentum
            learner.lr = lr * (1.0 - momentum)

        learner.refresh = refresh
        while done < steps * in_step:
            own = learner.samples
            strategy.step(learner)
            done = strategy.pace.agree(batches.done(learner.samples))
            here = min(steps, done // in_step)
            self.progress(self.done + here, batches.num_batches * self.epochs)
        self.done += steps
        strategy.retire(learner)
        strategy.finish(learner)
        batches.close()
        with swapped(learner, strategy):
            after = self.error(learner)
            top: Any = learner.model.top
            weight, bias = top.weight.detach().clone(), top.hidden_bias.detach().clone()
        self.show(
            f"RBM {index + 1} of {self.settings.layers}: squared reconstruction error"
            f" {before:.3f} -> {after:.3f}, {steps:,} minibatches on"
            f" {count(world.size, 'rank')}, {batches.num_dropped:,} frames left out"
        )
        if not math.isfinite(after):
            raise DivergenceError(
                f"RBM {index + 1}: the reconstruction error is {after}: a smaller"
                " learning rate in [pretrain] may help",
                everywhere=True,
            )
        return weight, bias

    def momentum(self, samples: int) -> float:
        """Return the momentum after `samples` samples of all ranks."""
        pretrain = self.config.pretrain
        share = min(1.0, samples / max(1, pretrain.momentum_samples))
        rise = pretrain.momentum - pretrain.first_momentum
        return pretrain.first_momentum + rise * share

    def error(self, learner: Learner) -> float:
        """Return the reconstruction error per frame of the valid split. Collective."""
        train = self.config.train
        return evaluate(learner, self.task, "valid", train, self.world).loss


def write_layers(path: Path, layers: Layers) -> None:
    """Write weights under the names that they have in a Dnn."""
    save_weights(path, dict(named(layers)))


def named(layers: Layers) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in a Dnn, weights)."""
    for index, (weight, bias) in enumerate(layers):
        yield f"hidden.{index}.weight", weight
        yield f"hidden.{index}.bias", bias
