"""CORS headers, on every response including errors, and the response to a preflight request.

A preflight request is answered before authentication, because it carries no credential. The headers it asks for are
reflected, because `*` does not cover `authorization`. Credentials (cookies) are allowed only if the host authorizes
by them, and only for origins that it lists by name, so `*` is safe for the origin.
Spec: WHATWG Fetch, section 3.2.
"""

from __future__ import annotations

import re

from asgi_realtime.asgi.host import Headers
from asgi_realtime.core.config import EXPOSED_HEADERS, Cors

EXPOSED = ", ".join(EXPOSED_HEADERS).encode()
METHODS = b"GET, HEAD, POST, PUT"

_HEADER_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~\-, ]{1,4096}")


def cors_headers(cors: Cors | None, origin: bytes | None, *, credentials: bool = False) -> Headers:
    """The headers of every response to a request from this origin."""
    if cors is None:
        return []
    if cors.origins == "*":
        return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", EXPOSED)]
    # Also without an origin, because a cache must not reuse the response for another origin.
    vary = (b"vary", b"Origin")
    if origin is None or origin.decode("latin-1") not in cors.origins:
        return [vary]
    allowed = [(b"access-control-allow-origin", origin), (b"access-control-expose-headers", EXPOSED), vary]
    return [*allowed, (b"access-control-allow-credentials", b"true")] if credentials else allowed


def preflight_headers(cors: Cors, requested: bytes | None) -> Headers:
    """The additional headers of a response to a preflight. Without effect for an origin that is not allowed."""
    headers = [
        (b"access-control-allow-methods", METHODS),
        (b"access-control-max-age", b"%d" % cors.max_age),
        (b"vary", b"Access-Control-Request-Headers"),
    ]
    if requested and _HEADER_NAMES.fullmatch(requested):
        headers.append((b"access-control-allow-headers", requested))
    return headers
