"""Wire formats: the same bits in numpy and torch, every law, half of the bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpilm.errors import ConfigError, WorldError
from mpilm.strategies import STRATEGIES, strategy
from mpilm.strategies.base import UpdateWireConfig
from mpilm.testing import LawBroken, check_strategy
from mpilm.testing.fleet import fleet as by_factory
from mpilm.world import wire as codec
from mpilm.world.base import IN_PLACE
from mpilm.world.codes import BLOCK, LARGEST_CODE, block_bytes
from mpilm.world.virtual import run_virtual
from mpilm.world.wire import BITS, WIRES, narrowed, remainder, span_of, widened, wired
from tests.strategies.cases import CASES
from tests.strategies.fleets import fleet, thetas

SHORT = WIRES[1:]  # than float32
SINGLE = [wire for wire in SHORT if wire not in BITS]  # of single numbers, not blocks
UNITS = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # of a normal number
WIRED = {
    name: case
    for name, case in CASES.items()
    if "wire" in STRATEGIES[case.name].Config.__dataclass_fields__
}
WITHOUT = {"local", "sparse_loco", "hierarchical"}  # nothing, codes, `settings`
EXTREME = [0.0, -0.0, 1e-30, 1e-8, 6e-5, 65519.0, 65520.0, 7e4, -1e30, 3.4e38]
EXTREME += [np.inf, -np.inf, np.nan]
every_wire = pytest.mark.parametrize("wire", SHORT)
every_single = pytest.mark.parametrize("wire", SINGLE)
every_code = pytest.mark.parametrize("wire", BITS)
every_case = pytest.mark.parametrize("name", WIRED)
CODED = [
    name
    for name, case in WIRED.items()
    if issubclass(STRATEGIES[case.name].Config, UpdateWireConfig)
]
EVERY_PAIR = [(n, w) for n in WIRED for w in (SHORT if n in CODED else SINGLE)]


def settings_of(name, wire, size=4):
    found = {k: v for k, v in CASES[name].of(size).items() if k not in ("eta", "zeta")}
    return {**found, "wire": wire}


def numbers(count=20_000):
    random = np.random.default_rng(5)
    sizes = 10.0 ** random.uniform(-9, 6, count)
    ties = 1.0 + np.arange(64) * 2.0**-9  # half of them between two of bfloat16
    found = [EXTREME, ties, -ties, sizes * random.choice([-1, 1], count)]
    return np.concatenate(found).astype(np.float32)


def test_every_strategy_has_a_wire_format_or_is_known_to_have_none():
    wired_names = {case.name for case in WIRED.values()}
    assert wired_names == set(STRATEGIES) - WITHOUT


@every_wire
def test_numpy_and_torch_make_the_same_bytes(wire):
    x = numbers()
    ours, theirs = narrowed(x, wire), narrowed(torch.from_numpy(x.copy()), wire)
    is_nan = np.isnan(x)
    if wire in BITS:  # a NaN's block has its bits in numpy and torch alike
        assert np.array_equal(ours, theirs.numpy())
    else:
        pair = [m.view(np.uint16)[~is_nan] for m in (ours, theirs.numpy())]
        assert np.array_equal(*pair)
    again = widened(ours, wire)
    assert np.isnan(again[: len(x)][is_nan]).all()
    np.testing.assert_array_equal(again, widened(theirs, wire).numpy())
    assert theirs.dtype == torch.uint8 and len(theirs) == span_of(wire).of(len(x))


@every_code
@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK, BLOCK + 1, 1000])
def test_a_code_is_the_nearest_to_its_share_of_the_largest(wire, count):
    """Half a scale at most is left, in what is finite; a block with a NaN is NaN."""
    random = np.random.default_rng(count)
    x = random.standard_normal(count).astype(np.float32)
    x *= 10.0 ** random.uniform(-30, 30, count).astype(np.float32)
    message = narrowed(x, wire)
    assert len(message) == -(-count // BLOCK) * block_bytes(BITS[wire])
    value = widened(message, wire)[:count]
    for start in range(0, count, BLOCK):
        block = slice(start, start + BLOCK)
        scale = np.abs(x[block]).max() / LARGEST_CODE[BITS[wire]]
        codes = value[block] / scale
        np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)
        assert (np.abs(x[block] - value[block]) <= 0.5001 * scale).all()
    assert (widened(narrowed(np.zeros_like(x), wire), wire) == 0.0).all()
    x[-1] = np.inf
    value = widened(narrowed(x, wire), wire)[:count]
    last = (count - 1) // BLOCK * BLOCK
    assert np.isnan(value[last:]).all() and np.isfinite(value[:last]).all()


@every_single
def test_the_nearest_number_travels_and_the_rest_is_left_exactly(wire):
    x = numbers()
    value = widened(narrowed(x, wire), wire)
    left = remainder(x, value)
    finite = np.isfinite(x)
    assert np.isfinite(value[finite]).all()
    assert np.isfinite(left).all() and (left[~finite] == 0.0).all()
    normal = finite & (np.abs(x) >= 2.0**-14) & (np.abs(x) <= codec.LARGEST[wire])
    assert (np.abs(left[normal]) <= UNITS[wire] * np.abs(x[normal])).all()
    assert np.array_equal(value[finite] + left[finite], x[finite])
    ties = 1.0 + 2.0**-8 * np.arange(1, 8, 2, dtype=np.float32)  # of bfloat16
    if wire == "bfloat16":  # to even
        assert (
            widened(narrowed(ties, wire), wire).view(np.uint32) >> 16 & 1 == 0
        ).all()


@every_wire
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 4, 23, 1000])
def test_a_sum_and_what_is_left_of_it_are_the_sum(wire, size, length):
    vectors = np.random.default_rng(1).standard_normal((size, length), np.float32)

    def main(world):
        comm = wired(world.comm.Dup(), wire)
        x, copy = vectors[world.rank].copy(), vectors[world.rank].copy()
        before = world.traffic.bytes_sent, world.traffic.bytes_received
        left = comm.Allreduce(IN_PLACE, x)
        after = world.traffic.bytes_sent, world.traffic.bytes_received
        request, out = comm.Iallreduce(copy, np.empty_like(copy)), None
        world.wait(request.Test, "the sum")
        assert np.array_equal(request.left, left) and out is None
        declared = comm.allreduced_bytes(length)
        moved = [b - a for a, b in zip(before, after, strict=True)]
        return x, left, moved == [declared, declared], declared

    ranks = run_virtual(main, size)
    sums = [rank[0] for rank in ranks]
    assert all(np.array_equal(one, sums[0]) for one in sums)
    whole = sums[0].astype(np.float64) + sum(r[1].astype(np.float64) for r in ranks)
    np.testing.assert_allclose(whole, vectors.sum(0, dtype=np.float64), atol=2e-6)
    assert all(rank[2] for rank in ranks)
    once = span_of(wire).of(length)  # every byte but a rank's own, and back
    assert sum(rank[3] for rank in ranks) == 2 * once * (size - 1)
    if length == 1000:
        per_element = {"int8": 66 / 64, "int4": 34 / 64}.get(wire, 2.0)
        assert once == pytest.approx(per_element * length, rel=0.03)


@pytest.mark.long
@pytest.mark.parametrize(("name", "wire"), EVERY_PAIR)
def test_every_law_is_kept_in_every_format(name, wire):
    """The mass to the rounding of float32, as without a format."""
    check_strategy(
        CASES[name].name, sizes=(3,), schedules=10, **settings_of(name, wire)
    )


@pytest.mark.long
@every_single
def test_hierarchical_has_the_format_of_its_inner_strategy(wire):
    settings = {"inner": "dpsgd", "node_size": 2, "settings": {"wire": wire}}
    half, whole = (
        fleet("hierarchical", 4, **{**settings, "settings": {"wire": w}})
        for w in (wire, "float32")
    )
    assert half[0].bytes_sent < whole[0].bytes_sent
    assert half[1].bytes_sent == whole[1].bytes_sent  # inside a node
    node1 = {**settings, "node_size": 1}
    check_strategy("hierarchical", sizes=(3,), schedules=10, **node1)


@pytest.mark.parametrize(
    ("name", "wire"),
    [
        *((name, "bfloat16") for name in ("model_averaging", "dpsgd", "adpsgd", "sgp")),
        *((name, wire) for name in ("bmuf", "eager_diloco") for wire in SHORT),
    ],
)
def test_without_feedback_mass_is_lost(name, wire, monkeypatch):
    """What the laws hold is the feedback, not a kind format."""
    monkeypatch.setattr(codec, "remainder", lambda x, value: np.zeros_like(x))
    with pytest.raises(LawBroken, match="mass is conserved"):
        check_strategy(
            CASES[name].name, sizes=(3,), schedules=0, **settings_of(name, wire)
        )


@every_case
def test_a_format_halves_what_is_sent(name):
    short, whole = (
        sum(rank.bytes_sent for rank in fleet(CASES[name].name, 4, steps=12, **found))
        for found in (settings_of(name, wire) for wire in ("bfloat16", "float32"))
    )
    assert 0.5 <= short / whole < 0.62  # clocks, ends and the final Bcast are whole


def test_codes_are_for_updates_not_for_models(run):
    """A model would keep its error of a fourteenth: nobody would come nearer."""
    assert {WIRED[name].name for name in CODED} == {"allreduce", "bmuf", "eager_diloco"}
    for name in ("model_averaging", "dpsgd"):
        with pytest.raises(ConfigError, match="'int4' is none of float32, bfloat16"):
            run(1, name, strategy={"wire": "int4"})


@every_code
@pytest.mark.parametrize("name", ["bmuf", "eager_diloco"])
def test_codes_leave_the_minimum_where_it_is(name, wire):
    """Within a code of the updates, which stay as large as the targets are apart."""
    settings = {"eta": 0.0, "zeta": 1.0, "period": 4, "wire": wire}
    ranks = fleet(name, 4, steps=400, learner={"lr": 0.125}, **settings)
    goals = np.stack([rank.learner.target for rank in ranks])
    updates = (1.0 - (1.0 - 0.125) ** 4) * np.abs(goals - goals.mean(0)).max()
    apart = max(np.abs(rank.final - goals.mean(0)).max() for rank in ranks)
    assert apart < updates / LARGEST_CODE[BITS[wire]]


@pytest.mark.parametrize("wire", WIRES)
def test_gradients_are_summed_as_in_float32_but_for_the_last_error(wire):
    """Each rank's sum of updates: lr / K of all gradients without the last errors."""
    size, steps, lr = 3, 40, 0.125
    made = {"lr": lr, "noise": 0.5}
    ranks = by_factory(
        lambda world: strategy("allreduce", world, wire=wire), size, steps=steps,
        learner=made,
    )  # fmt: skip
    assert all(np.array_equal(t, thetas(ranks)[0]) for t in thetas(ranks))
    # the same learners' gradients again, along the same path, in float64
    errors = [r.strategy.error for r in ranks]
    left = 0.0 if errors[0] is None else lr * np.sum(errors, axis=0, dtype=np.float64)
    found = ranks[0].learner.theta.astype(np.float64) - left
    np.testing.assert_allclose(found, unrounded(ranks, steps, lr), atol=2e-5)
    if wire == "bfloat16":
        assert np.abs(left).max() > 1e-4  # what would be lost


def unrounded(ranks, steps, lr):
    """Return the model whose updates are the sums of all gradients at the real path.

    The gradient is linear in theta, so the path of y = theta - lr sum(e) is
    y <- y - lr (theta - c + noise): with theta from the run step by step.
    """
    size = len(ranks)
    y = ranks[0].first.astype(np.float64)
    again = by_factory(
        lambda world: strategy("allreduce", world, wire=ranks[0].strategy.config.wire),
        size, steps=steps, learner={"lr": lr, "noise": 0.5}, watch=noting(y, lr, size),
    )  # fmt: skip
    assert np.array_equal(again[0].learner.theta, ranks[0].learner.theta)
    return y


def noting(y, lr, size):
    """Let every gradient be taken off y, as it is before it travels."""

    def watch(method, learner):
        compute = learner.gradient

        def gradient(ready=None, *, scale=1.0):
            def noted(where):
                y[where] -= lr * learner.grad[where].astype(np.float64)
                if ready is not None:
                    ready(where)

            return compute(noted, scale=scale)

        learner.gradient = gradient

    return watch


def test_what_has_no_format_says_so(run):
    for name in ("local", "sparse_loco"):
        with pytest.raises(ConfigError, match="wire"):
            run(1, name, strategy={"wire": "float16"})
    with pytest.raises(ConfigError, match="'float8' is none of float32, bfloat16"):
        run(1, "bmuf", strategy={"wire": "float8"})

    def main(world):
        return wired(world.comm, "float8")

    with pytest.raises(WorldError, match="no 'float8'"):
        run_virtual(main, 2)


@pytest.mark.long
@pytest.mark.parametrize("name", ["allreduce", "bmuf", "adpsgd"])
def test_an_lstm_trains_in_sixteen_bits(run, name):
    """And resumes to the bit where it keeps step."""
    wire = {"strategy": {"wire": "bfloat16"}}
    if name == "adpsgd":
        trainers = run(2, name, steps=60, data={"source": "pool"}, **wire)
    else:
        saves = {"checkpoint": {"every": 30 * 2 * 40}, **wire}
        trainers = run(2, name, steps=60, **saves)
        run(2, name, steps=30, out=name, **saves)
        again = run(2, name, steps=60, out=name, resume=True, **saves)
        for one, other in zip(trainers, again, strict=True):
            assert torch.equal(one.learner.theta, other.learner.theta)
    assert trainers[0].totals.valid_perplexity < 33  # of 40 words
