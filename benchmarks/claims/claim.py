"""What the claims of the papers share: header, stored points, verdict, command line.

A claim is a script with a header (Claim, Source, Set-up, Decision), a function
`measure(study)` and, once it is measured, WHY: verdict -> what to say of it. `measure`
asks the study for points and returns a `Finding`. What is not there is measured; or,
where nothing may be measured, the claim is "not run yet". So the verdict is computed
from the file, by the rule that stands in the header.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import environment
from points import ROOT, Point, Points, write_json

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "claims"
CACHE = ROOT / "build" / "claims"  # corpora
FIELDS = ("Claim", "Source", "Set-up", "Decision")
REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
INCONCLUSIVE, NOT_RUN = "inconclusive", "not run yet"
IDS = (  # the order of the page: cheapest first
    *("averaging_speedup", "adpsgd_rate", "ring_randomisation", "adpsgd_stragglers"),
    *("delay_by_one_fastest", "bmuf_rule", "ema_final_model", "ng_averaging"),
    *("adpsgd_large_batch", "sampled_traffic", "gossip_bmuf_quality"),
    *("restricted_network", "rbm_averaging", "period_batch_schedule"),
)
ALONE = ("averaging_speedup", "restricted_network")  # they measure real time
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Finding:
    """What a claim came to.

    verdict  one of the four above
    numbers  with their spread over the seeds, lines of Markdown
    because  which conditions of the rule decided
    """

    verdict: str
    numbers: Sequence[str] = ()
    because: str = ""


def judged(
    parts: Sequence[str], *, holds: Mapping[str, bool], refutes: Mapping[str, bool]
) -> Finding:
    """Return what the conditions of a rule come to.

    Args:
        parts: the numbers, lines that the page shows.
        holds: condition -> whether it is met; reproduced if all are.
        refutes: the same; not reproduced if one is.

    >>> judged(["1.2"], holds={"a below b": False}, refutes={"a far above b": False})
    Finding(verdict='inconclusive', numbers=['1.2'], because='Not met: a below b.')
    """
    numbers = list(parts)
    met = [name for name, is_met in refutes.items() if is_met]
    missed = [name for name, is_met in holds.items() if not is_met]
    if met:
        return Finding(NOT_REPRODUCED, numbers, f"Met: {'; '.join(met)}.")
    if missed:
        return Finding(INCONCLUSIVE, numbers, f"Not met: {'; '.join(missed)}.")
    return Finding(REPRODUCED, numbers)


def at_each(
    study: Study,
    setups: Mapping[str, Mapping[str, Any]],
    measure: Callable[[Study, Mapping[str, Any]], Finding],
) -> Finding:
    """Return what the last of several set-ups comes to, with the numbers of all.

    Args:
        setups: name -> what `measure` is to set; of a smoke test the last alone.
    """
    names = list(setups)[-1:] if study.smoke else list(setups)
    found = {name: measure(study, setups[name]) for name in names}
    numbers = []
    for name, finding in found.items():
        numbers.append(f"{name}: **{finding.verdict}**")
        numbers += [f"    * {part}" for part in finding.numbers]
    return replace(found[names[-1]], numbers=numbers)


class Study(Points):
    """The points of one claim, in its file.

    Args:
        id: of the claim.
        ends: when nothing more is begun, by time.monotonic(); in the past: what the
            file has is all there is.
        smoke: tiny sizes, one seed, no file.
        again: with a file of its own, under build/: what is in results/ is not read.

    seeds  of the runs
    """

    def __init__(
        self, id: str, *, ends: float, smoke: bool = False, again: bool = False
    ) -> None:
        self.id, self.smoke = id, smoke
        folder = CACHE if again else RESULTS
        self.out = None if smoke else folder / f"{id}.json"
        self.seeds = SEEDS[:1] if smoke else SEEDS
        self.settings: dict[str, Any] = {}
        points: list[Point] = []
        if self.out is not None and self.out.exists():
            points = json.loads(self.out.read_text())["points"]
        super().__init__(points, ends)

    def corpus(self, name: str, make: Callable[[Path], Any]) -> Path:
        """Return the corpus `name`, made by `make` if it is not there."""
        CACHE.mkdir(parents=True, exist_ok=True)
        path = CACHE / f"{'smoke-' if self.smoke else ''}{name}.h5"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                made = Path(folder) / path.name
                make(made)
                made.replace(path)
        return path

    def copied(self, read: Callable[[], Any], name: str) -> Any:
        """Return what another benchmark's file says, as it was copied last.

        Copied anew whenever something may be measured; None if there is no file yet.
        So a verdict changes when its claim is run, not when somebody else measures.
        """
        if self.ends:
            self.points = [point for point in self.points if point.get("of") != name]
        return self.get(lambda of: {"found": read()}, of=name)["found"]

    def save(self, finding: Finding | None = None) -> None:
        """Write the points, and what they came to once it is known."""
        if self.out is None:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        found = finding or Finding(NOT_RUN)
        document = {
            "claim": self.id,
            "environment": environment(),
            "verdict": found.verdict,
            "numbers": list(found.numbers),
            "because": found.because,
            "points": self.points,
        }
        write_json(self.out, document)


@dataclass(frozen=True)
class Claim:
    """A claim's script.

    header  the words of FIELDS
    why     verdict -> what to say of it beside the conditions that decided
    """

    id: str
    header: Mapping[str, str]
    measure: Callable[[Study], Finding]
    why: Mapping[str, str] = field(default_factory=dict)

    def stored(self) -> Finding:
        """Return what the stored points come to; nothing is measured."""
        try:
            return self.measure(Study(self.id, ends=0.0))
        except TimeoutError:
            return Finding(NOT_RUN)


def header_of(text: str) -> dict[str, str]:
    """Return the labelled paragraphs of a docstring, each as one line.

    >>> header_of("Ask.\\n\\nClaim       it is\\n            so\\nSource      x\\n")
    {'Claim': 'it is so', 'Source': 'x'}
    """
    pattern = rf"^({'|'.join(FIELDS)}) +(\S.*(?:\n {{12}}.*)*)"
    found = re.findall(pattern, text, re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in found}


def find(id: str) -> Claim:
    """Return the claim of a script of this folder."""
    module = importlib.import_module(id)
    header = header_of(module.__doc__ or "")
    missing = [name for name in FIELDS if name not in header]
    if missing:
        raise SystemExit(f"{id}.py: its header has no {', '.join(missing)}")
    return Claim(id, header, module.measure, getattr(module, "WHY", {}))


def carry_out(claim: Claim, *, ends: float, smoke: bool, again: bool = False) -> str:
    """Measure what is missing; return the verdict."""
    study = Study(claim.id, ends=ends, smoke=smoke, again=again)
    began_s = time.process_time()
    print(f"== {claim.id}", flush=True)
    try:
        finding = claim.measure(study)
    except TimeoutError:
        print("stopped: the same command goes on", flush=True)
        return NOT_RUN
    study.save(finding)
    took_s = time.process_time() - began_s
    word = "runs" if smoke else finding.verdict
    numbers = "\n".join(finding.numbers)
    print(f"{numbers}\n{claim.id}: {word} ({took_s:.0f} s)", flush=True)
    return finding.verdict


def main(ids: Sequence[str] = ()) -> None:
    """Carry out claims: those given, or the script that was started."""
    arguments = argparse.ArgumentParser(
        description="Measure what the claims lack; write each point; give the verdict."
    )
    own = Path(sys.argv[0]).stem
    if ids:
        arguments.add_argument("ids", nargs="*", metavar="ID", help=", ".join(ids))
    arguments.add_argument("--smoke", action="store_true", help="only see that it runs")
    arguments.add_argument(
        "--again", action="store_true", help="measure it all, into build/claims/"
    )
    arguments.add_argument("--minutes", type=float, default=180, help="then stop")
    if ids:
        cores = os.cpu_count() or 1
        arguments.add_argument("--jobs", type=int, default=cores, help="at one time")
    args = arguments.parse_args()
    chosen = (args.ids or list(ids)) if ids else [own]
    unknown = [id for id in chosen if id not in IDS]
    if unknown:
        raise SystemExit(f"no claim {', '.join(unknown)}; there are {', '.join(IDS)}")
    ends = time.monotonic() + 60 * args.minutes
    if ids and len(chosen) > 1:
        options = [f"--{name}" for name in ("smoke", "again") if getattr(args, name)]
        side_by_side(chosen, args.jobs, ends, options)
        return
    for id in chosen:
        carry_out(find(id), ends=ends, smoke=args.smoke, again=args.again)


def side_by_side(
    ids: Sequence[str], jobs: int, ends: float, options: Sequence[str]
) -> None:
    """Carry out claims as programs of their own, so many at a time; ALONE ones first.

    Raises:
        SystemExit: some failed; the others have ended.
    """

    def code(id: str) -> int:
        minutes = max(0.0, ends - time.monotonic()) / 60
        command = [sys.executable, str(HERE / f"{id}.py"), "--minutes", f"{minutes}"]
        return subprocess.run([*command, *options], check=False).returncode

    codes = {id: code(id) for id in ids if id in ALONE}
    others = [id for id in ids if id not in ALONE]
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        codes |= zip(others, pool.map(code, others), strict=True)
    if failed := [id for id, code in codes.items() if code]:
        raise SystemExit(f"failed: {', '.join(failed)}")


def mean(points: Sequence[Point], name: str = "test") -> float:
    """Return the mean of a value over points."""
    return statistics.fmean(point[name] for point in points)


def shown(values: Sequence[float], digits: int = 1) -> str:
    """Return a mean with its range.

    >>> shown([1.0, 2.0, 6.0])
    '3.0 (1.0 to 6.0)'
    """
    number, low, high = statistics.fmean(values), min(values), max(values)
    return f"{number:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
