"""The documentation as it lies there: links, files and pages that it names exist."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from mpilm import __version__
from mpilm.config import SECTIONS
from mpilm.convert import fields_of
from mpilm.strategies import STRATEGIES
from mpilm.world.base import World

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("jobs/*.md")],
    key=str,
)
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
LINK = re.compile(r"\]\(([^)#\s:]*)(#[^)\s]*)?\)")
OF_A_WORLD = {*dir(World), *World.__annotations__}  # `world` is an object, too
NO_SETTINGS = {("model", "loss"), ("model", "json")}  # a method, a file
FOLDERS = "mpilm|docs|tests|benchmarks|jobs|examples|tools"
FILE = re.compile(rf"(?<![\w/.])(?:{FOLDERS})/[\w/.-]*\.(?:py|md|toml|json|sh|css)\b")


def anchors(page: Path) -> set[str]:
    """Return what links may name after a #: the headings, as code hosts write them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", heading).lower() for heading in headings)
    return {"#" + re.sub(r"[-\s]+", "-", text.strip()) for text in words}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link, anchor in LINK.findall(page.read_text()):
        target = (page.parent / link).resolve() if link else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link + anchor)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_that_are_named_exist(page: Path) -> None:
    named = set(FILE.findall(page.read_text()))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_tests_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(r"(tests/[\w/]+\.py)::(test_\w+)", page.read_text()))
    missing = [
        f"{file}::{test}"
        for file, test in sorted(named)
        if not re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE)
    ]
    assert missing == []


def test_every_promise_names_a_test() -> None:
    page = (ROOT / "docs/reliability.md").read_text().partition("## Measured")[0]
    rows = [row.split("|")[1:3] for row in re.findall(r"^\| .*$", page, re.MULTILINE)]
    promises = [row for row in rows if row[0].strip() != "promise"]
    assert promises
    assert [promise for promise, test in promises if "::test_" not in test] == []


def is_there(name: str) -> bool:
    """Return whether a dotted name is a module of mpilm, or a name in one."""
    path, parts = ROOT, name.split(".")
    while parts and (path / parts[0]).is_dir():
        path /= parts.pop(0)
    if parts and (path / f"{parts[0]}.py").exists():
        path /= f"{parts.pop(0)}.py"
    else:
        path /= "__init__.py"
    text = path.read_text() if path.exists() else ""
    return path.exists() and (not parts or bool(re.search(rf"\b{parts[0]}\b", text)))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_modules_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"(?<![\w/.-])(mpilm(?:\.[a-z]\w*)+)", page.read_text())
    names = {name for name in named if not name.endswith((".egg", ".oNUMBER"))}
    assert [name for name in sorted(names) if not is_there(name)] == []


def settings_of(section: str) -> set[str]:
    """Return the keys of a section, of all its choices together."""
    kind = SECTIONS[section]
    kinds = [*kind[0].values()] if isinstance(kind, tuple) else [kind]
    return {"name"}.union(*(fields_of(kind) for kind in kinds))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_settings_that_are_named_exist(page: Path) -> None:
    sections = "|".join(SECTIONS)
    form = rf"(?:`|--set '?)({sections})\.(\w+)(?=[`=.( ])"
    named = set(re.findall(form, page.read_text())) - NO_SETTINGS
    named = {n for n in named if n[0] != "world" or n[1] not in OF_A_WORLD}
    assert [".".join(n) for n in named if n[1] not in settings_of(n[0])] == []


@pytest.mark.parametrize("name", [*STRATEGIES, "ema"])
def test_a_strategy_page_shows_the_header_of_its_module(name: str) -> None:
    """The site fills it in (docs/hooks.py); readers of the file follow the link."""
    module = f"../mpilm/strategies/{name}.py"
    page = (ROOT / f"docs/{name}.md").read_text()
    assert f"<!-- header: {module} -->" in page
    assert f"]({module})" in page
    assert f"]({name}.md)" in (ROOT / "docs/README.md").read_text()
    assert f"{name}.md" in (ROOT / "mkdocs.yml").read_text()


def test_every_page_is_in_the_index() -> None:
    linked = {link for link, _ in LINK.findall((ROOT / "docs/README.md").read_text())}
    pages = {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"}
    assert pages - linked == set()


def test_the_snippet_of_the_readme_is_part_of_the_example() -> None:
    """A test runs the example: tests/launch/test_own_model.py."""
    (snippet,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    assert (
        textwrap.indent(snippet, 4 * " ")
        in (ROOT / "examples/own_model.py").read_text()
    )


def test_the_tree_of_the_readme_has_every_folder() -> None:
    tree = (ROOT / "README.md").read_text().partition("## The tree")[2]
    folders = {path.parent.name for path in ROOT.glob("mpilm/*/__init__.py")}
    assert {name for name in folders if f" {name}/" not in tree} == set()


def test_the_changelog_dates_the_version_of_the_package() -> None:
    dated = re.findall(
        r"^## \[(\d\S*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert dated[0][0] == __version__
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in dated)
