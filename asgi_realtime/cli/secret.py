"""Where commands have the secret key from: the environment, or a file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from asgi_realtime.core.errors import UsageError

VARIABLE = "REALTIME_SECRET_KEY"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--secret-key-file", metavar="FILE", type=Path, help=f"a file with the secret key, in place of ${VARIABLE}"
    )


def find(given: argparse.Namespace) -> str | None:
    """The secret key, or None if there is none. Raises `UsageError` for a file that cannot be read."""
    path: Path | None = given.secret_key_file
    if path is None:
        return os.environ.get(VARIABLE) or None
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"the secret key cannot be read from {path}: {exc}") from exc


def need(given: argparse.Namespace) -> str:
    """The secret key. Raises `UsageError` if there is none."""
    found = find(given)
    if found is None:
        raise UsageError(f"there is no secret key: set ${VARIABLE}, or name a file with --secret-key-file")
    return found
