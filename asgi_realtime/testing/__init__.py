"""For the tests of apps and of broker backends: a streaming ASGI client, a reader of SSE, the conformance suite.

`driver.stream` drives an ASGI app without sockets, with live bodies. The suite that a broker has to pass is in
`asgi_realtime.testing.conformance`, which needs pytest and hypothesis.
"""

from __future__ import annotations

from asgi_realtime.testing.driver import StreamedResponse, stream
from asgi_realtime.testing.sse import Event, EventParser

__all__ = ["Event", "EventParser", "StreamedResponse", "stream"]
