"""`GET /v1/metrics`: the metrics of this process, or of all workers, for a scraper that has the secret key."""

from __future__ import annotations

from starlette.responses import Response

from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.responses import NOT_CACHED, error_response
from asgi_realtime.core.errors import ScopeDenied


async def scrape(request: Request) -> Response:
    """The metrics, or 404 if they are off."""
    metrics = request.host.metrics
    if metrics is None:
        return error_response(404, "not_found", "metrics are off; turn them on with Realtime(metrics=True)")
    request.authenticate()
    if not request.claims.secret:
        raise ScopeDenied("reading the metrics needs the secret key; no scope of a public token grants it")
    body, content_type = metrics.expose((request.header(b"accept") or b"").decode("latin-1"))
    return Response(body, headers={"content-type": content_type, "cache-control": NOT_CACHED})
