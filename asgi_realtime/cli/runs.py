"""`runs URL`: prints the runs that changed last, as the inspector lists them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from typing import Any

from asgi_realtime.cli import secret
from asgi_realtime.cli.terminal import harmless, print_line
from asgi_realtime.core.errors import BrokerUnavailable, UsageError

PERIOD_S = 1.0
_DEFAULT_LIMIT = 20


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "runs",
        help="list the runs that changed last",
        description="List the runs that changed last, the newest at the end, as the inspector does. The server needs"
        " Realtime(inspector=True).",
    )
    parser.add_argument("url", metavar="URL", help="the mount URL, such as https://example.com/realtime")
    parser.add_argument("--task", metavar="TASK", help="only runs of this task")
    parser.add_argument("--status", metavar="STATUS", help="only runs with one of these: FAILED,CRASHED")
    parser.add_argument("--tag", metavar="TAG", help="only runs with this tag")
    parser.add_argument("--limit", metavar="N", type=int, default=_DEFAULT_LIMIT, help="at most so many (default: 20)")
    parser.add_argument("--follow", action="store_true", help="continue, and print each run again when it changes")
    parser.add_argument("--json", action="store_true", help="print each run as one line of JSON")
    secret.add(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from asgi_realtime.cli.checks import make_http  # needs httpx
    from asgi_realtime.client.arguments import check_base_url

    url, key = check_base_url(args.url, name="URL"), secret.find(args)
    if not key:
        raise UsageError(f"no secret key: set ${secret.VARIABLE}, or pass --secret-key-file")
    query = {name: getattr(args, name) for name in ("task", "status", "tag", "limit") if getattr(args, name)}
    printed: dict[str, int] = {}
    with make_http() as http:
        while True:
            state = _ask(http, f"{url}/inspect/runs", query, key)
            if state["isSample"] and not printed:
                text = f"a sample: the {state['listed']} runs that changed last and failed last"
                print(harmless(text, sys.stderr), file=sys.stderr)  # noqa: T201
            for row in reversed(state["runs"]):
                if printed.get(row["id"]) != row["version"]:
                    print_line(json.dumps(row, ensure_ascii=False) if args.json else _line(row))
            printed = {row["id"]: row["version"] for row in state["runs"]}
            if not args.follow:
                return 0
            time.sleep(PERIOD_S)


def _ask(http: Any, url: str, query: dict[str, Any], key: str) -> dict[str, Any]:
    import httpx

    from asgi_realtime.client.errors import error_from_response

    try:
        response = http.get(url, params=query, headers={"authorization": f"Bearer {key}".encode()})
    except httpx.HTTPError as exc:
        raise BrokerUnavailable(f"{url} cannot be reached: {exc or type(exc).__name__}") from exc
    if response.status_code == 404:
        raise UsageError("the server has no inspector; turn it on with Realtime(inspector=True), or correct the URL")
    if response.status_code != 200:
        raise error_from_response(response.status_code, response.headers, response.content)
    found: dict[str, Any] = response.json()
    return found


def _line(row: dict[str, Any]) -> str:
    created = datetime.fromtimestamp(row["createdAtMs"] / 1000, UTC)
    end_ms = row.get("finishedAtMs") or time.time() * 1000
    took = f"{max(0.0, end_ms - row['startedAtMs']) / 1000:.1f} s" if row.get("startedAtMs") else "-"
    fields = [f"{created:%H:%M:%S}", row["id"], f"{row['status']:<9}", f"{took:>8}", row["task"]]
    return "  ".join(filter(None, [*fields, row.get("error", ""), " ".join(row.get("tags", []))]))
