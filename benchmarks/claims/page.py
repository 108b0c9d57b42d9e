"""Write what the claims came to: docs/claims.md, and the short table of the README.

    python benchmarks/claims/page.py
    python benchmarks/claims/page.py --check     # exit code 1: they are not current

Computed from benchmarks/results/claims/ alone, by the rules in the scripts' headers.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from claim import IDS, NOT_RUN, RESULTS, Claim, Finding, find
from points import ROOT, write_json

PAGE, README = ROOT / "docs" / "claims.md", ROOT / "README.md"
BEGIN, END = "<!-- claims: begin -->", "<!-- claims: end -->"
Rows = Sequence[tuple[Claim, Finding]]


def rows() -> Rows:
    """Return every claim and what its stored points come to."""
    claims = [find(id) for id in IDS]
    return [(claim, claim.stored()) for claim in claims]


def cell(text: str) -> str:
    """Return text as a cell of a table."""
    return text.replace("|", "\\|")


def command(id: str) -> str:
    """Return what measures a claim."""
    return f"python benchmarks/claims/{id}.py"


def why(claim: Claim, finding: Finding) -> str:
    """Return what there is to say of a verdict."""
    if finding.verdict == NOT_RUN:
        return f"`{command(claim.id)}` measures it"
    said = claim.why.get(finding.verdict, "")
    return f"{finding.because or 'Every condition is met.'} {said}".strip()


def long_table(found: Rows) -> str:
    """Return the table of docs/claims.md; below it each claim's rule and numbers."""
    lines = ["| claim | source | verdict | why |", "|---|---|---|---|"]
    for claim, finding in found:
        link = f"[{claim.id}](#{claim.id})"
        cells = [
            f"{link}: {claim.header['Claim']}",
            claim.header["Source"],
            f"**{finding.verdict}**",
            why(claim, finding),
        ]
        lines.append(f"| {' | '.join(map(cell, cells))} |")
    for claim, finding in found:
        lines += [
            "",
            f"### {claim.id}",
            "",
            f"[{claim.id}.py](../benchmarks/claims/{claim.id}.py):"
            f" **{finding.verdict}**",
            "",
            f"* Set-up: {claim.header['Set-up']}.",
            f"* Decision, written before anything was measured:"
            f" {claim.header['Decision']}.",
            "",
            *(
                f"{'' if line.startswith(' ') else '* '}{line}"
                for line in finding.numbers
            ),
        ]
    return "\n".join(lines)


def short_table(found: Rows) -> str:
    """Return the table of the README."""
    lines = ["| claim | verdict |", "|---|---|"]
    for claim, finding in found:
        text = f"[{claim.id}](docs/claims.md#{claim.id}): {claim.header['Claim']}"
        lines.append(f"| {cell(text)} | {finding.verdict} |")
    return "\n".join(lines)


def with_table(page: Path, table: str) -> str:
    """Return the text of a page with the table between its marks.

    Raises:
        SystemExit: it has no marks.
    """
    text = page.read_text()
    pattern = re.escape(BEGIN) + r".*?" + re.escape(END)
    if len(re.findall(pattern, text, re.DOTALL)) != 1:
        raise SystemExit(f"{page}: needs one {BEGIN} and one {END}")
    return re.sub(pattern, lambda _: f"{BEGIN}\n{table}\n{END}", text, flags=re.DOTALL)


def renew(claim: Claim, finding: Finding) -> None:
    """Let a claim's file say what its points come to."""
    path = RESULTS / f"{claim.id}.json"
    if path.exists():
        document = json.loads(path.read_text())
        said = dataclasses.asdict(finding)
        if document | said != document:
            write_json(path, document | said)


def main() -> None:
    """Write the pages, or check them."""
    found = rows()
    if "--check" not in sys.argv[1:]:
        for claim, finding in found:
            renew(claim, finding)
    stale = []
    for page, table in ((PAGE, long_table(found)), (README, short_table(found))):
        text = with_table(page, table)
        if text != page.read_text():
            stale.append(page.name)
            if "--check" not in sys.argv[1:]:
                page.write_text(text)
    if "--check" in sys.argv[1:] and stale:
        raise SystemExit(f"not current: {', '.join(stale)}; run {command('page')}")
    for claim, finding in found:
        print(f"{finding.verdict:<15} {claim.id}")


if __name__ == "__main__":
    main()
