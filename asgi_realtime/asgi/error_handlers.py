"""The errors of this library as responses of the host's own routes, in one line per framework.

The response is the one that the library's own routes give: the status of the error, `{"error", "code"}`, and
`Retry-After` or `WWW-Authenticate` where they apply. Without a handler the frameworks respond 500 to all of them.
"""

from __future__ import annotations

import time
from typing import Any

from starlette.responses import Response

from asgi_realtime.asgi.responses import exception_response
from asgi_realtime.core.errors import RealtimeError
from asgi_realtime.loop.logger import logger


class _HostResponse(Response):
    def to_asgi_response(self, *args: object, **kwargs: object) -> Response:
        """Litestar calls this on what an exception handler returns."""
        return self


def realtime_error_handler(request: object, error: Exception) -> Any:
    """An exception handler for Starlette, FastAPI and Litestar.

    `app.add_exception_handler(RealtimeError, realtime_error_handler)`, or
    `Litestar(…, exception_handlers={RealtimeError: realtime_error_handler})`. The status is
    `error.status`: `RunNotFound` becomes 404, `BrokerUnavailable` 503, and so on. An error with status 500 is logged.
    """
    body, status, headers = realtime_error_response(error)
    return _HostResponse(body, status, headers)


def realtime_error_response(error: Exception) -> tuple[bytes, int, dict[str, str]]:
    """The body, status and headers of the response to an error, for other frameworks.

    This is what Quart and Flask accept: `app.register_error_handler(RealtimeError, realtime_error_response)`.
    """
    if not isinstance(error, RealtimeError) or error.status == 500:
        logger.error("a request to the host failed", exc_info=error)
    else:
        logger.debug("a request to the host gets %d %s: %s", error.status, error.code, error)
    response = exception_response(error, now=time.time())
    return bytes(response.body), response.status_code, dict(response.headers)
