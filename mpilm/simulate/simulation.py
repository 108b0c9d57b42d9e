"""What a run would do on another machine: training, or its protocol alone, in the
virtual world.

Co-simulation  the training program itself with K learners in this process: real
               gradients, the time that the declared machine would take.
Protocol only  the strategy with a quadratic in the place of the network. Messages and
               computing take the time that they would take; the loss means nothing.
               It runs on fewer parameters: scaled.py.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mpilm.config import Config
from mpilm.errors import ConfigError
from mpilm.learner.flat import Layout
from mpilm.learner.quadratic import ProtocolLearner
from mpilm.simulate.drift import Drift
from mpilm.simulate.scaled import scaled, scaled_settings
from mpilm.storage.files import text_of
from mpilm.storage.runlog import write_summary
from mpilm.strategies import find_strategy
from mpilm.train.folder import RunFolder
from mpilm.train.task import open_task
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation, VirtualWorld

# A protocol runs on about so many parameters; chosen, not tuned: 128 ranks take
# some megabytes, and no segment of an LSTM model becomes smaller than a number.
PROTOCOL_PARAMETERS = 20_000


@dataclass(frozen=True)
class Outcome:
    """What a simulated run came to; times are those of the declared machine.

    ranks          K
    steps          minibatches of a rank (of the rank that took the most)
    samples        of all ranks
    seconds        of training
    samples_per_s  of all ranks together
    efficiency     samples_per_s over that of K ranks that never wait
    communication  share of its time that a rank waits for communication
    bytes_sent     by all ranks
    loss           of the last minibatches, nats; None: protocol only
    perplexity     of the valid split; None: protocol only
    drift          steps of its own that a rank's model is from the mean of all, see
                   drift.py; None: it trained
    """

    ranks: int
    steps: int
    samples: int
    seconds: float
    samples_per_s: float
    efficiency: float
    communication: float
    bytes_sent: int
    loss: float | None = None
    perplexity: float | None = None
    drift: float | None = None


def samples_per_step(config: Config) -> int:
    """Return the samples of one step of one rank."""
    train = config.train
    return train.batch * train.unroll * train.accumulate


def ideal_samples_per_s(config: Config, num_ranks: int) -> float:
    """Return the speed of ranks that compute and never wait, as declared."""
    step_s = config.machine.step_s
    if step_s > 0.0:
        step_s += config.machine.update_s
    else:
        raise ConfigError("machine.step_s is 0: there is nothing to compare with")
    return num_ranks * samples_per_step(config) / step_s


def simulate_protocol(
    config: Config, layout: Layout, ranks: int, steps: int
) -> Outcome:
    """Return what the protocol comes to on `ranks` virtual ranks.

    Args:
        layout: of the real model.
        steps: of every rank; out of lockstep together `ranks` times as many, as in
            training: a slow rank takes fewer.

    Raises:
        ConfigError: the strategy needs a real model, or step_s is 0.
    """
    small, scale = scaled(layout, PROTOCOL_PARAMETERS)
    machine = config.machine.scaled(scale)
    per_step = samples_per_step(config)
    kind = find_strategy(config.strategy.name)
    settings = scaled_settings(config.strategy.settings, scale)
    begun = [0] * ranks  # steps of each rank
    drift = Drift(ranks, steps, lockstep=kind.lockstep)

    def main(world: VirtualWorld) -> tuple[float, float, int]:
        learner = ProtocolLearner(
            small.size,
            compute=world.compute,
            seed=world.rank,
            samples_per_step=per_step,
            layout=small,
            lr=0.01,
        )
        strategy = kind(world, settings)
        strategy.require(learner)
        strategy.start(learner)
        before = dataclasses.replace(world.traffic)
        began_s = world.now_s()
        agree, lockstep = strategy.pace.agree, strategy.lockstep
        while begun[world.rank] < steps if lockstep else agree(left(begun)):
            begun[world.rank] += 1
            strategy.step(learner)
            drift.note(world.rank, begun[world.rank], learner)
        strategy.retire(learner)
        seconds = world.now_s() - began_s
        blocked_s = world.traffic.blocked_s - before.blocked_s
        sent = world.traffic.bytes_sent - before.bytes_sent
        strategy.finish(learner)
        return seconds, blocked_s, sent

    def left(begun: list[int]) -> int:
        return max(0, ranks * steps - sum(begun))

    simulation = Simulation(
        ranks,
        machine=machine,
        faults=config.faults.scaled(scale),
        seed=config.train.seed,
    )
    took = simulation.run(main)
    # out of lockstep every rank has its own pace; the speeds of ranks add up
    speeds = [
        n * per_step / max(s, 1e-12) for n, (s, _, _) in zip(begun, took, strict=True)
    ]
    speed = sum(speeds)
    return Outcome(
        ranks=ranks,
        steps=max(begun),
        samples=sum(begun) * per_step,
        seconds=max(seconds for seconds, _, _ in took),
        samples_per_s=speed,
        efficiency=speed / ideal_samples_per_s(config, ranks),
        communication=sum(b / max(s, 1e-12) for s, b, _ in took) / ranks,
        bytes_sent=round(scale * sum(sent for _, _, sent in took)),
        drift=drift.steps(),
    )


def model_layout(
    config: Config, *, vocab: int = 0, classes: int = 0, inputs: int = 0
) -> Layout:
    """Return where the parameters of the configured model lie.

    Without a size it is that of the corpus; otherwise no corpus is read.

    Args:
        vocab: words of a language model.
        classes: of an acoustic model.
        inputs: its input, features times spliced frames.

    Raises:
        DataError: the corpus cannot be read.
        ConfigError: a size that this model does not have.
    """
    from mpilm.train.run import make_learner, without_init

    is_acoustic = config.model.settings.reads == "frames"
    if vocab or classes:
        if bool(classes) != is_acoustic or (vocab and classes):
            wanted = "--classes" if is_acoustic else "--vocab"
            raise ConfigError(f"model {config.model.name}: its size is {wanted}")
        sizes = (inputs, classes) if is_acoustic else (vocab, vocab)
        config = without_init(config)
    else:
        task = open_task(config.data.corpus, config.model)
        sizes = (task.num_inputs, task.num_outputs)
    return make_learner(config, *sizes, None, device="cpu", seed=0).layout


def co_simulate(config: Config, out: Path, ranks: int) -> Outcome:
    """Train on `ranks` virtual ranks into the run folder `out`; return the outcome.

    The optimiser takes machine.update_s, an evaluation machine.eval_s a sample (of the
    run's seconds, not of those of training). No checkpoint is kept, and no rank
    evaluates a model of its own: K evaluations would take most of the real time.

    Raises:
        MpilmError: bad input, one line.
    """
    from mpilm.train.loop import Trainer

    train = dataclasses.replace(config.train, worst_rank=False)
    config = dataclasses.replace(config, train=train)

    class Simulated(Trainer):
        """A trainer whose models end with it."""

        def save(self, *, beside: bool = False) -> None:
            """Write no checkpoint: K of them would be of no use."""

    def main(world: VirtualWorld) -> tuple[int, float, float]:
        trainer = Simulated(config, world, out)
        trainer.train()
        totals = trainer.totals
        return totals.step, totals.train_seconds, totals.blocked_s

    simulation = Simulation(
        ranks, machine=config.machine, faults=config.faults, seed=config.train.seed
    )
    folder = RunFolder(out)
    forget_simulated(folder.summary)
    took = simulation.run(main)
    gc.collect()  # the models, before there are twice as many
    summary = json.loads(text_of(folder.summary))
    summary["simulated"] = True
    write_summary(folder.summary, summary)
    speed = summary["samples_per_s"]
    return Outcome(
        ranks=ranks,
        steps=max(steps for steps, _, _ in took),
        samples=summary["samples"],
        seconds=summary["train_seconds"],
        samples_per_s=speed,
        efficiency=speed / ideal_samples_per_s(config, ranks),
        communication=sum(b / max(s, 1e-12) for _, s, b in took) / ranks,
        bytes_sent=summary["bytes_sent"],
        loss=summary["train_loss"],
        perplexity=summary["valid_perplexity"],
    )


def forget_simulated(summary: Path) -> None:
    """Remove what an earlier simulation came to; a real run's summary stays."""
    with suppress(OSError, ValueError):
        if json.loads(text_of(summary)).get("simulated"):
            summary.unlink()


def outcome_table(outcomes: list[Outcome]) -> Iterator[str]:
    """Yield the lines of a table, a row per number of ranks."""
    real = any(outcome.perplexity is not None for outcome in outcomes)
    head = f"{'ranks':>6}{'steps':>8}{'seconds':>11}{'samples/s':>14}{'efficiency':>12}"
    head += f"{'waiting':>9}{'MB sent/rank':>14}"
    yield head + (f"{'loss':>9}{'valid ppl':>11}" if real else "")
    for o in outcomes:
        row = f"{o.ranks:>6}{o.steps:>8,}{o.seconds:>11.2f}{o.samples_per_s:>14,.0f}"
        row += f"{o.efficiency:>12.1%}{o.communication:>9.1%}"
        row += f"{o.bytes_sent / o.ranks / 1e6:>14,.1f}"
        if real:
            loss = "-" if o.loss is None else f"{o.loss:.4f}"
            perplexity = "-" if o.perplexity is None else f"{o.perplexity:.2f}"
            row += f"{loss:>9}{perplexity:>11}"
        yield row


def about(machine: Machine) -> str:
    """Return a line that says which machine was played."""
    text = f"machine: {machine.step_s * 1e3:g} ms a step, between nodes"
    text += f" {machine.latency_s * 1e6:g} us and {machine.bandwidth_Bps / 1e9:g} GB/s"
    if machine.ranks_per_node > 1:
        text += f", {machine.ranks_per_node} ranks a node with"
        text += f" {machine.node_latency_s * 1e6:g} us"
        text += f" and {machine.node_bandwidth_Bps / 1e9:g} GB/s"
    return text
