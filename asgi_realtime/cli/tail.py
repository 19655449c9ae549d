"""`tail URL`: follow a stream, a run, the runs with some tags, or a batch in the terminal."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

from asgi_realtime.cli import secret
from asgi_realtime.cli.terminal import HarmlessFormatter, harmless, split_url
from asgi_realtime.core.errors import RealtimeError, UsageError
from asgi_realtime.tokens import TokenAuthority

if TYPE_CHECKING:
    from asgi_realtime.client import RunState, SyncRealtimeClient

VARIABLE = "REALTIME_ACCESS_TOKEN"
_TOKEN = re.compile(r"[!-~]+")
_TOKEN_LIFE_S = 3600.0
_FORMS = ".../v1/streams/<run>/<key>, .../v1/runs/<run>, .../v1/runs?tags=<tag> or .../v1/batches/<batch>"


@dataclass(frozen=True)
class Address:
    """What an address names."""

    base: str
    """The origin and the mount."""
    kind: str
    names: tuple[str, ...]
    token: str | None

    @property
    def scope(self) -> str:
        """What a token has to admit."""
        return {"tags": "read:tags:", "batches": "read:batch:"}.get(self.kind, "read:runs:") + self.names[0]


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "tail",
        help="follow a run or a stream in the terminal",
        description="Follow a stream, a run, the runs with some tags, or a batch, until it ends or Ctrl-C.",
        epilog=f"The token is that of the address (?access_token=), or ${VARIABLE}, or is made with the secret key.",
    )
    parser.add_argument("url", metavar="URL", help=_FORMS)
    parser.add_argument("--from", dest="start", type=int, default=0, metavar="INDEX", help="begin at this chunk")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each chunk or state")
    secret.add(parser)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    try:
        from asgi_realtime.client import SyncRealtimeClient
    except ModuleNotFoundError as exc:
        raise UsageError(str(exc)) from exc
    address = read_address(given.url)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(HarmlessFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("asgi_realtime.client").setLevel(logging.INFO)
    with SyncRealtimeClient(address.base, _token(given, address)) as client:
        try:
            return _follow(client, address, given)
        except UsageError:
            raise
        except RealtimeError as exc:
            sys.stdout.flush()
            print(harmless(f"{exc.code}: {exc}", sys.stderr), file=sys.stderr)  # noqa: T201
            return 1


def read_address(url: str) -> Address:
    """Raises `UsageError` for an address of anything else."""
    expected = f"that is no address of a run or a stream; they look like {_FORMS}"
    parts = split_url(url, expected)
    query = parse_qs(parts.query)
    tags = tuple(",".join(query.get("tags", [])).split(","))
    segments = parts.path.rstrip("/").split("/")
    for at in (at for at in reversed(range(len(segments))) if segments[at] == "v1"):  # the mount may have one too
        named = _named(tuple(map(unquote, segments[at + 1 :])), tags)
        if named is not None:
            base = f"{parts.scheme}://{parts.netloc}{'/'.join(segments[:at])}"
            return Address(base, *named, query.get("access_token", [None])[-1])
    raise UsageError(expected)


def _named(path: tuple[str, ...], tags: tuple[str, ...]) -> tuple[str, tuple[str, ...]] | None:
    """The kind and the names, or None if there is nothing of this path."""
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


def _token(given: argparse.Namespace, address: Address) -> str | Callable[[], str]:
    found = (address.token or os.environ.get(VARIABLE) or "").strip()
    if found:
        if not _TOKEN.fullmatch(found):
            raise UsageError(f"the token of the address, or in ${VARIABLE}, has characters that no token has")
        return found
    key = secret.find(given)
    if key is None:
        raise UsageError(
            f"there is no token: it may stand in the address (?access_token=) or in ${VARIABLE};"
            f" with ${secret.VARIABLE} one is made"
        )
    authority = TokenAuthority(key)
    return lambda: authority.mint([address.scope], expires_in_s=_TOKEN_LIFE_S, own_id=True)


def _follow(client: SyncRealtimeClient, address: Address, given: argparse.Namespace) -> int:
    """The exit code: 1 if a run that was followed to its end did not succeed."""
    if address.kind == "streams":
        run_id, key = address.names
        with client.read(run_id, key, start_index=given.start) as chunks:
            _print_chunks(chunks, as_json=given.json)
        return 0
    subscribed = {
        "runs": lambda: client.subscribe_to_run(address.names[0]),
        "tags": lambda: client.subscribe_to_runs_with_tag(address.names),
        "batches": lambda: client.subscribe_to_batch(address.names[0]),
    }[address.kind]()
    unwell: set[str] = set()
    with subscribed as states:
        for state in states:
            print(harmless(_as_json(state) if given.json else _line(state)), flush=True)  # noqa: T201
            if state.is_completed and not state.is_success:
                unwell.add(state.id)
    return 1 if unwell else 0


def _print_chunks(chunks: Iterable[Any], *, as_json: bool) -> None:
    """Text as it comes, so that an answer reads as one; anything else on a line of its own."""
    in_line = False
    try:
        for chunk in chunks:
            if isinstance(chunk, str) and not as_json:
                sys.stdout.write(harmless(chunk))
                in_line = not chunk.endswith("\n") if chunk else in_line
            else:
                sys.stdout.write("\n" * in_line + harmless(json.dumps(chunk, ensure_ascii=False)) + "\n")
                in_line = False
            sys.stdout.flush()
    except RealtimeError:
        sys.stdout.write("\n" * in_line)
        raise
    sys.stdout.write("\n" * in_line)


def _as_json(state: RunState) -> str:
    import msgspec

    return msgspec.json.encode(state).decode()


def _line(state: RunState) -> str:
    told = [f"{state.updated_at:%H:%M:%S}", state.id, state.task, state.status]
    if state.metadata:
        told.append(json.dumps(state.metadata, ensure_ascii=False))
    if state.error is not None:
        told.append(f"{state.error.name}: {state.error.message}")
    elif state.output is not None:
        told.append(f"-> {json.dumps(state.output, ensure_ascii=False)}")
    return "  ".join(told)
