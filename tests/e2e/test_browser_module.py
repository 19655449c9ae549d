"""The browser module in Chromium, with the page of docs/browser.md and a real server that is stopped and started.

The run is executed in a second process, so that it survives the restart of the web process. Tests wait for what the
page shows or requests; nothing depends on timing.
"""

from __future__ import annotations

import secrets
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect

from tests.chromium import launched, profile
from tests.e2e.conftest import GUARD_S, Relay, start_uvicorn

pytestmark = [pytest.mark.slow, pytest.mark.chromium, pytest.mark.redis]


@dataclass
class Stage:
    """The two processes."""

    environment: dict[str, str]
    port: int = 0
    web: subprocess.Popen[bytes] | None = None
    producer: str = ""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, port: int = 0) -> int:
        """Start a process, and return its port."""
        environment = {**self.environment, "PRODUCER": self.producer}
        process, found = start_uvicorn("tests.e2e.browser_app:app", port=port, environment=environment)
        self.processes.append(process)
        return found

    def start_web(self) -> None:
        self.port = self.start(self.port)
        self.web = self.processes[-1]

    def stop_web(self) -> None:
        assert self.web is not None
        self.web.send_signal(signal.SIGTERM)
        self.web.wait(GUARD_S)

    def append(self, run: str, *chunks: str, end: bool = False) -> None:
        body = {"chunks": chunks, "end": end}
        httpx.post(f"{self.producer}/append/{run}", json=body, timeout=GUARD_S).raise_for_status()


@contextmanager
def staged(redis_url: str) -> Iterator[Stage]:
    stage = Stage({"REDIS_URL": redis_url, "PREFIX": f"t{secrets.token_hex(6)}"})
    try:
        stage.producer = f"http://127.0.0.1:{stage.start()}"
        stage.start_web()
        yield stage
    finally:
        for process in stage.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def stage(redis_url: str) -> Iterator[Stage]:
    with staged(redis_url) as started:
        yield started


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """As users have it, with a back/forward cache."""
    with launched(ignore_default_args=["--disable-back-forward-cache"]) as browser:
        yield browser


@pytest.fixture
def context(chromium: Browser) -> Iterator[BrowserContext]:
    with profile(chromium) as context:
        yield context


@pytest.fixture
def page(context: BrowserContext) -> Page:
    return context.new_page()


def open_answer(page: Page, stage: Stage, url: str = "") -> str:
    """Open the page, which starts an answer. Returns the run's id."""
    page.goto(url or stage.url)
    until(page, lambda: page.evaluate("sessionStorage.getItem('answer')"))
    run: str = page.evaluate("JSON.parse(sessionStorage.getItem('answer')).id")
    stage.append(run, "a", "b")
    shows(page, "ab")
    return run


def shows(page: Page, text: str) -> None:
    expect(page.locator("#output")).to_have_text(text, timeout=GUARD_S * 1000)


def requests_of(page: Page, part: str) -> list[Request]:
    """The requests for URLs that contain `part`, from now on."""
    found: list[Request] = []
    page.on("request", lambda request: found.append(request) if part in request.url else None)
    return found


def until(page: Page, condition: Callable[[], object]) -> None:
    """Wait for an event of the page, such as a request, that makes the condition true."""
    for _ in range(round(GUARD_S * 100)):
        if condition():
            return
        page.wait_for_timeout(10)
    raise AssertionError("it did not happen")


def test_the_page_survives_reload_offline_restart_and_the_end_of_its_token(
    stage: Stage, context: BrowserContext, page: Page
) -> None:
    tokens = requests_of(page, "/token")
    run = open_answer(page, stage)
    until(page, lambda: len(tokens) == 1)  # the first one expires after a second

    page.reload()
    shows(page, "ab")
    stage.append(run, "c")
    shows(page, "abc")

    context.set_offline(True)
    stage.stop_web()
    stage.append(run, "d")
    context.set_offline(False)
    stage.start_web()
    shows(page, "abcd")

    stage.append(run, "e", end=True)
    shows(page, "abcde [end]")
    page.reload()
    shows(page, "abcde [end]")


def test_a_lost_network_is_found_again_immediately(stage: Stage, context: BrowserContext, page: Page) -> None:
    with Relay(stage.port) as relay:
        run = open_answer(page, stage, relay.url)
        context.set_offline(True)
        relay.cut()
        stage.append(run, "c")
        streams = requests_of(page, "/v1/streams/")
        until(page, lambda: streams)  # it has noticed
        assert page.text_content("#output") == "ab"
        context.set_offline(False)
        shows(page, "abc")
        stage.append(run, end=True)
        shows(page, "abc [end]")


def test_two_tabs_show_the_same(stage: Stage, context: BrowserContext, page: Page) -> None:
    run = open_answer(page, stage)
    with context.expect_page() as opened:
        page.evaluate("window.open('/')")  # with a copy of the sessionStorage
    shows(opened.value, "ab")
    stage.append(run, "c", end=True)
    shows(page, "abc [end]")
    shows(opened.value, "abc [end]")


def test_a_silent_connection_is_replaced(stage: Stage, page: Page) -> None:
    """A computer that slept, or a network that drops packets: the browser never reports the connection as lost."""
    page.clock.install()
    run = open_answer(page, stage)
    streams = requests_of(page, "/v1/streams/")
    page.clock.fast_forward(39_000)
    assert streams == []
    page.clock.fast_forward(2_000)
    until(page, lambda: len(streams) == 1)
    assert streams[0].headers["last-event-id"] == "1"
    stage.append(run, "c", end=True)
    shows(page, "abc [end]")


def test_a_page_in_the_back_forward_cache_continues(stage: Stage, page: Page) -> None:
    run = open_answer(page, stage)
    page.evaluate("window.isSame = true")
    page.goto(f"{stage.url}/realtime/v1/health")
    stage.append(run, "c", end=True)
    page.go_back(wait_until="commit")  # there is no event `load`
    shows(page, "abc [end]")
    assert page.evaluate("window.isSame"), "the page was loaded again"
