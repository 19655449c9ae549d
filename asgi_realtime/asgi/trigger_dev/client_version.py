"""The oldest official clients that can read streams.

Before 4.1 they look for the streams of a run in its metadata and do not know the framing that they would get, so
`withStreams()` waits forever. They send their version with every request, but not whether they want streams. So they
get an error for the feed of a run and for streams.
"""

from __future__ import annotations

import re

from asgi_realtime.asgi.request import Request
from asgi_realtime.core.errors import InvalidRequest

_OLDEST = (4, 1)
_VERSION = re.compile(r"(\d{1,6})\.(\d{1,6})\.")


def check_client(request: Request) -> None:
    """Raises `InvalidRequest` for an official client that is too old. Prereleases are numbered 0.0.0 and accepted."""
    version = (request.header(b"trigger-version") or b"").decode("latin-1")
    found = _VERSION.match(version)
    if found and (0, 0) < (int(found[1]), int(found[2])) < _OLDEST:
        raise InvalidRequest(
            f"this client is version {version[:20]} of the Trigger.dev packages; allowed is 4.1 or newer: update"
            " @trigger.dev/sdk and @trigger.dev/react-hooks"
        )
