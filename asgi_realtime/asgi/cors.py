"""CORS headers of our own: on every answer, errors too, and the answer to a preflight.

A preflight is answered before authentication, as it carries no credential. Requested headers are reflected, since `*`
does not cover `authorization`. Credentials are never allowed, so `*` is safe. Spec: WHATWG Fetch, section 3.2.
"""

from __future__ import annotations

import re

from asgi_realtime.asgi.host import Headers
from asgi_realtime.core.config import EXPOSED_HEADERS, Cors

EXPOSED = ", ".join(EXPOSED_HEADERS).encode()
METHODS = b"GET, HEAD, POST, PUT"

_HEADER_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~\-, ]{1,4096}")


def cors_headers(cors: Cors | None, origin: bytes | None) -> Headers:
    """The headers of any answer to a request from this origin."""
    if cors is None:
        return []
    if cors.origins == "*":
        return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", EXPOSED)]
    # Also without an origin: a cache must not give an answer for one origin to another.
    vary = (b"vary", b"Origin")
    if origin is None or origin.decode("latin-1") not in cors.origins:
        return [vary]
    return [(b"access-control-allow-origin", origin), (b"access-control-expose-headers", EXPOSED), vary]


def preflight_headers(cors: Cors, requested: bytes | None) -> Headers:
    """What the answer to a preflight has besides those. Of no effect for an origin that may not read."""
    headers = [
        (b"access-control-allow-methods", METHODS),
        (b"access-control-max-age", b"%d" % cors.max_age),
        (b"vary", b"Access-Control-Request-Headers"),
    ]
    if requested and _HEADER_NAMES.fullmatch(requested):
        headers.append((b"access-control-allow-headers", requested))
    return headers
