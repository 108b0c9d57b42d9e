"""`mpilm plan`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mpilm.convert import counts_in, whole_number
from mpilm.errors import ConfigError, say

if TYPE_CHECKING:
    from mpilm.config import Config
    from mpilm.simulate.curves import StoredCurve
    from mpilm.simulate.plan import Candidate, Row

STEPS = 50  # chosen, not tuned


def plan(
    config: tyro.conf.Positional[Path],
    /,
    *,
    ranks: int,
    machine: str = "",
    out: Path | None = None,
    json: Path | None = None,
    throughput: bool = False,
    strategies: str = "",
    periods: str = "",
    batches: str = "",
    finalists: int = 6,
    steps: int | None = None,
    curves: tuple[Path, ...] = (),
    vocab: int = 0,
    classes: int = 0,
    inputs: int = 40,
    set_: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set")
    ] = (),
) -> int:
    """Choose strategy, period and batch for a model, its data and a cluster.

    Candidates speak their protocol in virtual time; the most promising then train, all
    for the same virtual seconds, and the lowest loss wins. Says why, and writes the
    configuration (docs/plan.md).

    Args:
        config: TOML file: the model, the data, the optimiser
        ranks: of the cluster
        machine: one that ships (`mpilm simulate --help`) or a file with a [machine];
            that of the configuration if not given
        out: file to write the recommended configuration to
        json: file to write all that was found to
        throughput: train nothing; recommend by speed and drift alone
        strategies: to choose from, such as allreduce,bmuf; if not given, all
        periods: to choose from, such as 5,20; if not given, 2,10,50
        batches: to choose from, such as 20,40=0.15: with the seconds of a gradient, or
            without: in proportion; if not given, the configured one
        finalists: how many are trained
        steps: minibatches of a rank that never waits in the time that all get; if not
            given, 50, or as many as all curves reach
        curves: folders of runs or co-simulations of this model on so many ranks: their
            perplexity against samples takes the place of training
        vocab: words of the language model: `--throughput` needs no corpus then
        classes: of the acoustic model, likewise
        inputs: of the acoustic model without a corpus: features x spliced frames
        set_: override a setting: section.key=value
    """
    from mpilm.config import read_config
    from mpilm.simulate import plan as plans
    from mpilm.simulate.curves import equal_time_s, expect
    from mpilm.simulate.machines import find_machine
    from mpilm.simulate.simulation import about, ideal_samples_per_s, model_layout
    from mpilm.storage.files import require_apart, write_json

    for name, number in (("ranks", ranks), ("finalists", finalists), ("steps", steps)):
        if number is not None and number < 1:
            raise ConfigError(f"--{name} {number}: must be 1 or more")
    if curves and (throughput or strategies or periods or batches):
        raise ConfigError(
            "--curves: strategies, periods and batches are those of the runs, and"
            " nothing is left out: no --strategies, --periods, --batches, --throughput"
        )
    if (vocab or classes) and not throughput:
        raise ConfigError("--vocab, --classes: only with --throughput")
    found = find_machine(machine) if machine else None
    settings = read_config(config, (*(found.settings if found else ()), *set_))
    ideal_samples_per_s(settings, ranks)
    settings.faults.check(ranks)
    stored: list[StoredCurve] = []
    if curves:
        stored = stored_curves(curves, settings, ranks)
        chosen: list[Candidate] = [curve.candidate for curve in stored]
    else:
        names = checked_strategies(strategies)
        chosen = plans.candidates(
            settings,
            names or plans.default_strategies(settings, ranks),
            counts_in("--periods", periods) if periods else plans.PERIODS,
            batch_steps(batches) if batches else {settings.train.batch: 0.0},
        )
    written = [path for path in (out, json) if path is not None]
    require_apart(written, settings.inputs(config))
    layout = model_layout(settings, vocab=vocab, classes=classes, inputs=inputs)
    rows = [plans.Row(candidate) for candidate in chosen]
    for row in rows:
        plans.play(settings, row, layout, ranks)
    if not any(row.spoken for row in rows):
        raise ConfigError(f"{config}: no candidate can run: {rows[0].why}")
    step_s = settings.machine.step_s + settings.machine.update_s
    budget_s = (steps or STEPS) * step_s
    if stored:
        if steps is None:
            budget_s = equal_time_s(rows, stored)
        for row, curve in zip(rows, stored, strict=True):
            expect(row, curve, budget_s)
        if not any(row.trained for row in rows):
            why = next(row.why for row in rows if row.spoken)
            raise ConfigError(f"--curves: no run reaches {budget_s:.4g} s: it {why}")
    elif not throughput:
        train_some(settings, plans.finalists(rows, finalists), ranks, budget_s)
        if not any(row.trained for row in rows):
            why = next(row.why for row in rows if row.spoken and row.why)
            raise ConfigError(f"{config}: no candidate can be trained: {why}")
        train_some(settings, plans.neighbours(rows), ranks, budget_s)
    best = plans.ranked(rows)
    failed = [row for row in rows if row.spoken is None]
    print(f"{ranks} ranks; seconds are virtual, {settings.model.name} of", end=" ")
    print(f"{layout.size:,} parameters")
    print(about(settings.machine))
    for line in (
        *plans.table([*plans.worth_showing(best), *failed]),
        "",
        *plans.reasons(best, budget_s, stored=bool(stored)),
    ):
        print(line)
    recommended = best[0].candidate.applied(settings)
    if out is not None:
        write_config(out, recommended, str(best[0].candidate))
        print(f"written: {out}")
    if json is not None:
        found_all: dict[str, Any] = {"simulated": True, "ranks": ranks}
        found_all["budget_s"] = budget_s
        found_all["curves"] = [str(path) for path in curves]
        found_all["rows"] = [row.to_dict() for row in (*best, *failed)]
        write_json(json, found_all, indent=1)
    return 0


def stored_curves(
    paths: Sequence[Path], config: Config, ranks: int
) -> list[StoredCurve]:
    """Return the curves of stored runs; say which runs are left out, and why.

    Raises:
        ConfigError: none of them is of this model, data and number of ranks.
    """
    from mpilm.simulate.curves import read_curves

    found, problems = read_curves(paths, config, ranks)
    if not found:
        more = f" ({len(problems)} runs left out)" if len(problems) > 1 else ""
        raise ConfigError(f"--curves: {problems[0]}{more}")
    for problem in problems:
        say(f"left out: {problem}")
    return found


def train_some(config: Config, rows: list[Row], ranks: int, budget_s: float) -> None:
    """Train the finalists, each for the same virtual seconds; say how far it is."""
    from mpilm.simulate.plan import co_train

    with (
        tempfile.TemporaryDirectory(prefix="mpilm-plan-") as folder,
        open(os.devnull, "w") as nowhere,
    ):
        for number, row in enumerate(rows, 1):
            say(f"training {number}/{len(rows)}: {row.candidate}")
            with redirect_stdout(nowhere):
                co_train(config, row, ranks, budget_s, Path(folder) / str(number))


def write_config(path: Path, config: Config, what: str) -> None:
    """Write the recommended configuration.

    Raises:
        ConfigError: that cannot be written.
    """
    from mpilm.storage.files import reason, replace_file

    head = f"# chosen by mpilm plan: {what}\n\n".encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, head + config.encoded())
    except OSError as error:
        raise ConfigError(f"{path}: cannot write: {reason(error)}") from None


def checked_strategies(text: str) -> list[str]:
    """Return the names of strategies in a list, each of them once.

    Raises:
        ConfigError: there is no such strategy.
    """
    from mpilm.commands.simulate import strategy_names
    from mpilm.convert import unknown
    from mpilm.strategies import STRATEGIES

    names = strategy_names(text)
    for name in names:
        if name not in STRATEGIES:
            raise ConfigError(f"--strategies: {unknown('name', name, STRATEGIES)}")
    return names


def batch_steps(text: str) -> dict[int, float]:
    """Return batches and the seconds of their gradient, 0.0 where not given.

    >>> batch_steps("20,40=0.15")
    {20: 0.0, 40: 0.15}

    Raises:
        ConfigError: not such a list.
    """
    found: dict[int, float] = {}
    try:
        for word in text.split(","):
            batch, equals, seconds = word.partition("=")
            found[whole_number(batch)] = float(seconds) if equals else 0.0
            if equals and not 0.0 < float(seconds) < float("inf"):
                raise ValueError
    except ValueError:
        found = {0: 0.0}
    if min(found) < 1:
        raise ConfigError(f"--batches {text}: write numbers, such as 20,40=0.15")
    return found
