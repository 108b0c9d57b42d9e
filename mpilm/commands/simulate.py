"""`mpilm simulate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from mpilm.convert import whole_number
from mpilm.errors import ConfigError

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
        set_: override a setting: section.key=value
    """
    from mpilm.config import read_config
    from mpilm.simulate import simulation
    from mpilm.simulate.machines import find_machine
    from mpilm.storage.files import reason, require_apart
    from mpilm.storage.runlog import write_summary
    from mpilm.train.folder import RunFolder

    numbers = rank_counts(ranks)
    found = find_machine(machine) if machine else None
    settings = read_config(config, (*(found.settings if found else ()), *set_))
    if steps is not None and steps < 1:
        raise ConfigError(f"--steps {steps}: must be 1 or more")
    simulation.ideal_samples_per_s(settings, 1)
    for count in numbers:
        settings.faults.check(count)
    folders = [RunFolder(out / f"ranks-{count:04d}") for count in numbers]
    written = [out / "simulate.json", *(p for f in folders for p in f.files())]
    require_apart(written, settings.inputs(config))
    for note in settings.notes:
        print(f"note: {note}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: cannot write: {reason(error)}") from None
    layout = simulation.model_layout(settings) if protocol_only else None
    outcomes = []
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
    what = "protocol only" if protocol_only else "co-simulation"
    print(f"\n{settings.strategy.name}, {what}; seconds are virtual")
    if found and found.about:
        print(f"{machine}: {found.about}")
    print(simulation.about(settings.machine))
    for line in simulation.outcome_table(outcomes):
        print(line)
    result = {
        "simulated": True,
        "protocol_only": protocol_only,
        "config": settings.to_dict(),
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
    write_summary(out / "simulate.json", result)
    return 0


def more_help() -> str:
    """Return the table of the machines that ship."""
    from mpilm.simulate.machines import find_machine, shipped

    names = shipped()
    width = max(map(len, names))
    rows = [f"    {name:<{width}}  {find_machine(name).about}" for name in names]
    return "\n".join(["", "machines (--machine NAME):", "", *rows])


def rank_counts(text: str) -> list[int]:
    """Return the numbers in a list such as "4,8,16", each of them once.

    >>> rank_counts("4,8, 16,8"), rank_counts("1e3")
    ([4, 8, 16], [1000])

    Raises:
        ConfigError: not such a list.
    """
    try:
        numbers = [whole_number(word) for word in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise ConfigError(f"--ranks {text}: write numbers of ranks, such as 4,8,16")
    return list(dict.fromkeys(numbers))
