"""A server on a real socket that sends scripted responses, byte for byte, one per request."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from dataclasses import dataclass

HOLD = b"<hold>"
"""At the end of a response: the connection stays open and silent until the client disconnects."""


def answer(status: int, body: bytes = b"", **headers: str) -> bytes:
    """A complete response. In header names `_` becomes `-`."""
    lines = [f"HTTP/1.1 {status} Scripted", f"content-length: {len(body)}", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def refused(status: int, code: str, message: str, **headers: str) -> bytes:
    body = f'{{"error":"{message}","code":"{code}"}}'.encode()
    return answer(status, body, content_type="application/json", **headers)


def stream(*frames: str) -> bytes:
    """The head of an event stream and its first frames. The body ends where the response ends."""
    head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nconnection: close\r\n\r\n: connected\n"
    return (head + "".join(f"{frame}\n\n" for frame in frames)).encode()


END = 'event: end\nid: 9\ndata: {"reason":"complete"}'


def chunk(index: int, data: str = "0") -> str:
    return f"id: {index}\ndata: {data}"


@dataclass
class Request:
    line: str
    headers: dict[str, str]


class ScriptedServer:
    """Sends `responses` in order, and repeats the last one. With `concurrent` a held response does not block others."""

    def __init__(self, *responses: bytes, concurrent: bool = False) -> None:
        self._responses = list(responses)
        self._concurrent = concurrent
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.requests: list[Request] = []
        self.was_requested = threading.Event()
        self.disconnected = threading.Event()
        """A client has disconnected from a held response."""
        self.origin = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def positions(self) -> list[str | None]:
        return [request.headers.get("last-event-id") for request in self.requests]

    @property
    def tokens(self) -> list[str]:
        return [request.headers["authorization"].removeprefix("Bearer ") for request in self.requests]

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                if self._concurrent:
                    threading.Thread(target=self._respond, args=[connection], daemon=True).start()
                else:
                    self._respond(connection)

    def _respond(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            self._exchange(connection)

    def _exchange(self, connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            if not (data := connection.recv(65536)):
                return
            head += data
        line, *fields = head.decode().strip().split("\r\n")
        pairs = (field.partition(": ") for field in fields)
        self.requests.append(Request(line, {name.lower(): value for name, _, value in pairs}))
        self.was_requested.set()
        response = self._responses.pop(0) if len(self._responses) > 1 else self._responses[0]
        connection.sendall(response.removesuffix(HOLD))
        if response.endswith(HOLD):
            while connection.recv(65536):
                pass
            self.disconnected.set()
