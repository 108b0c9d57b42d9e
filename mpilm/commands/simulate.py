"""`mpilm simulate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mpilm.convert import counts_in
from mpilm.errors import ConfigError

if TYPE_CHECKING:
    from mpilm.config import Config
    from mpilm.learner.flat import Layout
    from mpilm.simulate.simulation import Outcome

PROTOCOL_STEPS = 100  # of a rank; enough for some periods of most strategies


def simulate(
    config: tyro.conf.Positional[Path],
    /,
    *,
    out: Path,
    ranks: str = "4,8,16,32",
    machine: str = "",
    protocol_only: Annotated[bool, tyro.conf.arg(name="protocol-only")] = False,
    steps: int | None = None,
    strategies: str = "",
    vocab: int = 0,
    classes: int = 0,
    inputs: int = 40,
    set_: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set")
    ] = (),
) -> int:
    """Predict how a run scales, on a declared machine.

    All ranks run in this process, in virtual time. By default they train: real
    gradients, loss against the predicted seconds, a run folder for each number of ranks
    (`mpilm report` draws them). `mpilm probe` measures a [machine].

    Args:
        config: TOML file
        out: folder for simulate.json and the run folders
        ranks: numbers of ranks, such as 16,32,64,128
        machine: one that ships (see below) or a file with a [machine]; that of the
            configuration if not given
        protocol_only: communication without a network: thousands of ranks in seconds
        steps: minibatches of a rank; if not given, train.samples, or 100 of a protocol
        strategies: several, such as allreduce,adpsgd: each into OUT/NAME
        vocab: words of the language model: a protocol needs no corpus then
        classes: of the acoustic model, likewise
        inputs: of the acoustic model without a corpus: features x spliced frames
        set_: override a setting: section.key=value
    """
    from mpilm.config import read_config
    from mpilm.simulate import simulation
    from mpilm.simulate.machines import find_machine
    from mpilm.storage.files import require_apart
    from mpilm.train.folder import RunFolder

    numbers = counts_in("--ranks", ranks)
    if steps is not None and steps < 1:
        raise ConfigError(f"--steps {steps}: must be 1 or more")
    for option, value in (("vocab", vocab), ("classes", classes)):
        if value and not protocol_only:
            raise ConfigError(f"--{option}: only with --protocol-only")
        if value < 0:
            raise ConfigError(f"--{option} {value}: must be 1 or more")
    if inputs < 1:
        raise ConfigError(f"--inputs {inputs}: must be 1 or more")
    found = find_machine(machine) if machine else None
    of_machine = found.settings if found else ()
    about = f"{machine}: {found.about}" if found and found.about else ""
    plans: list[tuple[Path, Config]] = []
    for name in strategy_names(strategies) or [""]:
        more = (f"strategy.name={name}",) if name else ()
        settings = read_config(config, (*of_machine, *set_, *more))
        simulation.ideal_samples_per_s(settings, 1)
        for count in numbers:
            settings.faults.check(count)
        folder = out / name
        runs = [RunFolder(folder / f"ranks-{count:04d}") for count in numbers]
        written = [folder / "simulate.json", *(p for f in runs for p in f.files())]
        require_apart(written, settings.inputs(config))
        plans.append((folder, settings))
    sizes = {"vocab": vocab, "classes": classes, "inputs": inputs}
    for folder, settings in plans:
        for note in settings.notes:
            print(f"note: {note}")
        layout = None
        if protocol_only:
            layout = simulation.model_layout(settings, **sizes)
        one_strategy(settings, folder, numbers, layout, steps, about=about)
    return 0


def one_strategy(
    settings: Config,
    out: Path,
    numbers: list[int],
    layout: Layout | None,
    steps: int | None,
    *,
    about: str = "",
) -> None:
    """Simulate a strategy on these numbers of ranks; print a table; write `out`.

    Args:
        layout: of the model whose protocol is simulated; None: it trains.
        steps: of a rank; None: see `simulate`.
        about: the machine that ships.
    """
    from mpilm.simulate import simulation
    from mpilm.storage.files import reason

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: cannot write: {reason(error)}") from None
    outcomes: list[Outcome] = []
    # at once: its run folders are simulated ones, also while they are under way
    write_result(out, settings, outcomes, protocol_only=layout is not None)
    for count in numbers:
        if layout is not None:
            some = steps or PROTOCOL_STEPS
            outcome = simulation.simulate_protocol(settings, layout, count, some)
        else:
            one = settings
            if steps is not None:
                samples = steps * count * simulation.samples_per_step(settings)
                every = max(1, min(settings.train.log_every, steps // 20))
                train = dataclasses.replace(
                    settings.train, samples=samples, log_every=every
                )
                one = dataclasses.replace(settings, train=train)
            folder = out / f"ranks-{count:04d}"
            outcome = simulation.co_simulate(one, folder, count)
        outcomes.append(outcome)
        write_result(out, settings, outcomes, protocol_only=layout is not None)
    what = "co-simulation" if layout is None else "protocol only"
    print(f"\n{settings.strategy.name}, {what}; seconds are virtual")
    if about:
        print(about)
    print(simulation.about(settings.machine))
    for line in simulation.outcome_table(outcomes):
        print(line)


def write_result(
    out: Path, settings: Config, outcomes: list[Outcome], *, protocol_only: bool
) -> None:
    """Write simulate.json."""
    from mpilm.storage.runlog import write_summary

    result = {
        "simulated": True,
        "protocol_only": protocol_only,
        "config": settings.to_dict(),
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
    write_summary(out / "simulate.json", result)


def more_help() -> str:
    """Return the table of the machines that ship."""
    from mpilm.simulate.machines import find_machine, shipped

    names = shipped()
    width = max(map(len, names))
    rows = [f"    {name:<{width}}  {find_machine(name).about}" for name in names]
    return "\n".join(["", "machines (--machine NAME):", "", *rows])


def strategy_names(text: str) -> list[str]:
    """Return the names in a list, each of them once.

    >>> strategy_names("allreduce, adpsgd,allreduce"), strategy_names("")
    (['allreduce', 'adpsgd'], [])
    """
    return list(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
