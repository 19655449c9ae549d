"""Adds to the site what is outside of docs/: documents of the root, blocks of the README, Mermaid, links to code.

The address of the repository is `[project.urls]` in pyproject.toml. Without one, links to code become plain text.
"""

from __future__ import annotations

import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.parent
PAGES = {"CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md", "CONTRIBUTING.md": "contributing.md"}
"""Documents of the root, and their names on the site."""

STYLE = Path(__file__).parent / "site.css"
MERMAID = Path(__file__).parent / "node_modules/mermaid/dist/mermaid.min.js"

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s:#]+)(#[^)]*)?\)")
_TEST = re.compile(r"^<!-- test: .* -->\n", re.MULTILINE)
_INCLUDE = re.compile(r"^<!-- README: (\w+ \w+) -->\n", re.MULTILINE)


def on_config(config: MkDocsConfig) -> None:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    config.repo_url = project.get("urls", {}).get("Repository")
    config.extra_css.append("assets/site.css")
    if MERMAID.exists():  # otherwise the theme loads it from a CDN
        config.extra_javascript.append("assets/mermaid.min.js")


def on_files(files: Files, config: MkDocsConfig) -> None:
    for document, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / document).read_text("utf-8")))
    files.append(File.generated(config, "assets/site.css", abs_src_path=str(STYLE)))
    if MERMAID.exists():
        files.append(File.generated(config, "assets/mermaid.min.js", abs_src_path=str(MERMAID)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = next((root for root, name in PAGES.items() if name == page.file.src_uri), f"docs/{page.file.src_uri}")
    folder = posixpath.dirname(source)

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found[1], posixpath.normpath(posixpath.join(folder, found[2])), found[3] or ""
        if not (ROOT / target).exists():
            return found[0]  # MkDocs reports it
        name = PAGES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if name is not None:
            if target.endswith(".md") and text in (target, posixpath.basename(target)):
                text = title_of(target)
            return f"[{text}]({posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"
        return f"[{text}]({config.repo_url}/blob/HEAD/{target}{anchor})" if config.repo_url else text

    return _LINK.sub(link, _TEST.sub("", _INCLUDE.sub(block, markdown)))


def title_of(document: str) -> str:
    """What replaces a link text that is a file name."""
    return (ROOT / document).read_text("utf-8").partition("\n")[0].removeprefix("# ")


def block(found: re.Match[str]) -> str:
    """The block of the README that has this test comment."""
    readme = (ROOT / "README.md").read_text("utf-8")
    code = re.search(rf"^<!-- test: {found[1]} -->\n(```.*?^```\n)", readme, re.MULTILINE | re.DOTALL)
    if code is None:
        raise PluginError(f"README.md has no block {found[1]!r}")
    return code[1]
