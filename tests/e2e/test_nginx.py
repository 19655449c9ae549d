"""A real nginx in front, with the configuration in docs/deployment.md: what passes, when, and what cuts a stream."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser

from tests.docs.blocks import blocks
from tests.e2e.hosts.servers import GUARD_S
from tests.e2e.proxies import Certificate, Visitor, app, check_chunks_arrive_as_they_are_written, nginx, wait_for
from tests.ports import free_port

pytestmark = [pytest.mark.slow]

SITE = blocks("nginx")["site"].text


@dataclass
class Front:
    """nginx in front of an app, and the ports to start another app."""

    folder: Path
    certificate: Certificate
    port: int
    app_port: int

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def visitor(self, *, http2: bool = False) -> Visitor:
        return Visitor(self.url, self.certificate.trust, http2=http2)


def site(certificate: Certificate, port: int, app_port: int, changes: dict[str, str]) -> str:
    """The site of the document, with our ports and files, and with changes, each of which must match."""
    ours = {
        "127.0.0.1:8000": f"127.0.0.1:{app_port}",
        "listen 443": f"listen 127.0.0.1:{port}",
        "/etc/ssl/app/chain.pem": str(certificate.chain),
        "/etc/ssl/app/key.pem": str(certificate.key),
    }
    text = SITE
    for old, new in (ours | changes).items():
        assert old in text, f"{old!r} is not in the site"
        text = text.replace(old, new)
    return text


@contextmanager
def front(folder: Path, changes: dict[str, str] | None = None, *, app_port: int | None = None) -> Iterator[Front]:
    """An nginx, before the app on `app_port` or before none yet."""
    found = Front(folder, Certificate.make(folder), free_port(), app_port or free_port())
    with nginx(folder, site(found.certificate, found.port, found.app_port, changes or {}), port=found.port):
        yield found


@contextmanager
def served(folder: Path, changes: dict[str, str] | None = None, *options: str, **environment: str) -> Iterator[Front]:
    with front(folder, changes) as found, app(folder, *options, port=found.app_port, **environment):
        yield found


@pytest.fixture(scope="module")
def quiet_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an app that sends nothing but chunks, for the tests that do not stop it."""
    port = free_port()
    with app(tmp_path_factory.mktemp("quiet"), port=port):
        yield port


@pytest.fixture(scope="module")
def beating_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an app that sends heartbeats all the time."""
    port = free_port()
    with app(tmp_path_factory.mktemp("beating"), port=port, HEARTBEAT="0.2"):
        yield port


@pytest.fixture(scope="module")
def plain(quiet_app: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """The site as printed, for the tests that stop nothing."""
    with front(tmp_path_factory.mktemp("nginx"), app_port=quiet_app) as found:
        yield found


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
def test_chunks_arrive_as_they_are_written(plain: Front, http2: bool) -> None:
    with plain.visitor(http2=http2) as visitor:
        check_chunks_arrive_as_they_are_written(visitor)
        version = visitor.http.get(f"{plain.url}/realtime/v1/health").http_version
        assert version == ("HTTP/2" if http2 else "HTTP/1.1")


def test_many_streams_share_one_connection_of_http2(plain: Front) -> None:
    with plain.visitor() as host, plain.visitor(http2=True) as visitor, ExitStack() as stack:
        visitor.http = httpx.Client(
            verify=plain.certificate.trust, http2=True, timeout=GUARD_S, limits=httpx.Limits(max_connections=1)
        )
        run = host.post("/open")
        streams = [stack.enter_context(visitor.stream(run)) for _ in range(30)]
        host.post("/append", run=run["id"], chunk="to all")
        assert [stream.event().json() for stream in streams] == ["to all"] * 30
        visitor.http.close()


def test_the_app_notices_a_disconnected_reader(plain: Front) -> None:
    with plain.visitor() as host, plain.visitor() as visitor:
        run = host.post("/open")
        wait_for(lambda: host.count() == 0, "subscribers of other tests remain")
        with visitor.stream(run):
            wait_for(lambda: host.count() == 1, "the reader is not subscribed")
        wait_for(lambda: host.count() == 0, "the app did not notice the disconnect")


def test_no_token_is_in_the_access_log(quiet_app: int, tmp_path: Path) -> None:
    with front(tmp_path, app_port=quiet_app) as found, found.visitor() as visitor:
        run = visitor.post("/open")
        visitor.post("/append", run=run["id"], chunk="one")
        visitor.post("/end", run=run["id"])
        path = f"/realtime/v1/streams/{run['id']}/default?access_token={run['token']}"
        assert '"one"' in visitor.http.get(found.url + path).text
        visitor.post("/open")
        log = tmp_path / "access.log"
        wait_for(lambda: log.read_text().count("POST /open") == 2, "the log is not written")
        assert run["token"] not in log.read_text()


UNBUFFERED = {"        proxy_buffering off;           # streams to readers\n": ""}
BUFFERED = {"proxy_buffering off;": "proxy_ignore_headers X-Accel-Buffering; proxy_buffering on;"}
COMPRESSED = {"gzip off;": "gzip on; gzip_types *;"}


def test_the_header_of_the_library_is_enough_against_buffering(quiet_app: int, tmp_path: Path) -> None:
    with front(tmp_path, UNBUFFERED, app_port=quiet_app) as found, found.visitor() as visitor:
        check_chunks_arrive_as_they_are_written(visitor)


@pytest.mark.parametrize(
    ("changes", "http2", "held"),
    [
        ({" ssl http2": ""}, False, False),
        ({}, False, True),
        ({}, True, False),
        ({" ssl http2": "", **COMPRESSED}, False, True),
        (COMPRESSED, False, True),
        (COMPRESSED, True, True),
    ],
    ids=["http1", "http1 with tls", "http2", "http1, gzip", "http1 with tls, gzip", "http2, gzip"],
)
def test_where_the_header_is_ignored_a_quiet_stream_can_be_held_to_its_end(
    beating_app: int, tmp_path: Path, changes: dict[str, str], http2: bool, held: bool
) -> None:
    """Proof that the other tests can fail: this is what they would see if nginx buffered."""
    with front(tmp_path, BUFFERED | changes, app_port=beating_app) as found:
        url = found.url if " ssl http2" not in changes else found.url.replace("https", "http")
        host = Visitor(url, found.certificate.trust)
        visitor = Visitor(url, found.certificate.trust, http2=http2)
        with host, visitor:
            check_a_quiet_stream(host, visitor, held=held)


def check_a_quiet_stream(host: Visitor, visitor: Visitor, *, held: bool) -> None:
    wait_for(lambda: host.count() == 0, "subscribers of other tests remain")
    run = host.post("/open")
    arrived = threading.Event()
    events: list[str] = []

    def read() -> None:
        with visitor.stream(run) as stream:
            events.append(stream.event().data)
            arrived.set()
            events.extend(event.event for event in stream.rest())

    reader = threading.Thread(target=read)
    reader.start()
    wait_for(lambda: host.count() == 1, "the reader is not subscribed")
    host.post("/append", run=run["id"], chunk="quiet")
    assert arrived.wait(1 if held else GUARD_S) is not held
    host.post("/end", run=run["id"])
    reader.join(GUARD_S)
    assert events == ['"quiet"', "end"]


HURRIED = {"proxy_read_timeout 75s;": "proxy_read_timeout 1s;"}


def test_a_read_timeout_shorter_than_the_heartbeat_cuts_and_the_reader_resumes(quiet_app: int, tmp_path: Path) -> None:
    with front(tmp_path, HURRIED, app_port=quiet_app) as found, found.visitor() as visitor:
        run = visitor.post("/open")
        with visitor.stream(run) as stream:
            visitor.post("/append", run=run["id"], chunk="first")
            event = stream.event()
            with pytest.raises(httpx.RemoteProtocolError):
                stream.rest()
        visitor.post("/append", run=run["id"], chunk="second")
        with visitor.stream(run, last_event_id=event.id) as stream:
            assert stream.event().json() == "second"


def test_a_read_timeout_longer_than_the_heartbeat_cuts_nothing(beating_app: int, tmp_path: Path) -> None:
    with front(tmp_path, HURRIED, app_port=beating_app) as found, found.visitor() as visitor:
        run = visitor.post("/open")
        with visitor.stream(run) as stream:
            stream.wait_for_comments(11)  # which is more than twice the timeout
            visitor.post("/append", run=run["id"], chunk="still there")
            assert stream.event().json() == "still there"


@pytest.mark.parametrize("types", ["", "gzip_types *;"], ids=["by default", "of all types"])
def test_gzip_does_not_hold_chunks_back(quiet_app: int, tmp_path: Path, types: str) -> None:
    compressing = {"gzip off;": f"gzip on; gzip_proxied any; {types}"}
    with front(tmp_path, compressing, app_port=quiet_app) as found, found.visitor() as visitor:
        check_chunks_arrive_as_they_are_written(visitor)
        with visitor.stream(visitor.post("/open"), **{"accept-encoding": "gzip"}) as stream:
            encoding = stream.response.headers.get("content-encoding")
        assert encoding == ("gzip" if types else None)


def with_location(location: str) -> dict[str, str]:
    return {"    location / {": f"{location}\n    location / {{"}


STRIPPED = blocks("nginx")["stripped"].text
KEPT = "location /api/ { proxy_pass http://app; }"


def test_a_prefix_that_the_proxy_strips(tmp_path: Path) -> None:
    assert "uvicorn app:app --root-path /api" in STRIPPED
    with served(tmp_path, with_location(STRIPPED), "--root-path", "/api") as found, found.visitor() as visitor:
        visitor.url += "/api"
        check_chunks_arrive_as_they_are_written(visitor)
        assert visitor.http.get(f"{found.url}/api/realtimeX").status_code == 404


def test_a_prefix_that_the_proxy_keeps(tmp_path: Path) -> None:
    with served(tmp_path, with_location(KEPT), PREFIX="/api/realtime") as found, found.visitor() as visitor:
        check_chunks_arrive_as_they_are_written(visitor, prefix="/api/realtime")
        assert visitor.http.get(f"{found.url}/realtime/v1/health").status_code == 404


def test_an_app_that_is_killed_cuts_the_stream(tmp_path: Path) -> None:
    with front(tmp_path) as found, found.visitor() as visitor:
        with app(tmp_path, port=found.app_port) as process:
            run = visitor.post("/open")
            with visitor.stream(run) as stream:
                visitor.post("/append", run=run["id"], chunk="first")
                stream.event()
                process.kill()
                with pytest.raises(httpx.RemoteProtocolError):
                    stream.rest()
        assert visitor.http.get(f"{found.url}/realtime/v1/health").status_code == 502
        with app(tmp_path, port=found.app_port):
            check_chunks_arrive_as_they_are_written(visitor)


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
def test_an_app_that_shuts_down_ends_its_streams(tmp_path: Path, http2: bool) -> None:
    with front(tmp_path) as found, app(tmp_path, port=found.app_port) as process:
        with found.visitor(http2=http2) as visitor:
            run = visitor.post("/open")
            with visitor.stream(run) as stream:
                visitor.post("/append", run=run["id"], chunk="first")
                stream.event()
                process.send_signal(signal.SIGTERM)
                assert [event.event for event in stream.rest()] == ["end"]
        assert process.wait(GUARD_S) in (0, -signal.SIGTERM)


def test_chunks_of_a_writer_arrive_before_its_request_ends(plain: Front) -> None:
    with plain.visitor() as visitor:
        run = visitor.post("/open")
        read = threading.Event()

        def lines() -> Iterator[bytes]:
            yield b'"one"\n'
            assert read.wait(GUARD_S), "the first line is held back until the request ends"
            yield b'"two"\n'

        answers: list[int] = []

        def write() -> None:
            headers = {"authorization": "Bearer a key for tests, 32 bytes or more"}
            path = f"{plain.url}/realtime/v1/streams/{run['id']}/self/default"
            with plain.visitor() as writer:
                answers.append(writer.http.post(path, content=lines(), headers=headers).status_code)

        thread = threading.Thread(target=write)
        with visitor.stream(run) as stream:
            thread.start()
            assert stream.event().json() == "one"
            read.set()
            assert stream.event().json() == "two"
        thread.join(GUARD_S)
        assert answers == [200]


OPEN_EIGHT = """
    async ({ id, token }) => {
      window.sources = Array.from({ length: 8 }, () =>
        new EventSource(`/realtime/v1/streams/${id}/default?access_token=${token}`));
    }
"""
OPENED = "sources.filter((source) => source.readyState === EventSource.OPEN).length"


@pytest.mark.chromium
@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
def test_a_browser_opens_six_streams_over_http1_and_all_over_http2(
    quiet_app: int, tmp_path: Path, chromium: Browser, http2: bool
) -> None:
    changes = {} if http2 else {"ssl http2;": "ssl;"}
    with front(tmp_path, changes, app_port=quiet_app) as found, found.visitor() as host:
        wait_for(lambda: host.count() == 0, "subscribers of other tests remain")
        run = host.post("/open")
        context = chromium.new_context(ignore_https_errors=True)
        page = context.new_page()
        page.goto(found.url)
        page.evaluate(OPEN_EIGHT, run)
        expected = 8 if http2 else 6
        page.wait_for_function(f"({OPENED}) >= {expected}")
        wait_for(lambda: host.count() == expected, "not all are open")
        fetched = page.evaluate(
            "Promise.race([fetch('/').then(() => true), new Promise((no) => setTimeout(no, 1000))])"
        )
        assert (fetched, page.evaluate(OPENED), host.count()) == (True if http2 else None, expected, expected)
        page.evaluate("sources[0].close()")
        if http2:  # the app notices although the connection stays open
            wait_for(lambda: host.count() == 7, "the app did not notice the disconnect")
        else:  # the next one gets its connection
            page.wait_for_function("sources[6].readyState === EventSource.OPEN")
        context.close()
