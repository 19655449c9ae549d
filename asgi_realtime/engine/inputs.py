"""Data that the host or a browser sends into a run."""

from __future__ import annotations

from typing import Any

import anyio

from asgi_realtime.core.chunks import decode
from asgi_realtime.core.config import Span, parse_span
from asgi_realtime.core.run_errors import RunEnded, end_error
from asgi_realtime.streams.readers import StreamReader


class Input:
    """Data sent into a run under one id, in the order in which it was sent. Each item goes to one `get`.

    An async iterator as well, which ends with the run.
    """

    def __init__(self, entries: StreamReader) -> None:
        self._entries = entries
        self._reading = anyio.Lock(fast_acquire=True)

    async def get(self, *, timeout: Span | None = None) -> Any:
        """Wait for the next item and return it.

        Raises `TimeoutError`, after which nothing is lost, and once the run has ended `RunEnded`, or the subclass that
        says how it ended.
        """
        seconds = None if timeout is None else parse_span(timeout, name="timeout")
        try:
            with anyio.fail_after(seconds):
                return await self.__anext__()
        except StopAsyncIteration:
            end = self._entries.end
            assert end is not None
            raise RunEnded("the run is over") if end.reason == "complete" else end_error(end) from None

    def __aiter__(self) -> Input:
        return self

    async def __anext__(self) -> Any:
        async with self._reading:
            return decode((await self._entries.__anext__()).data)
