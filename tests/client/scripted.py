"""A server on a real socket that answers what a test wrote down, byte for byte, one answer for each request."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from dataclasses import dataclass

HOLD = b"<hold>"
"""At the end of an answer: the connection stays open, and silent, until the client leaves."""


def answer(status: int, body: bytes = b"", **headers: str) -> bytes:
    """A whole answer. In the names of headers `_` stands for `-`."""
    lines = [f"HTTP/1.1 {status} Told", f"content-length: {len(body)}", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def refused(status: int, code: str, message: str, **headers: str) -> bytes:
    body = f'{{"error":"{message}","code":"{code}"}}'.encode()
    return answer(status, body, content_type="application/json", **headers)


def stream(*frames: str) -> bytes:
    """The begin of a stream. Where the answer ends the body ends."""
    head = (
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nconnection: close\r\n\r\n: connected\n\n"
    )
    return (head + "".join(f"{frame}\n\n" for frame in frames)).encode()


END = 'event: end\nid: 9\ndata: {"reason":"complete"}'


def chunk(index: int, data: str = "0") -> str:
    return f"id: {index}\ndata: {data}"


@dataclass
class Asked:
    """A request as it came."""

    line: str
    headers: dict[str, str]


class ScriptedServer:
    """Answers with `answers`, the last one again and again."""

    def __init__(self, *answers: bytes) -> None:
        self._answers = list(answers)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.asked: list[Asked] = []
        self.was_asked = threading.Event()
        self.left = threading.Event()
        """A client has left an answer that was held."""
        self.origin = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def positions(self) -> list[str | None]:
        return [asked.headers.get("last-event-id") for asked in self.asked]

    @property
    def tokens(self) -> list[str]:
        return [asked.headers["authorization"].removeprefix("Bearer ") for asked in self.asked]

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
                with connection, suppress(OSError):
                    self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            if not (data := connection.recv(65536)):
                return
            head += data
        line, *fields = head.decode().strip().split("\r\n")
        pairs = (field.partition(": ") for field in fields)
        self.asked.append(Asked(line, {name.lower(): value for name, _, value in pairs}))
        self.was_asked.set()
        told = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        connection.sendall(told.removesuffix(HOLD))
        if told.endswith(HOLD):
            while connection.recv(65536):
                pass
            self.left.set()
