"""`doctor URL`: checks a deployment the way a browser would, and says how to fix what blocks streams.

It sees only the path from this machine, so it misses proxies that other clients pass through.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from asgi_realtime.cli.findings import Finding, Mark
from asgi_realtime.cli.terminal import harmless, split_url
from asgi_realtime.core.config import Cors
from asgi_realtime.core.errors import UsageError


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check what blocks streams to browsers",
        description="Check a server the way a browser would: health, HTTP version, streaming, clock, CORS.",
    )
    parser.add_argument(
        "url", metavar="URL", help="the mount URL of the Realtime, such as https://example.com/realtime"
    )
    parser.add_argument("--origin", metavar="ORIGIN", help="check CORS for pages of this origin: https://app.example")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    expected = "URL must be the mount URL of the Realtime, such as https://example.com/realtime"
    split_url(args.url, expected)
    if "?" in args.url or "#" in args.url:
        raise UsageError(expected)
    if args.origin is not None:
        Cors([args.origin])  # raises for an origin that no browser sends
    try:
        from asgi_realtime.cli.checks import examine
    except ModuleNotFoundError as exc:
        raise UsageError("doctor needs httpx: pip install 'asgi_realtime[client]'") from exc
    failed = False
    paint = _painter()
    for finding in examine(args.url.rstrip("/"), args.origin):
        print(paint(finding), flush=True)  # noqa: T201
        failed = failed or finding.mark is Mark.BAD
    return 1 if failed else 0


def _painter() -> Callable[[Finding], str]:
    can_show_signs = _can_show("".join(mark.value[0] for mark in Mark))
    use_colors = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def paint(finding: Finding) -> str:
        sign, color = finding.mark.value
        label = sign if can_show_signs else finding.mark.name
        if use_colors:
            label = f"\033[{color}m{label}\033[0m"
        return f"{label} {harmless(finding.text)}" + (f"\n    {harmless(finding.cure)}" if finding.cure else "")

    return paint


def _can_show(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
