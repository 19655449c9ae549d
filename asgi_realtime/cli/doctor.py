"""`doctor URL`: checks a deployment the way a browser would, and says how to fix what blocks streams.

It sees only the path from this machine, so it misses proxies that other clients pass through.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from asgi_realtime.cli.findings import Finding, Mark
from asgi_realtime.cli.terminal import harmless
from asgi_realtime.core.config import Cors


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
    if args.origin is not None:
        Cors([args.origin])  # raises for an origin that no browser sends
    from asgi_realtime.cli.checks import examine  # needs httpx
    from asgi_realtime.client.arguments import check_base_url

    failed = False
    for finding in examine(check_base_url(args.url, name="URL"), args.origin):
        print(_paint(finding), flush=True)  # noqa: T201
        failed = failed or finding.mark is Mark.BAD
    return 1 if failed else 0


def _paint(finding: Finding) -> str:
    sign, color = finding.mark.value
    can_show_signs = "✓".encode(sys.stdout.encoding or "ascii", "ignore")
    label = sign if can_show_signs else finding.mark.name
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        label = f"\033[{color}m{label}\033[0m"
    return f"{label} {harmless(finding.text)}" + (f"\n    {harmless(finding.cure)}" if finding.cure else "")
