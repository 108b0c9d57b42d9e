"""What mkdocs needs to make a site of pages that are also read as they lie in docs/.

Links     A page links to any file of the project by its relative path, as a code host
          wants it. Files outside docs/ that are linked become pages of the site: a
          Markdown file as it is, any other one as a block of code.
Headers   The line <!-- header: ../mpilm/strategies/bmuf.py --> becomes that module's
          docstring: a strategy's equations stand once, in its module.
Home      The README of the project; docs/README.md is the index of whoever reads the
          files.

Whatever cannot be found is a warning, which `mkdocs build --strict` makes an error.
"""

from __future__ import annotations

import ast
import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LOG = logging.getLogger("mkdocs.hooks.mpilm")
ROOT = Path(__file__).parents[1]
HOME = "README.md"
OUTSIDE = (HOME, "CONTRIBUTING.md", "CHANGELOG.md", "jobs/README.md")  # in the nav
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(#[^)\s]*)?(?=\))")
HEADER = re.compile(r"^<!-- header: (\S+) -->$", re.MULTILINE)
LANGUAGES = {".py": "python", ".toml": "toml", ".sh": "sh"}


def page_of(path: str) -> str:
    """Return where the file at `path`, from the root of the project, is in the site."""
    if path in (HOME, "docs/README.md"):
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"files/{path}" if path.endswith(".md") else f"files/{path}.md"


def path_of(page: str) -> str:
    """Return which file of the project a page of the site is: of Markdown alone."""
    if page == "index.md":
        return HOME
    if page.startswith("files/"):
        return page.removeprefix("files/")
    return f"docs/{page}"


def target(path: str, link: str) -> str:
    """Return the file that `link` means in the file at `path`, both from the root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def content_of(path: str) -> str:
    """Return a file as Markdown."""
    text = (ROOT / path).read_text()
    if path.endswith(".md"):
        return text
    language = LANGUAGES.get(Path(path).suffix, "")
    return f"# {path}\n\n~~~~ {language}\n{text}~~~~\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README and all files outside docs/ that a page links to."""
    inside = (file.src_uri for file in files.documentation_pages())
    waiting = [*OUTSIDE, *map(path_of, inside)]
    seen = {*waiting, "docs/README.md"}
    while waiting:
        path = waiting.pop()
        if not path.startswith("docs/"):
            page = File.generated(config, page_of(path), content=content_of(path))
            files.append(page)
        if not path.endswith(".md"):
            continue
        for link, _ in LINK.findall((ROOT / path).read_text()):
            found = target(path, link)
            if found not in seen and (ROOT / found).is_file():
                seen.add(found)
                if not found.startswith("docs/"):
                    waiting.append(found)
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Fill in headers of modules, and let links point at pages of the site."""
    here = page.file.src_uri
    path = path_of(here)
    if not path.endswith(".md") or not (ROOT / path).exists():
        return markdown

    def site_link(match: re.Match[str]) -> str:
        link, anchor = match.groups()
        found = target(path, link)
        if not (ROOT / found).is_file():
            LOG.warning("%s links to %s, which is no file", path, link)
            return match.group()
        start = posixpath.dirname(here) or "."
        return posixpath.relpath(page_of(found), start) + (anchor or "")

    def header(match: re.Match[str]) -> str:
        found = ROOT / target(path, match.group(1))
        text = ast.get_docstring(ast.parse(found.read_text())) if found.exists() else ""
        if not text:
            LOG.warning("%s: no header in %s", path, match.group(1))
        return f"~~~~\n{text}\n~~~~"

    return HEADER.sub(header, LINK.sub(site_link, markdown))
