"""The first program and page of README.md in Chromium, on Redis, through everything that the README says they survive.

Both are the text of the README. Only the words and the lifetime of the tokens are replaced, from outside: a test
releases each word, and a token expires after a second.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from playwright.sync_api import Browser, Page, expect

from tests.chromium import profile
from tests.docs.blocks import blocks
from tests.e2e.conftest import GUARD_S, Relay, start_uvicorn
from tests.e2e.test_browser_module import requests_of, until

pytestmark = [pytest.mark.slow, pytest.mark.chromium, pytest.mark.redis]

PROGRAM = blocks("program")["smallest"].text
PAGE = blocks("page")["smallest"].text

STAGED = """
import os
from functools import partial

from redis.asyncio import Redis

import app as readme

async def words():
    while word := (await released.blpop("words"))[1].decode():
        yield word

released = Redis.from_url(os.environ["REDIS_URL"])
readme.words = words
readme.realtime.create_public_token = partial(readme.realtime.create_public_token, expires_in="1s")
app = readme.app
"""
"""Serves the program. An empty word ends an answer."""


@dataclass
class Site:
    folder: Path
    redis_url: str
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        environment = {"REDIS_URL": self.redis_url}
        self.process, self.port = start_uvicorn(
            "staged:app", port=self.port, folder=self.folder, environment=environment
        )

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self) -> None:
        assert self.process is not None
        self.process.wait(GUARD_S)

    def release(self, *words: str) -> None:
        with redis.from_url(self.redis_url) as client:
            client.rpush("words", *words)


@pytest.fixture(scope="module")
def site(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("readme")
    for name, text in (("app.py", PROGRAM), ("page.html", PAGE), ("staged.py", STAGED)):
        (folder / name).write_text(text, "utf-8")
    site = Site(folder, redis_url.removesuffix("/0") + "/1")  # other tests use database 0
    site.start()
    yield site
    assert site.process is not None
    site.process.kill()
    site.process.wait()


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    with profile(chromium) as context:
        yield context.new_page()


def shows(page: Page, text: str) -> None:
    expect(page.locator("body")).to_have_text(text, timeout=GUARD_S * 1000)


@pytest.fixture
def relay(site: Site) -> Iterator[Relay]:
    with Relay(site.port) as relay:
        yield relay


def test_it_survives_reload_the_end_of_its_token_a_lost_network_and_a_restart(
    site: Site, relay: Relay, page: Page
) -> None:
    starts, tokens = requests_of(page, "/words"), requests_of(page, "/token")
    page.goto(relay.url)
    site.release("Each", "word")
    shows(page, "Each word")

    page.reload()
    shows(page, "Each word")
    site.release("is")
    shows(page, "Each word is")

    before = len(tokens)
    until(page, lambda: len(tokens) > before)  # the one that it had has expired

    page.context.set_offline(True)
    relay.cut()  # Chromium alone would leave open connections open
    site.release("sent")
    page.context.set_offline(False)
    shows(page, "Each word is sent")

    page.context.set_offline(True)
    relay.cut()
    site.signal(signal.SIGTERM)
    site.release("as", "soon", "")  # in the drain
    site.wait()
    assert page.inner_text("body").strip() == "Each word is sent"
    site.start()
    page.context.set_offline(False)
    shows(page, "Each word is sent as soon")
    page.wait_for_function("sessionStorage.run === undefined")
    assert [request.url for request in starts if request not in tokens] == [f"{relay.url}/words"]

    page.reload()
    until(page, lambda: len(starts) - len(tokens) == 2)  # it starts a new one
    site.release("Each", "")
    shows(page, "Each")


def test_an_answer_that_is_cut_ends_with_an_error(site: Site, page: Page) -> None:
    page.goto(site.url)
    site.release("Each", "word")
    shows(page, "Each word")
    site.signal(signal.SIGINT)  # gives the run half a second
    shows(page, "Each word [the server was shut down]")
    site.wait()
