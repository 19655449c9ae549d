"""`token`: creates a public access token, or explains one."""

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
from asgi_realtime.cli.terminal import print_line
from asgi_realtime.core.config import Limits, parse_span
from asgi_realtime.core.errors import ExpiredToken, InvalidToken, UsageError
from asgi_realtime.core.names import check_tags
from asgi_realtime.core.scopes import flatten_scopes
from asgi_realtime.tokens import PUBLIC_TOKEN_EXPIRES_IN, TokenAuthority, check_columns, check_owner

_EXAMPLES = """\
examples:
  token --read runs:run_1234 --expires-in 1h      reads one run and its streams
  token --read tags:user:1 --skip payload         reads the runs with a tag, without their payloads
  token --write inputStreams:run_1234             sends input to a run
  token --trigger tasks:chat --one-time           starts one run of a task
  token --trigger tasks:chat --tag user:1         starts runs that can have no other tag
  token --explain -                               explains the token on stdin
  token --new-secret                              creates a secret key
"""


ACTIONS = {"read": "read", "write": "write", "trigger": "trigger", "batchTrigger": "batch-trigger"}
"""The actions of scopes, and their command-line options."""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "token",
        help="create or explain a token",
        description="Create a public access token with $REALTIME_SECRET_KEY, or explain one.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for action, option in ACTIONS.items():
        help = f"what the token can {option.replace('-', ' ')}"
        parser.add_argument(f"--{option}", dest=action, metavar="TYPE[:ID]", action="append", default=[], help=help)
    parser.add_argument("--expires-in", default=PUBLIC_TOKEN_EXPIRES_IN, metavar="SPAN", help="such as 15m (default)")
    parser.add_argument("--one-time", action="store_true", help="valid for one trigger request")
    parser.add_argument("--skip", metavar="COLUMN", action="append", default=[], help="hide a column of runs")
    parser.add_argument(
        "--owner", metavar="NAME", help="the user whose budgets it uses, such as user:1 (default: its own)"
    )
    parser.add_argument(
        "--tag", metavar="TAG", action="append", help="allow this tag for triggered runs (default: any)"
    )
    parser.add_argument("--explain", metavar="TOKEN", help="explain this token; - reads it from stdin")
    parser.add_argument("--new-secret", action="store_true", help="create a secret key for Realtime(secret_key=…)")
    secret.add(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.new_secret:
        print_line(secrets.token_urlsafe(32))
    elif args.explain is not None:
        return _explain(args)
    else:
        print_line(_mint(args))
    return 0


def _mint(args: argparse.Namespace) -> str:
    scopes = [f"{action}:{scope}" for action in ACTIONS for scope in getattr(args, action)]
    if not scopes:
        raise UsageError("name at least one scope, such as --read runs:run_1234, or --explain a token")
    key = secret.find(args)
    if key is None:
        raise UsageError(f"no secret key: set ${secret.VARIABLE}, or pass --secret-key-file")
    return TokenAuthority(key).mint(
        flatten_scopes(scopes),
        expires_in_s=parse_span(args.expires_in, name="--expires-in"),
        one_time=args.one_time,
        own_id=True,
        skip_columns=check_columns(args.skip),
        owner=check_owner(args.owner),
        tags=None if args.tag is None else check_tags(args.tag, Limits()),
    )


def _explain(args: argparse.Namespace) -> int:
    token = (sys.stdin.read() if args.explain == "-" else args.explain).strip().removeprefix("Bearer ")
    try:
        claims = jwt.decode(token, options={"verify_signature": False})
        header = jwt.get_unverified_header(token)
    except jwt.InvalidTokenError as exc:
        raise UsageError("this is not a token; a JWT has three parts separated by dots") from exc
    verdict, usable = _verdict(args, token)
    for name, text in [("signed with", str(header.get("alg"))), *_describe(claims), ("verdict", verdict)]:
        print_line(f"{name + ':':12} {text}")
    return 0 if usable else 1


def _describe(claims: dict[str, Any]) -> list[tuple[str, str]]:
    scopes = claims.get("scopes")
    listed = scopes if isinstance(scopes, list) else []
    found = [("grants", _checked(scope)) for scope in listed] or [("grants", "nothing: it has no scopes")]
    if claims.get("otu"):
        found.append(("valid for", "one trigger request"))
    realtime = claims.get("realtime")
    if isinstance(realtime, dict) and realtime.get("skipColumns"):
        found.append(("hides", ", ".join(map(str, realtime["skipColumns"]))))
    if isinstance(realtime, dict) and realtime.get("owner"):
        found.append(("owner", str(realtime["owner"])))
    if isinstance(realtime, dict) and isinstance(tags := realtime.get("tags"), list):
        found.append(("run tags", f"only {', '.join(map(str, tags))}" if tags else "none"))
    if claims.get("home"):
        found.append(("created by", f"a process that holds its runs in memory ({claims['home']})"))
    found += [(name, _moment(claims[key])) for name, key in (("created", "iat"), ("expires", "exp")) if key in claims]
    return found


def _checked(scope: Any) -> str:
    try:
        flatten_scopes([scope])
    except UsageError as exc:
        return f"{scope}, which grants nothing: {exc}"
    return str(scope)


def _moment(value: Any) -> str:
    try:
        moment = datetime.fromtimestamp(value, UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        return f"{value!r}, which is not a time"
    left_s = round(value - time.time())
    relative = f"in {left_s} s" if left_s >= 0 else f"{-left_s} s ago"
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC, {relative}"


def _verdict(args: argparse.Namespace, token: str) -> tuple[str, bool]:
    key = secret.find(args)
    try:
        TokenAuthority(key).verify(token) if key is not None else _verify_claims(token)
    except ExpiredToken:
        return ("expired, otherwise valid" if key is not None else "expired"), False
    except InvalidToken as exc:
        return f"invalid: {exc}", False
    if key is None:
        return f"valid if signed with your secret key; set ${secret.VARIABLE} to check that", True
    return "valid", True


def _verify_claims(token: str) -> None:
    """Check everything but the signature, which needs the secret key. Raises what `verify` raises."""
    key = secrets.token_urlsafe(32)
    signed = token.rpartition(".")[0]
    signature = hmac.digest(key.encode(), signed.encode(), hashlib.sha256)
    TokenAuthority(key).verify(f"{signed}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}")
