"""Behind a real Caddy, with the configuration of docs/deployment.md."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.docs.blocks import blocks
from tests.e2e.hosts.servers import GUARD_S
from tests.e2e.proxies import Certificate, Visitor, app, caddy, check_chunks_arrive_as_they_are_written, wait_for
from tests.ports import free_port

pytestmark = [pytest.mark.slow]

SITE = blocks("caddy")["site"].text
PROXY = "\treverse_proxy 127.0.0.1:8000\n"


@contextmanager
def front(folder: Path, app_port: int, directives: str = "") -> Iterator[tuple[str, Certificate]]:
    """The site of the page, with our ports and files. Yields its URL."""
    certificate, port = Certificate.make(folder), free_port()
    text = SITE.replace(PROXY, directives + PROXY)
    for old, new in {
        "127.0.0.1:8000": f"127.0.0.1:{app_port}",
        "localhost {": f"localhost:{port} {{",
        "/etc/ssl/app/chain.pem": str(certificate.chain),
        "/etc/ssl/app/key.pem": str(certificate.key),
    }.items():
        assert old in text
        text = text.replace(old, new)
    with caddy(folder, text, port=port):
        yield f"https://localhost:{port}", certificate


@contextmanager
def served(folder: Path, directives: str = "", **environment: str) -> Iterator[tuple[str, Certificate]]:
    app_port = free_port()
    with front(folder, app_port, directives) as found, app(folder, port=app_port, **environment):
        yield found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Certificate]]:
    with served(tmp_path_factory.mktemp("caddy"), HEARTBEAT="0.2") as found:
        yield found


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
def test_chunks_arrive_as_they_are_written(plain: tuple[str, Certificate], http2: bool) -> None:
    url, certificate = plain
    with Visitor(url, certificate.trust, http2=http2) as visitor:
        check_chunks_arrive_as_they_are_written(visitor)
        version = visitor.http.get(f"{url}/realtime/v1/health").http_version
        assert version == ("HTTP/2" if http2 else "HTTP/1.1")


def test_the_app_notices_a_disconnected_reader(plain: tuple[str, Certificate]) -> None:
    url, certificate = plain
    with Visitor(url, certificate.trust) as host, Visitor(url, certificate.trust) as visitor:
        run = host.post("/open")
        wait_for(lambda: host.count() == 0, "subscribers of other tests remain")
        with ExitStack() as stack:
            for _ in range(10):
                stack.enter_context(visitor.stream(run))
            wait_for(lambda: host.count() == 10, "not all readers are subscribed")
        wait_for(lambda: host.count() == 0, "the app did not notice the disconnect")


def test_heartbeats_pass_through(plain: tuple[str, Certificate]) -> None:
    url, certificate = plain
    with Visitor(url, certificate.trust) as visitor, visitor.stream(visitor.post("/open")) as stream:
        stream.wait_for_comments(4)


LARGE = "x" * 100_000
"""Caddy compresses a response if its first piece has 512 bytes, which depends on how the response is split."""
TRIES = 60
"""Where this was measured, two of five streams that start with this much were compressed."""


class Reader:
    """Reads a stream that starts with `LARGE` in a thread."""

    def __init__(self, url: str, certificate: Certificate, run: dict[str, str]) -> None:
        self.arrived = threading.Event()
        self._opened = threading.Event()
        self._encoding: str | None = None
        self._events: list[str] = []
        self._visitor = Visitor(url, certificate.trust)
        self._run = run
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with self._visitor, self._visitor.stream(self._run, **{"accept-encoding": "gzip"}) as stream:
            self._encoding = stream.response.headers.get("content-encoding")
            self._opened.set()
            self._events.append(stream.event().event)
            self.arrived.set()
            self._events.extend(event.event for event in stream.rest())

    def is_compressed(self) -> bool:
        assert self._opened.wait(GUARD_S)
        return self._encoding is not None

    def events(self) -> list[str]:
        """Everything to the end of the stream."""
        self._thread.join(GUARD_S)
        return self._events


def read_many(host: Visitor, url: str, certificate: Certificate) -> Generator[Reader, None, None]:
    """Yield one non-empty stream after the other; each ends when the next is requested."""
    for _ in range(TRIES):
        run = host.post("/open")
        host.post("/append", run=run["id"], chunk=LARGE)
        reader = Reader(url, certificate, run)
        try:
            yield reader
        finally:
            host.post("/end", run=run["id"])
        assert reader.events() == ["message", "end"]


def test_only_pages_are_compressed(tmp_path: Path) -> None:
    printed = blocks("caddy")["compressed"].text
    with served(tmp_path, printed) as (url, certificate), Visitor(url, certificate.trust) as host:
        assert host.http.get(f"{url}/", headers={"accept-encoding": "gzip"}).headers["content-encoding"] == "gzip"
        assert not any(reader.is_compressed() for reader in read_many(host, url, certificate))


def test_compressing_everything_delays_streams(tmp_path: Path) -> None:
    """The reason why the page excludes them, and how the test above could fail."""
    with served(tmp_path, "encode gzip\n") as (url, certificate), Visitor(url, certificate.trust) as host:
        readers = read_many(host, url, certificate)
        compressed = next(reader for reader in readers if reader.is_compressed())
        assert not compressed.arrived.wait(1)
        readers.close()
        assert compressed.events() == ["message", "end"]


def test_streams_end_when_the_app_stops_or_is_killed(tmp_path: Path) -> None:
    app_port = free_port()
    with front(tmp_path, app_port) as (url, certificate), Visitor(url, certificate.trust) as visitor:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with app(tmp_path, port=app_port) as process:
                run = visitor.post("/open")
                with visitor.stream(run) as stream:
                    visitor.post("/append", run=run["id"], chunk="first")
                    stream.event()
                    process.send_signal(number)
                    # nginx cuts off the response of a killed app; Caddy ends it as if it were complete.
                    expected = ["end"] if number == signal.SIGTERM else []
                    assert [event.event for event in stream.rest()] == expected
                process.wait(GUARD_S)
