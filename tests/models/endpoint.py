"""A model's API on this machine: answers each request of a client with prepared events, in its wire format."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from tests.ai.collecting import CANARY

Event = dict[str, Any]


class Endpoint:
    def __init__(self, answers: Sequence[list[Event]], *, done: bool, cut: bool) -> None:
        self._answers = list(answers)
        self._done = done
        self._cut = cut
        self.url = ""
        self.requests: list[str] = []
        """The heads and bodies of all requests."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(
                int(line.split(":")[1]) for line in head.split("\r\n") if line.lower().startswith("content-l")
            )
            self.requests.append(head + (await reader.readexactly(length)).decode())
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n"
                b"transfer-encoding: chunked\r\nx-secret: %s\r\n\r\n" % CANARY.encode()
            )
            for event in self._answers.pop(0):
                name = f"event: {event['type']}\n" if "type" in event else ""
                self._write(writer, f"{name}data: {json.dumps(event)}\n\n")
            if self._done:
                self._write(writer, "data: [DONE]\n\n")
            if not self._cut:
                writer.write(b"0\r\n\r\n")
            await writer.drain()
        writer.close()

    @staticmethod
    def _write(writer: asyncio.StreamWriter, text: str) -> None:
        data = text.encode()
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))


@asynccontextmanager
async def endpoint(*answers: list[Event], done: bool = False, cut: bool = False) -> AsyncIterator[Endpoint]:
    """An endpoint for one answer a request. `cut` ends the connection in the middle of an answer."""
    found = Endpoint(answers, done=done, cut=cut)
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield found
    finally:
        server.close()
        await server.wait_closed()
