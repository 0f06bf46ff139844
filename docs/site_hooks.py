"""The site is made of the repository as it lies: README.md is its home, links stay as on GitHub.

Every page keeps its path from the root of the repository, so a link that works there works here,
also one to a file that is no page, such as a table of results.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")
MORE = "More"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds pages that the navigation does not name."""
    named = set(_paths(config.nav))
    more = [page for page in _pages(_root(config)) if page not in named]
    if more:
        config.nav = [*config.nav, {MORE: more}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages from the root of the repository, and the files that they link to."""
    root = _root(config)
    # What the theme and the plugins brought stays; what mkdocs found in docs/ comes by its path.
    kept = [file for file in files if file.src_dir != config.docs_dir]
    pages = _pages(root)
    linked = {target for page in pages for target in _linked_files(root, page)}
    ours = [_file(path, config) for path in [*pages, *sorted(linked - set(pages))]]
    return Files([*kept, *ours])


def _root(config: MkDocsConfig) -> Path:
    return Path(config.docs_dir).parent


def _pages(root: Path) -> list[str]:
    found = sorted((root / "docs").rglob("*.md"))
    return ["README.md", *(path.relative_to(root).as_posix() for path in found)]


def _file(path: str, config: MkDocsConfig) -> File:
    return File(path, str(_root(config)), config.site_dir, config.use_directory_urls)


def _linked_files(root: Path, page: str) -> set[str]:
    """Files of the repository that a page links to or shows, by their paths from its root."""
    text = (root / page).read_text(encoding="utf-8")
    targets = [(root / page).parent / target for target in LINK.findall(text) if ":" not in target]
    inside = [t.resolve() for t in targets if t.is_file() and t.resolve().is_relative_to(root)]
    return {target.relative_to(root).as_posix() for target in inside}


def _paths(nav: object) -> list[str]:
    """All paths that a navigation names."""
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav or []
    return [path for entry in entries for path in _paths(entry)]
