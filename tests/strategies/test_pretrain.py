"""Pre-training: RBMs under a strategy; a DNN begins with what they learnt."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mpilm.config import resolve
from mpilm.data.kaldi_prepare import prepare_kaldi
from mpilm.errors import MpilmError
from mpilm.models.build import build_model
from mpilm.models.weights import save_weights
from mpilm.storage.state_file import read_state
from mpilm.train.loop import Trainer
from mpilm.train.pretrain import Pretrainer, write_layers
from mpilm.train.run import TrainedModel
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.virtual import run_virtual
from tests.unit.kaldi_files import NUM_FEATURES, make_folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("frames")
    train = make_folder(folder / "train")
    prepare_kaldi(
        {"train": train},
        folder / "c.h5",
        alignments=[train / "pdf.ark"],
        variance=True,
        context=1,
        shares={"valid": 0.3},
    )
    return folder / "c.h5"


def configure(corpus, strategy="model_averaging", **model):
    return resolve(
        {
            "data": {"corpus": str(corpus)},
            "model": {"name": "dnn", "hidden": 12, "layers": 3, **model},
            "strategy": {"name": strategy},
            "pretrain": {
                "batch": 5,
                "gaussian_epochs": 12,
                "bernoulli_epochs": 12,
                "gaussian_lr": 0.02,
                "bernoulli_lr": 0.2,
                "momentum_samples": 1000,
            },
        }
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("size", "strategy"), [(1, "local"), (2, "model_averaging"), (2, "adpsgd")]
)
def test_reconstruction_errors_fall_and_all_ranks_agree(corpus, size, strategy):
    lines: list[str] = []
    steps: list[tuple[int, int]] = []

    def main(world):
        said = lines.append if world.rank == 0 else lambda line: None
        moved = (lambda *at: steps.append(at)) if world.rank == 0 else lambda *at: None
        config = configure(corpus, strategy)
        return Pretrainer(config, world, show=said, progress=moved).run()

    ranks = run_virtual(main, size)
    pairs = [re.findall(r"([\d.]+) -> ([\d.]+)", line) for line in lines]
    errors = [(float(before), float(after)) for ((before, after),) in pairs]
    assert len(errors) == 3
    assert all(after < 0.9 * before for before, after in errors), errors
    assert steps[-1] == (len(steps), len(steps))
    shapes = [tuple(weight.shape) for weight, _ in ranks[0]]
    assert shapes == [(12, 3 * NUM_FEATURES), (12, 12), (12, 12)]
    for other in ranks[1:]:
        for (weight, bias), (its_weight, its_bias) in zip(ranks[0], other, strict=True):
            assert torch.equal(weight, its_weight)
            assert torch.equal(bias, its_bias)


def layers_of(corpus):
    (layers,) = run_virtual(lambda w: Pretrainer(configure(corpus), w).run(), 1)
    return layers


@pytest.mark.long
def test_a_slow_rank_out_of_lockstep_takes_fewer_minibatches(corpus):
    """All take as many together as in lockstep, and the momentum is of all samples."""
    found = {}
    faults = Faults(slow={"1": 20.0})

    class Watched(Pretrainer):
        def learner(self, layers, batches):
            learner = super().learner(layers, batches)
            update, group = learner.update, learner.optimizer.param_groups[0]
            mine = found.setdefault(len(layers), {})
            rates = found.setdefault("momentum", [])

            def watched():
                update()
                done = sum(mine.values())  # before this update, by all
                rates.append((group["momentum"], self.momentum(done)))
                mine[self.world.rank] = learner.samples

            learner.update = watched
            return learner

    def main(world):
        Watched(configure(corpus, "adpsgd"), world).run()
        return world.now_s()

    def in_lockstep(world):
        Pretrainer(configure(corpus, "model_averaging"), world).run()
        return world.now_s()

    machine = Machine(step_s=0.1)
    took_s = run_virtual(main, 2, machine=machine, faults=faults)[0]
    steps = round(run_virtual(in_lockstep, 2, machine=machine)[0] / 0.1)
    for layer in range(3):  # 12 passes each; a minibatch has 5 frames
        goal = 2 * 5 * steps // 3
        assert goal <= sum(found[layer].values()) < goal + 2 * 5
        assert found[layer][1] <= found[layer][0] / 10
    assert took_s < 2 * steps * 0.1 + 3 * 2.0  # each layer ends in a slow step
    for used, expected in found["momentum"]:
        assert used == pytest.approx(expected, abs=0.02)


@pytest.mark.long
def test_a_dnn_begins_with_the_weights(corpus, tmp_path):
    layers = layers_of(corpus)
    path = tmp_path / "deep" / "init.h5"
    write_layers(path, layers)
    assert sorted(read_state(path)) == [
        f"hidden.{i}.{part}" for i in range(3) for part in ("bias", "weight")
    ]
    assert [p.name for p in path.parent.iterdir()] == ["init.h5"]
    sizes = (3 * NUM_FEATURES, 6)
    choice = configure(corpus, init=str(path)).model
    model = build_model(choice, *sizes, seed=1)
    plain = build_model(configure(corpus).model, *sizes, seed=1)
    for layer, (weight, bias) in zip(model.hidden, layers, strict=True):
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.bias, bias)
    assert torch.equal(model.softmax.weight, plain.softmax.weight)


@pytest.mark.long
def test_a_run_needs_the_file_of_first_weights_no_more(corpus, tmp_path):
    path = tmp_path / "init.h5"
    write_layers(path, layers_of(corpus))
    document = configure(corpus, init=str(path)).to_dict()
    document["train"] |= {"batch": 16, "samples": 16}
    config = resolve(document)

    def main(world):
        trainer = Trainer(config, world, tmp_path / "run")
        before = trainer.learner.model.hidden[0].weight.clone()
        trainer.train()
        return before

    (before,) = run_virtual(main, 1)
    assert torch.equal(before, torch.from_numpy(read_state(path)["hidden.0.weight"]))
    path.unlink()
    trained = TrainedModel.read(tmp_path / "run")
    assert np.array_equal(trained.learner().theta.numpy(), trained.theta_P)
    longer = replace(config, train=replace(config.train, samples=48))
    folder = tmp_path / "run"
    run_virtual(lambda world: Trainer(longer, world, folder, resume=True).train(), 1)
    assert json.loads((folder / "summary.json").read_text())["steps"] == 3


def test_the_momentum_rises_to_its_end(corpus):
    (trainer,) = run_virtual(lambda world: Pretrainer(configure(corpus), world), 1)
    found = [trainer.momentum(n) for n in (0, 500, 1000, 5000)]
    np.testing.assert_allclose(found, [0.5, 0.7, 0.9, 0.9])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"activation": "relu"}, "activation = sigmoid"),
        ({"name": "lstm_am"}, "activation = sigmoid"),
    ],
)
def test_only_a_dnn_with_sigmoids_is_pretrained(corpus, model, words):
    kept = {"hidden": 12, "layers": 3}
    config = resolve(
        {
            "data": {"corpus": str(corpus)},
            "model": {"name": "dnn", **kept, **model},
        }
    )
    with pytest.raises(MpilmError, match=words):
        run_virtual(lambda world: Pretrainer(config, world), 1)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"hidden.0.weight": torch.zeros(12, 5)}, "hidden.0.weight is 12x5, this"),
        ({"hidden.7.bias": torch.zeros(12)}, "has hidden.7.bias, this model does not"),
    ],
)
def test_weights_of_another_model_are_refused(corpus, tmp_path, weights, words):
    path = tmp_path / "init.h5"
    save_weights(path, weights)
    with pytest.raises(MpilmError) as error:
        build_model(configure(corpus, init=str(path)).model, 12, 6, seed=1)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_a_file_of_weights_that_cannot_be_read_is_one_line(corpus, tmp_path):
    for content in (None, b"no weights"):
        path = tmp_path / "init.h5"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(MpilmError) as error:
            build_model(configure(corpus, init=str(path)).model, 12, 6, seed=1)
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)
