"""`tail URL`: prints a stream, a run, the runs with some tags, or a batch, as it changes."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from asgi_realtime.cli import secret
from asgi_realtime.cli.terminal import HarmlessFormatter, harmless, print_line, split_half
from asgi_realtime.core.errors import InvalidToken, UsageError
from asgi_realtime.tokens import TokenAuthority

if TYPE_CHECKING:
    from asgi_realtime.client import RunState, SyncRealtimeClient

VARIABLE = "REALTIME_ACCESS_TOKEN"
_TOKEN_LIFE_S = 3600.0
_FORMS = ".../v1/streams/<run>/<key>, .../v1/runs/<run>, .../v1/runs?tags=<tag> or .../v1/batches/<batch>"
_VISIBLE = f"other users can see the token in the arguments (ps); set ${VARIABLE}, or pass the URL on stdin: tail -"


@dataclass(frozen=True)
class Target:
    """What a URL refers to."""

    base: str
    """The origin and the mount path."""
    kind: str
    names: tuple[str, ...]
    token: str | None

    @property
    def scope(self) -> str:
        """The scope that a token needs."""
        return {"tags": "read:tags:", "batches": "read:batch:"}.get(self.kind, "read:runs:") + self.names[0]


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "tail",
        help="follow a run or a stream in the terminal",
        description="Follow a stream, a run, the runs with some tags, or a batch, until it ends or Ctrl-C.",
        epilog=f"The token comes from ${VARIABLE} or the URL (?access_token=), or is created with the secret key. Other"
        " users of the machine can see a URL in the arguments, so pass one with a token on stdin: `tail -`.",
    )
    parser.add_argument("url", metavar="URL", help=f"{_FORMS}; - reads it from stdin")
    parser.add_argument("--from", dest="start", type=int, default=0, metavar="INDEX", help="start at this chunk")
    parser.add_argument("--json", action="store_true", help="print each chunk or state as one line of JSON")
    secret.add(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from asgi_realtime.client import SyncRealtimeClient  # needs httpx

    target = parse_url(sys.stdin.readline().strip() if args.url == "-" else args.url)
    if target.token and args.url != "-":
        print(_VISIBLE, file=sys.stderr)  # noqa: T201
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(HarmlessFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("asgi_realtime.client").setLevel(logging.INFO)
    try:
        client = SyncRealtimeClient(target.base, _token(args, target))
    except InvalidToken as exc:
        raise UsageError(str(exc)) from exc
    with client:
        return _follow(client, target, args)


def parse_url(url: str) -> Target:
    """Raises `UsageError` for any other URL."""
    from asgi_realtime.client.arguments import check_base_url  # needs httpx

    expected = f"this is not the URL of a run or a stream; use {_FORMS}"
    try:
        parts = urlsplit(url)
    except ValueError as exc:
        raise UsageError(f"{expected}: {exc}") from None
    if parts.scheme not in ("http", "https"):
        raise UsageError(expected)
    query = parse_qs(parts.query)
    tags = tuple(",".join(query.get("tags", [])).split(","))
    segments = parts.path.rstrip("/").split("/")
    versions = [index for index, segment in enumerate(segments) if segment == "v1"]
    for at in reversed(versions):  # the mount path can contain "v1" too
        named = _named(tuple(map(unquote, segments[at + 1 :])), tags)
        if named is not None:
            base = f"{parts.scheme}://{parts.netloc}{'/'.join(segments[:at])}"
            return Target(check_base_url(base, name="URL"), *named, query.get("access_token", [None])[-1])
    raise UsageError(expected)


def _named(path: tuple[str, ...], tags: tuple[str, ...]) -> tuple[str, tuple[str, ...]] | None:
    """The kind and the names, or None for any other path."""
    match path:
        case ("streams", run_id, key):
            return "streams", (run_id, key)
        case ("runs", run_id):
            return "runs", (run_id,)
        case ("runs",) if any(tags):
            return "tags", tags
        case ("batches", batch_id):
            return "batches", (batch_id,)
        case _:
            return None


def _token(args: argparse.Namespace, target: Target) -> str | Callable[[], str]:
    found = (target.token or os.environ.get(VARIABLE) or "").strip()
    if found:
        return found
    key = secret.find(args)
    if key is None:
        raise UsageError(
            f"no token: put it into ${VARIABLE} or the URL (?access_token=), or set ${secret.VARIABLE} to create one"
        )
    authority = TokenAuthority(key)
    return lambda: authority.mint([target.scope], expires_in_s=_TOKEN_LIFE_S, own_id=True)


def _follow(client: SyncRealtimeClient, target: Target, args: argparse.Namespace) -> int:
    """Return the exit code: 1 if a run ended without success."""
    if target.kind == "streams":
        run_id, key = target.names
        with client.read(run_id, key, start_index=args.start) as chunks:
            _print_chunks(chunks, as_json=args.json)
        return 0
    subscription = {
        "runs": lambda: client.subscribe_to_run(target.names[0]),
        "tags": lambda: client.subscribe_to_runs_with_tag(target.names),
        "batches": lambda: client.subscribe_to_batch(target.names[0]),
    }[target.kind]()
    failed: set[str] = set()
    with subscription as states:
        for state in states:
            print_line(msgspec.json.encode(state).decode() if args.json else _line(state))
            if state.is_completed and not state.is_success:
                failed.add(state.id)
    return 1 if failed else 0


def _print_chunks(chunks: Iterable[Any], *, as_json: bool) -> None:
    """Print text without line breaks in between, so that a model's answer reads as one; other chunks one per line."""
    mid_line, half = False, ""
    try:
        for chunk in chunks:
            if isinstance(chunk, str) and not as_json:
                text, half = split_half(half + chunk)
                sys.stdout.write(harmless(text))
                mid_line = not text.endswith("\n") if text else mid_line
            else:
                sys.stdout.write("\n" * mid_line + harmless(json.dumps(chunk, ensure_ascii=False)) + "\n")
                mid_line = False
            sys.stdout.flush()
    finally:
        sys.stdout.write(harmless(half) + "\n" * mid_line)


def _line(state: RunState) -> str:
    fields = [f"{state.updated_at:%H:%M:%S}", state.id, state.task, state.status]
    if state.metadata:
        fields.append(json.dumps(state.metadata, ensure_ascii=False))
    if state.error is not None:
        fields.append(f"{state.error.name}: {state.error.message}")
    elif state.output is not None:
        fields.append(f"-> {json.dumps(state.output, ensure_ascii=False)}")
    return "  ".join(fields)
