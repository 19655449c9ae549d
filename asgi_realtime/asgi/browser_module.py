"""`GET /client.js`: the browser module, for pages that import it from the mount.

It is the same for everyone and needs no token, so caches can store it: `/client.js` for a few minutes, and
`/client-<hash>.js` forever. During a deploy, a page of a new server can ask an old one for a hash that it does not
have. It gets what that server has, which is then not stored for long. Docs: docs/browser.md.
"""

from __future__ import annotations

import gzip
from functools import cache
from hashlib import sha256
from pathlib import Path

from starlette.responses import Response

from asgi_realtime.asgi.request import Request

SOURCE = Path(__file__).with_name("client.js")
REVALIDATED = "public, max-age=300"
IMMUTABLE = "public, max-age=31536000, immutable"


@cache
def _bodies() -> tuple[bytes, bytes]:
    """The module, and the same compressed."""
    source = SOURCE.read_bytes()
    return source, gzip.compress(source, mtime=0)


@cache
def content_hash() -> str:
    return sha256(_bodies()[0]).hexdigest()[:12]


def versioned_name() -> str:
    return f"client-{content_hash()}.js"


async def current(request: Request) -> Response:
    """The module under its plain name."""
    return _response(request, REVALIDATED)


async def versioned(request: Request, requested: str) -> Response:
    """The module under the name that `Realtime.client_js` returns."""
    return _response(request, IMMUTABLE if requested == content_hash() else REVALIDATED)


def _response(request: Request, cache_control: str) -> Response:
    etag = f'W/"{content_hash()}"'  # weak, because it is that of both encodings: RFC 9110, 8.8.3.3
    headers = {"cache-control": cache_control, "etag": etag, "vary": "Accept-Encoding"}
    known = (request.header(b"if-none-match") or b"").decode("latin-1")
    if etag.removeprefix("W/") in known:
        return Response(status_code=304, headers=headers)
    body, compressed = _bodies()
    if b"gzip" in (request.header(b"accept-encoding") or b""):
        body = compressed
        headers["content-encoding"] = "gzip"
    return Response(body, headers=headers, media_type="text/javascript")
