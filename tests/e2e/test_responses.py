"""Every end of a body for chat frontends, under a real uvicorn: what is finished ends, and everything else breaks.

The app has a middleware that completes the body of whatever returns. The log of the server has no traceback.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.docs.blocks import ROOT
from tests.docs.programs import served
from tests.inprocess import GUARD_S

pytestmark = [pytest.mark.slow]

BROKEN = (httpx.RemoteProtocolError, httpx.ReadError)
BOTH = pytest.mark.parametrize("protocol", ["ai-sdk", "ag-ui"])
PROGRAM = "from tests.e2e.response_app import app"
numbers = count()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(PROGRAM, tmp_path_factory.mktemp("app"), {"PYTHONPATH": str(ROOT)}) as url:
        yield url


@pytest.fixture
def run(url: str) -> Iterator[Run]:
    with httpx.Client(base_url=url, timeout=GUARD_S) as client:
        yield Run(client)


class Run:
    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        self.id = f"run_{next(numbers)}"
        self.token = self.post("open")["token"]

    def post(self, path: str, **body: Any) -> Any:
        response = self.client.post(path, json={"id": self.id, **body})
        assert response.status_code == 200, response.text
        return response.json()

    def read(self, protocol: str, path: str = "/chat", **headers: str) -> Reader:
        query = f"id={self.id}&protocol={protocol}"
        return Reader(self.client.stream("GET", f"{path}?{query}", headers=headers))


class Reader:
    """The types of the events of a body."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __enter__(self) -> Reader:
        self.response: httpx.Response = self._stream.__enter__()
        self._lines = self.response.iter_lines()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stream.__exit__(*exc_info)

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
                yield data if data == "[DONE]" else json.loads(data)["type"]

    def until(self, type: str) -> None:
        assert type in iter(self)


TEXT = {"ai-sdk": "text-delta", "ag-ui": "TEXT_MESSAGE_CONTENT"}


@BOTH
@pytest.mark.parametrize(
    ("status", "ai_sdk", "ag_ui"),
    [
        ("COMPLETED", "finish", "RUN_FINISHED"),
        ("FAILED", "error", "RUN_ERROR"),
        ("CANCELED", "abort", "RUN_FINISHED"),
        ("CRASHED", "error", "RUN_ERROR"),
        ("TIMED_OUT", "error", "RUN_ERROR"),
        ("LOST", "error", "RUN_ERROR"),
    ],
)
def test_a_run_that_ends(run: Run, protocol: str, status: str, ai_sdk: str, ag_ui: str) -> None:
    run.post("append", chunks=["a"])
    with run.read(protocol) as reader:
        assert reader.response.headers["content-type"] == "text/event-stream; charset=utf-8"
        reader.until(TEXT[protocol])
        run.post("append", chunks=["b"])
        run.post("finish", status=status)
        ends = ["text-delta", "text-end", ai_sdk, "[DONE]"]
        assert list(reader) == (ends if protocol == "ai-sdk" else [TEXT[protocol], "TEXT_MESSAGE_END", ag_ui])


@BOTH
def test_a_token_that_expires_breaks_the_connection(run: Run, protocol: str) -> None:
    run.post("append", chunks=["a"])
    path = f"/realtime/v1/streams/{run.id}/default"
    with run.read(protocol, path, authorization=f"Bearer {run.token}") as reader:
        reader.until(TEXT[protocol])
        with pytest.raises(BROKEN):
            list(reader)
    with run.read(protocol, path, authorization=f"Bearer {run.token}") as reader:
        assert reader.response.status_code == 401


def test_a_client_of_http_1_0_sees_the_break_too(run: Run) -> None:
    """Its body ends with the connection: a proxy would take a connection that is closed for a complete body."""
    run.post("append", chunks=["a"])
    path = f"/realtime/v1/streams/{run.id}/default?protocol=ai-sdk&access_token={run.token}"
    url = run.client.base_url
    with socket.create_connection((url.host, url.port or 80), timeout=GUARD_S) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        with pytest.raises(ConnectionResetError):
            while connection.recv(65536):
                pass


@BOTH
def test_a_stream_without_its_beginning_is_an_error(run: Run, protocol: str) -> None:
    run.post("append", chunks=["x" * 100] * 40)
    with run.read(protocol) as reader:
        assert reader.response.status_code == 410
        assert "have expired" in json.loads(reader.response.read())["error"]


@BOTH
def test_a_client_resumes_and_gets_the_rest(run: Run, protocol: str) -> None:
    run.post("append", chunks=["a", "b", "c"])
    run.post("finish", status="COMPLETED")
    with run.read(protocol, **{"last-event-id": "1"}) as reader:
        assert next(iter(reader)) == TEXT[protocol]
    with run.read(protocol, **{"last-event-id": "3"}) as reader:
        assert reader.response.status_code == 204
    with run.read(protocol, **{"last-event-id": "9"}) as reader:
        assert reader.response.status_code == 400


@BOTH
def test_a_shutdown_breaks_the_connection(protocol: str, tmp_path: Path) -> None:
    with httpx.Client(timeout=GUARD_S) as client:
        with served(PROGRAM, tmp_path, {"PYTHONPATH": str(ROOT)}) as url:
            client.base_url = url
            run = Run(client)
            run.post("append", chunks=["a"])
            reader = run.read(protocol).__enter__()
            reader.until(TEXT[protocol])
        with pytest.raises(BROKEN):
            list(reader)
