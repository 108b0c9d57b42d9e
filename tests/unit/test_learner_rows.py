"""Row tables: the same training as with dense gradients, and nothing of V in a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mpilm.convert import Choice
from mpilm.data.batch import Batch
from mpilm.errors import CheckpointError, ConfigError, ModelError
from mpilm.learner import row_optimizer
from mpilm.learner.learner import Learner
from mpilm.learner.parts import Parts
from mpilm.models.build import build_model
from mpilm.models.configs import LstmLmConfig
from mpilm.optim.build import build_optimizer
from mpilm.optim.configs import AdamwConfig, SgdConfig

V = 50


class Batches:
    """Minibatches of random words, the frequent ones often; each from its number."""

    def __init__(self, vocab=V):
        self.number, self.vocab = 0, vocab

    def next(self):
        random = np.random.default_rng(self.number)
        self.number += 1
        words = (self.vocab * random.random((2, 5, 3)) ** 3).astype(np.int64)
        return Batch(words[0], words[1], 15, self.number % 7 == 1)

    def state(self):
        return {"number": self.number}

    def load_state(self, state):
        self.number = int(state["number"])


MODELS = {
    "sampled": {"softmax": "sampled", "sampled_frequent": 3, "sampled_random": 12},
    "tied": {
        "softmax": "sampled",
        "sampled_frequent": 3,
        "sampled_random": 12,
        "tied": True,
    },
    "full": {},
}
OPTIMIZERS = {
    "plain": SgdConfig(lr=0.5, clip=0.0),
    "clip": SgdConfig(lr=0.5, clip=0.05),
    "decay": SgdConfig(lr=0.5, clip=0.0, weight_decay=0.01),
    "momentum": SgdConfig(lr=0.2, momentum=0.9),
    "nesterov": SgdConfig(lr=0.2, momentum=0.8, nesterov=True, clip=0.0),
    "all": SgdConfig(lr=0.2, momentum=0.8, nesterov=True, weight_decay=0.02),
    "adamw": AdamwConfig(lr=0.01, weight_decay=0.05),
}


def make(settings, optim="plain", *, rows=True, model_seed=2, seed=5, vocab=V):
    """Return a learner; its modules give sparse gradients, kept as rows or not."""
    config = LstmLmConfig(embed=6, hidden=8, dropout=0.2, sparse=True, **settings)
    model = build_model(Choice("lstm_lm", config), vocab, vocab, seed=model_seed)
    choice = Choice("", OPTIMIZERS[optim])
    optimizer = build_optimizer(choice)
    return Learner(model, Batches(vocab), optimizer, seed=seed, sparse=rows)


def train(learner, steps, *, first=0):
    losses = []
    for step in range(first, first + steps):
        learner.lr = learner.lr * (0.8 if step % 4 == 3 else 1.05)  # a schedule
        losses.append(learner.gradient())
        learner.update()
    return losses


def named(learner):
    theta = learner.theta
    return {s.name: theta[s.slice] for s in learner.layout}


@pytest.mark.long
@pytest.mark.parametrize("optim", [o for o in OPTIMIZERS if o != "adamw"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("history", [1024, 5])
def test_rows_train_as_dense_gradients_do(monkeypatch, model, optim, history):
    monkeypatch.setattr(row_optimizer, "HISTORY", history)
    sparse, dense = make(MODELS[model], optim), make(MODELS[model], optim, rows=False)
    assert sparse.layout.tables
    assert not dense.layout.tables
    losses, expected = train(sparse, 30), train(dense, 30)
    assert losses == pytest.approx(expected, rel=1e-6)
    for name, value in named(dense).items():
        assert (named(sparse)[name] - value).abs().max() <= 1e-6, name


@pytest.mark.parametrize(("eps", "bound"), [(1e-14, 1e-6), (1e-8, 3e-3)])
def test_adamw_differs_by_eps_only(monkeypatch, eps, bound):
    """Measured, of the distance moved: 1e-7; 1.5e-3 of the embedding with eps."""
    settings = AdamwConfig(lr=0.01, weight_decay=0.05, eps=eps)
    monkeypatch.setitem(OPTIMIZERS, "adamw", settings)
    sparse, dense = (make(MODELS["sampled"], "adamw", rows=r) for r in (True, False))
    first = dense.theta.clone()
    losses, expected = train(sparse, 30), train(dense, 30)
    assert losses == pytest.approx(expected, rel=1e-4)
    values, others = named(sparse), named(dense)
    error = torch.cat([values[n] - others[n] for n in others]).norm()
    assert error <= bound * (dense.theta - first).norm()


@pytest.mark.parametrize("optim", ["plain", "all", "adamw"])
@pytest.mark.parametrize("model", MODELS)
def test_resumed_to_the_bit(model, optim):
    learner = make(MODELS[model], optim)
    train(learner, 9)
    state = learner.state()
    expected = train(learner, 6, first=9)
    again = make(MODELS[model], optim, model_seed=3, seed=6)
    train(again, 2)
    again.load_state(state)
    assert train(again, 6, first=9) == expected
    assert torch.equal(again.theta, learner.theta)
    for name, vector in learner.moments().items():
        assert torch.equal(again.moments()[name], vector), name


@pytest.mark.parametrize("optim", ["plain", "momentum"])
def test_rows_lie_last_and_grad_ends_before_them(optim):
    learner = make(MODELS["sampled"], optim)
    layout = learner.layout
    names = [segment.name for segment in layout.tables]
    assert names == ["embedding.weight", "softmax.weight", "softmax.bias"]
    assert layout.segments[-3:] == layout.tables
    assert len(learner.grad) == layout.num_dense == layout.tables[0].start
    assert sum(s.size for bucket in layout.buckets(100) for s in bucket) == len(
        learner.grad
    )
    notified = []
    learner.gradient(ready=notified.append)
    assert len(notified) == len(layout.segments) - 3
    for name, (ids, values) in learner.rows.items():
        assert (ids[1:] > ids[:-1]).all()
        assert values.shape == (len(ids), layout[name].row_width)


def test_scale_holds_for_rows_too():
    one, half = make(MODELS["sampled"]), make(MODELS["sampled"])
    one.gradient()
    half.gradient(scale=0.5)
    for name, (_, values) in one.rows.items():
        assert torch.equal(half.rows[name].values, 0.5 * values)


@pytest.mark.parametrize("optim", ["momentum", "adamw"])
def test_moments_can_be_reset(optim):
    learner = make(MODELS["sampled"], optim)
    train(learner, 5)
    assert any(vector.any() for n, vector in learner.moments().items() if "/" in n)
    learner.reset_moments()
    assert not any(vector.any() for vector in learner.moments().values())
    theta = learner.theta.clone()
    fresh = make(MODELS["sampled"], optim)
    fresh.load_theta(theta)
    fresh.batches.number, fresh.lr = learner.batches.number, learner.lr
    fresh._random.load_state(learner._random.state())
    fresh.model.load_carried(learner.model.carried())
    assert train(learner, 3) == train(fresh, 3)


@pytest.mark.parametrize("optim", ["plain", "all"])
def test_several_minibatches_make_one_step_with_rows_too(optim):
    class InParts(Batches):
        def next(self):
            return Parts(Batches.next(self) for _ in range(3))

    sparse, dense = (make(MODELS["tied"], optim, rows=rows) for rows in (True, False))
    for learner in (sparse, dense):
        learner.batches = InParts()
    assert train(sparse, 8) == pytest.approx(train(dense, 8), rel=1e-6)
    for name, value in named(dense).items():
        assert (named(sparse)[name] - value).abs().max() <= 1e-6, name
    with pytest.raises(ModelError, match="several minibatches"):
        sparse.draw()


def test_evaluation_sees_what_momentum_has_still_to_do():
    sparse, dense = (make(MODELS["full"], "momentum", rows=r) for r in (True, False))
    train(sparse, 6)
    train(dense, 6)
    batches = [Batches().next()]
    assert sparse.evaluate(batches).nll == pytest.approx(
        dense.evaluate(batches).nll, rel=1e-6
    )


@pytest.mark.parametrize("optim", ["plain", "all", "adamw"])
def test_nothing_that_a_step_makes_has_a_row_for_each_word(optim):
    """The largest tensor that any operation of a step returns, for two V."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            old = {id(a) for a in args if isinstance(a, torch.Tensor)}
            is_view = op._schema.returns and op._schema.returns[0].alias_info
            if isinstance(out, torch.Tensor) and id(out) not in old and not is_view:
                stored = out._nnz() if out.is_sparse else out.numel()
                self.size = max(self.size, stored)
            return out

    sizes = []
    for vocab in (3000, 30_000):
        learner = make(MODELS["sampled"], optim, vocab=vocab)
        train(learner, 3)
        with Largest() as largest:
            train(learner, 3)
        sizes.append(largest.size)
    assert max(sizes) < 3000


# what is refused
def table_of_rows(sparse=True):
    model = nn.Sequential(nn.Embedding(9, 3, sparse=sparse), nn.Linear(3, 1))
    return model


def learner_of(model, optimizer, **options):
    class Numbers:
        def next(self):
            return Batch(torch.arange(4), torch.zeros(4), 4, True)

    def loss(model, batch):
        return model(batch.inputs).square().mean()

    return Learner(model, Numbers(), optimizer, loss=loss, sparse=True, **options)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, maximize=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, dampening=0.5),
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=0.1),
    ],
)
def test_optimisers_without_an_update_of_rows_are_refused(optimizer):
    with pytest.raises(ModelError, match="no update of single rows"):
        learner_of(table_of_rows(), optimizer)


def plain(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def test_a_model_without_row_tables_is_refused():
    with pytest.raises(ModelError, match="no module of the model has sparse"):
        learner_of(table_of_rows(sparse=False), plain)


def test_momentum_of_a_model_that_does_not_say_what_it_reads_is_refused():
    with pytest.raises(ModelError, match=r"a method rows_read\(minibatch\)"):
        learner_of(table_of_rows(), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5))


def test_a_dense_gradient_of_a_row_table_is_refused():
    model = table_of_rows()
    learner = learner_of(model, plain)
    learner.gradient()
    model[0].sparse = False
    with pytest.raises(ModelError, match=r"0\.weight: its module says sparse"):
        learner.gradient()


def test_a_table_that_the_loss_does_not_read_has_no_rows():
    model = nn.ModuleDict({"a": table_of_rows(), "b": nn.Embedding(5, 2, sparse=True)})
    model.forward = model["a"].forward
    learner = learner_of(model, plain)
    learner.gradient()
    assert len(learner.rows["b.weight"].ids) == 0
    learner.update()


def test_tied_full_softmax_is_refused():
    with pytest.raises(ConfigError, match=r"model\.sparse = true with model\.tied"):
        make({"tied": True})


def test_the_checkpoint_of_another_kind_of_gradient_is_refused():
    sparse = make(MODELS["sampled"], "momentum")
    train(sparse, 2)
    plain = make(MODELS["sampled"], "plain")
    with pytest.raises(CheckpointError):
        plain.load_state(sparse.state())
