"""Public tokens for the official SDK.

Given our secret key, the SDK signs tokens locally, with claims that it requests here. Keys of the form `tr_dev_sk_…`
cannot sign, so with one of those the SDK requests the finished token.
"""

from __future__ import annotations

import re

import msgspec
from starlette.responses import Response

from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.responses import json_response
from asgi_realtime.asgi.trigger_dev.credentials import require_secret
from asgi_realtime.asgi.trigger_dev.decoding import read_json
from asgi_realtime.core.config import parse_span
from asgi_realtime.core.errors import InvalidRequest, UsageError, shown
from asgi_realtime.core.names import check_tags
from asgi_realtime.core.scopes import flatten_scopes
from asgi_realtime.tokens import PUBLIC_TOKEN_EXPIRES_IN, SUBJECT, check_columns, check_owner

MAX_BODY_BYTES = 64 * 1024

_SPAN = re.compile(
    r"\+? ?(\d+(?:\.\d+)?) ?"
    r"(?:(s|secs?|seconds?)|(m|mins?|minutes?)|(h|hrs?|hours?)|(d|days?)|(w|weeks?)|(y|yrs?|years?))(?: from now)?",
    re.IGNORECASE,
)
_MAX_TIME = 1e15  # far beyond any limit: an integer from JSON can be too large for a float
_UNIT_S = (1.0, 60.0, 3600.0, 86400.0, 604800.0, 31557600.0)


class _Options(msgspec.Struct, rename="camel"):
    skip_columns: list[str] = []
    owner: str | None = None
    tags: list[str] | None = None


class PublicToken(msgspec.Struct, rename="camel"):
    """The requested token. Its expiration time is a span, or unix seconds."""

    scopes: list[str]
    expiration_time: str | int | float | None = None
    one_time_use: bool | None = None
    realtime: _Options | None = None


async def jwt_claims(request: Request) -> Response:
    """The claims of a token, except for its scopes and times. The body is ignored."""
    require_secret(request, "signing tokens")
    return json_response({"sub": SUBJECT, "pub": True})


async def public_token(request: Request) -> Response:
    """Sign a public token."""
    require_secret(request, "creating tokens")
    requested = read_json(await request.body(MAX_BODY_BYTES), PublicToken)
    options = requested.realtime or _Options()
    token = request.host.tokens.mint(
        flatten_scopes(requested.scopes),
        expires_in_s=_expires_in_s(requested.expiration_time, request),
        one_time=bool(requested.one_time_use),
        own_id=True,
        skip_columns=check_columns(options.skip_columns),
        owner=check_owner(options.owner),
        tags=None if options.tags is None else check_tags(options.tags, request.host.limits),
    )
    return json_response({"token": token})


def _expires_in_s(time: str | int | float | None, request: Request) -> float:
    if time is None:
        return parse_span(PUBLIC_TOKEN_EXPIRES_IN)
    seconds = _span_s(time) if isinstance(time, str) else min(time, _MAX_TIME) - request.host.clock()
    if seconds <= 0:
        raise InvalidRequest("expirationTime is in the past; pass a span or a future unix timestamp")
    return request.host.tokens.check_life(seconds, name="expirationTime")


def _span_s(text: str) -> float:
    """A span in the format of jose, the token library of the official client, or in ours."""
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        try:
            return parse_span(text, name="expirationTime")
        except UsageError as exc:
            raise InvalidRequest(
                f"expirationTime is {shown(text)}; allowed are unix seconds and spans like '1h'"
            ) from exc
    number, *units = match.groups()
    return float(number) * next(unit_s for unit, unit_s in zip(units, _UNIT_S, strict=True) if unit)
