"""The package's version and the changelog agree."""

from __future__ import annotations

import re
from pathlib import Path

import asgi_realtime

CHANGELOG = Path(__file__).parent.parent / "CHANGELOG.md"


def test_changelog_names_the_version_or_is_ahead_of_it() -> None:
    newest = re.search(r"^## \[?(Unreleased|\d+\.\d+\.\d+)", CHANGELOG.read_text(), re.MULTILINE)
    assert newest is not None, "CHANGELOG.md has no section"
    assert newest[1] in ("Unreleased", asgi_realtime.__version__)
