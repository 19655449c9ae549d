"""`token`: make a public access token, or explain one."""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import secrets
import sys
import time
from datetime import UTC, datetime
from typing import Any

import jwt

from asgi_realtime.cli import secret
from asgi_realtime.cli.terminal import harmless
from asgi_realtime.core.config import parse_span
from asgi_realtime.core.errors import ExpiredToken, InvalidToken, UsageError
from asgi_realtime.core.scopes import flatten_scopes
from asgi_realtime.tokens import PUBLIC_TOKEN_EXPIRES_IN, TokenAuthority, check_columns

_EXAMPLES = """\
examples:
  token --read runs:run_1234 --expires-in 1h      reads one run and its streams
  token --read tags:user:1 --skip payload         reads the runs with a tag, without their payloads
  token --write inputStreams:run_1234             sends to the inputs of a run
  token --trigger tasks:chat --one-time           starts one run of a task
  token --explain -                               reads a token from stdin and says what is in it
  token --new-secret                              makes a secret key
"""


ACTIONS = {"read": "read", "write": "write", "trigger": "trigger", "batchTrigger": "batch-trigger"}
"""Actions of scopes and their options."""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "token",
        help="make or explain a token",
        description="Make a public access token from $REALTIME_SECRET_KEY, or explain one.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for action, option in ACTIONS.items():
        help = f"what the token may {option.replace('-', ' ')}"
        parser.add_argument(f"--{option}", dest=action, metavar="TYPE[:ID]", action="append", default=[], help=help)
    parser.add_argument("--expires-in", default=PUBLIC_TOKEN_EXPIRES_IN, metavar="SPAN", help="such as 15m (default)")
    parser.add_argument("--one-time", action="store_true", help="good for one request that triggers")
    parser.add_argument("--skip", metavar="COLUMN", action="append", default=[], help="keep a column of runs back")
    parser.add_argument("--explain", metavar="TOKEN", help="explain this token, or that on stdin if it is -")
    parser.add_argument("--new-secret", action="store_true", help="make a secret key for the Realtime")
    secret.add(parser)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    if given.new_secret:
        print(secrets.token_urlsafe(32))  # noqa: T201
        return 0
    if given.explain is not None:
        return _explain(given)
    print(_minted(given))  # noqa: T201
    return 0


def _minted(given: argparse.Namespace) -> str:
    scopes = [f"{action}:{scope}" for action in ACTIONS for scope in getattr(given, action)]
    if not scopes:
        raise UsageError("say what the token may do, such as --read runs:run_1234; or --explain a token")
    return TokenAuthority(secret.need(given)).mint(
        flatten_scopes(scopes),
        expires_in_s=parse_span(given.expires_in, name="--expires-in"),
        one_time=given.one_time,
        own_id=True,
        skip_columns=check_columns(given.skip),
    )


def _explain(given: argparse.Namespace) -> int:
    token = (sys.stdin.read() if given.explain == "-" else given.explain).strip().removeprefix("Bearer ")
    try:
        claims = jwt.decode(token, options={"verify_signature": False})
        header = jwt.get_unverified_header(token)
    except jwt.InvalidTokenError as exc:
        raise UsageError("that is no token: a JWT has three parts with dots between them") from exc
    for name, text in [("signed with", str(header.get("alg"))), *_in_words(claims)]:
        print(harmless(f"{name + ':':12} {text}"))  # noqa: T201
    verdict, usable = _verdict(given, token)
    print(harmless(f"{'verdict:':12} {verdict}"))  # noqa: T201
    return 0 if usable else 1


def _in_words(claims: dict[str, Any]) -> list[tuple[str, str]]:
    scopes = claims.get("scopes")
    listed = scopes if isinstance(scopes, list) else []
    found = [("may", _judged(scope)) for scope in listed] or [("may", "nothing: it has no scopes")]
    if claims.get("otu"):
        found.append(("good for", "one request that triggers"))
    realtime = claims.get("realtime")
    if isinstance(realtime, dict) and realtime.get("skipColumns"):
        found.append(("keeps back", ", ".join(map(str, realtime["skipColumns"]))))
    if claims.get("home"):
        found.append(("made by", f"a process that keeps its runs in its own memory ({claims['home']})"))
    found += [(name, _moment(claims[key])) for name, key in (("made", "iat"), ("expires", "exp")) if key in claims]
    return found


def _judged(scope: Any) -> str:
    try:
        flatten_scopes([scope])
    except UsageError as exc:
        return f"{scope}, which is nothing: {exc}"
    return str(scope)


def _moment(value: Any) -> str:
    try:
        moment = datetime.fromtimestamp(value, UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        return f"{value!r}, which is no time"
    away_s = round(value - time.time())
    told = f"in {away_s} s" if away_s >= 0 else f"{-away_s} s ago"
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC, {told}"


def _verdict(given: argparse.Namespace, token: str) -> tuple[str, bool]:
    key = secret.find(given)
    try:
        TokenAuthority(key).verify(token) if key is not None else _verify_claims(token)
    except ExpiredToken:
        return ("expired, and otherwise good" if key is not None else "expired"), False
    except InvalidToken as exc:
        return f"refused: {exc}", False
    if key is None:
        return f"good, if it was signed with your secret key; to know that set ${secret.VARIABLE}", True
    return "good", True


def _verify_claims(token: str) -> None:
    """Raises what `verify` raises for anything but the signature, which is replaced: whose it is cannot be known."""
    key = secrets.token_urlsafe(32)
    signed = token.rpartition(".")[0]
    signature = hmac.digest(key.encode(), signed.encode(), hashlib.sha256)
    TokenAuthority(key).verify(f"{signed}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}")
