"""Where commands read the secret key: from the environment, or from a file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from asgi_realtime.core.errors import UsageError

VARIABLE = "REALTIME_SECRET_KEY"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--secret-key-file", metavar="FILE", type=Path, help=f"a file with the secret key, instead of ${VARIABLE}"
    )


def find(args: argparse.Namespace) -> str | None:
    """The secret key, or None if there is none. Raises `UsageError` for an unreadable file."""
    path: Path | None = args.secret_key_file
    if path is None:
        return os.environ.get(VARIABLE) or None
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"cannot read the secret key from {path}: {exc}") from exc
