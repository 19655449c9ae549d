"""The official React hooks in Chromium, on a cross-origin page: `examples/react_app` as its users build it.

A fake language model gives the answer that the test sets, and can be held in the middle of it. The tests compare what
the page shows with what the run contains.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, Route

from asgi_realtime.tokens import TokenAuthority
from tests.e2e import react_page
from tests.e2e.conftest import GUARD_S, Server, example
from tests.e2e.fake_model import ANSWER, FAILS, FakeModel

pytestmark = [pytest.mark.slow, pytest.mark.chromium]

SECRET = "secret-key-of-the-tests-with-32-bytes-or-more"
QUESTION = "Tell me a story."
ROUND_TRIPS = 50


@dataclass(frozen=True)
class Chat:
    """A server, and the page built for it."""

    server: Server
    url: str


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return react_page.build(tmp_path_factory.mktemp("react"))


@contextmanager
def started(built: Path, folder: Path, fake: FakeModel, **environment: str) -> Iterator[Chat]:
    environment = {**fake.environment, "REALTIME_SECRET_KEY": SECRET, **environment}
    with example("fastapi_app", environment) as server, react_page.served(built, folder, server.url) as url:
        yield Chat(server, url)


@pytest.fixture(scope="module")
def chat(built: Path, fake: FakeModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    with started(built, tmp_path_factory.mktemp("memory"), fake) as chat:
        yield chat


@pytest.fixture(scope="module")
def redis_chat(
    built: Path, fake: FakeModel, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Chat]:
    with started(built, tmp_path_factory.mktemp("redis"), fake, REALTIME_BROKER=redis_url) as chat:
        yield chat


@pytest.fixture(params=["chat", pytest.param("redis_chat", marks=pytest.mark.redis)], ids=["memory", "redis"])
def either_chat(request: pytest.FixtureRequest) -> Chat:
    chat: Chat = request.getfixturevalue(request.param)
    return chat


@pytest.fixture
def errors() -> Iterator[list[str]]:
    """Uncaught errors of a page. A test removes those it expects."""
    errors: list[str] = []
    yield errors
    assert errors == []


@pytest.fixture
def context(chromium: Browser, errors: list[str]) -> Iterator[BrowserContext]:
    """A separate browser, so a separate user."""
    context = chromium.new_context()
    context.set_default_timeout(GUARD_S * 1000)
    context.on("weberror", lambda error: errors.append(str(error.error)))
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Page:
    return context.new_page()


@pytest.fixture
def held(fake: FakeModel) -> Iterator[FakeModel]:
    fake.hold()
    yield fake
    fake.let_go()


def ask(page: Page, question: str = QUESTION) -> str:
    """Ask a question, and return the id of the run."""
    before = shown_run(page)
    page.fill("textarea", question)
    page.keyboard.press("Enter")
    page.wait_for_function("before => location.hash.length > 1 && location.hash.slice(1) !== before", arg=before)
    return shown_run(page)


def shown_run(page: Page) -> str:
    shown: str = page.evaluate("location.hash.slice(1)")
    return shown


def wait_for_answer(page: Page, words: int) -> None:
    text = "".join(ANSWER[:words]).strip()
    page.wait_for_function("text => document.querySelector('.answer')?.textContent.trim() === text", arg=text)


def wait_for_status(page: Page, status: str) -> None:
    page.wait_for_selector(f"article footer [data-status={status}]")


def row(run_id: str, status: str) -> str:
    return f"aside a[href='#{run_id}'] [data-status={status}]"


def load_run(page: Page, chat: Chat, run_id: str) -> dict[str, Any]:
    session = page.request.post(f"{chat.url}/session").json()
    response = page.request.get(
        f"{chat.server.url}/realtime/api/v3/runs/{run_id}", headers={"authorization": f"Bearer {session['token']}"}
    )
    assert response.status == 200, response.text()
    run: dict[str, Any] = response.json()
    return run


def test_the_page_triggers_a_run_and_shows_its_answer_and_its_end(either_chat: Chat, page: Page) -> None:
    page.goto(either_chat.url)
    run_id = ask(page)
    wait_for_status(page, "COMPLETED")
    wait_for_answer(page, len(ANSWER))
    page.wait_for_selector(row(run_id, "COMPLETED"))

    run = load_run(page, either_chat, run_id)
    assert run["output"] == {"text": "".join(ANSWER)}
    assert run["payload"] == {"text": QUESTION}
    assert f"{run['metadata']['tokens']} tokens" in page.inner_text("article footer .status")


def test_the_answer_is_shown_while_it_is_written_and_after_a_reload(chat: Chat, page: Page, held: FakeModel) -> None:
    page.goto(chat.url)
    ask(page)
    wait_for_answer(page, 10)
    wait_for_status(page, "EXECUTING")

    page.reload()
    wait_for_answer(page, 10)
    wait_for_status(page, "EXECUTING")
    held.let_go()

    wait_for_answer(page, len(ANSWER))
    wait_for_status(page, "COMPLETED")


def test_the_list_of_runs_follows_another_tab(
    either_chat: Chat, context: BrowserContext, page: Page, held: FakeModel
) -> None:
    page.goto(either_chat.url)
    other = context.new_page()
    other.goto(either_chat.url)

    first = ask(page)
    other.wait_for_selector(row(first, "EXECUTING"))
    second = ask(page, "Another one.")
    other.wait_for_selector(row(second, "EXECUTING"))
    assert other.locator("aside .text").all_inner_texts() == ["Another one.", QUESTION]
    held.let_go()

    other.wait_for_selector(row(first, "COMPLETED"))
    other.wait_for_selector(row(second, "COMPLETED"))
    other.reload()
    other.wait_for_selector(row(first, "COMPLETED"))
    other.wait_for_selector(row(second, "COMPLETED"))


def test_an_approval_is_sent_to_the_run_that_waits_for_it(chat: Chat, page: Page) -> None:
    page.goto(chat.url)
    ask(page)
    page.click("button:text-is('Publish')")
    page.click("button:text-is('Approve')")  # with the token of the handle
    page.wait_for_selector("text=Published")


def test_an_approval_can_be_sent_after_a_reload(either_chat: Chat, page: Page) -> None:
    page.goto(either_chat.url)
    run_id = ask(page)
    page.click("button:text-is('Publish')")
    page.wait_for_selector("button:text-is('Approve')")

    page.reload()
    page.click(f"aside li a:not([href='#{run_id}'])")
    page.click("button:text-is('Reject')")  # with a token that the backend made
    page.wait_for_selector("text=Not published")
    wait_for_status(page, "COMPLETED")
    assert load_run(page, either_chat, shown_run(page))["output"] == {"published": False}


def test_the_stop_button_cancels_the_run_and_the_answer_stays(chat: Chat, page: Page, held: FakeModel) -> None:
    page.goto(chat.url)
    run_id = ask(page)
    wait_for_answer(page, 10)
    page.click("button:text-is('Stop')")
    wait_for_status(page, "CANCELED")
    wait_for_answer(page, 10)
    page.wait_for_selector(row(run_id, "CANCELED"))


def test_a_failed_run_shows_its_error(chat: Chat, page: Page) -> None:
    page.goto(chat.url)
    ask(page, FAILS)
    wait_for_status(page, "FAILED")
    assert page.inner_text("article [role=alert]") == "task failed"


def test_the_demo_serves_the_page_for_its_developers(built: Path, fake: FakeModel, page: Page) -> None:
    """With Vite's own server React mounts everything twice: each hook starts, stops, and starts again."""
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    with example("react_app", fake.environment) as server:
        page.goto(server.url)
        run_id = ask(page)
        wait_for_status(page, "COMPLETED")
        wait_for_answer(page, len(ANSWER))
        page.wait_for_selector(row(run_id, "COMPLETED"))
    assert complaints == []


# Refused tokens


def minted(*scopes: str, secret: str = SECRET, expires_in_s: float = 900, age_s: float = 0) -> str:
    authority = TokenAuthority(secret, clock=lambda: time.time() - age_s)
    return authority.mint(scopes, expires_in_s=expires_in_s)


def replace_tokens(page: Page, chat: Chat, **make: Callable[[str], str]) -> list[str]:
    """Replace every token that the page requests from its backend. Return the list of these requests."""
    asked: list[str] = []

    def answer(route: Route) -> None:
        session = route.fetch().json()
        asked.append(session["tag"])
        route.fulfill(json={**session, **{name: token(session["tag"]) for name, token in make.items()}})

    page.route(f"{chat.url}/session", answer)
    return asked


REFUSED: dict[str, tuple[int, Callable[[str], str]]] = {
    "expired": (401, lambda tag: minted(f"read:tags:{tag}", age_s=3600)),
    "of another server": (401, lambda tag: minted(f"read:tags:{tag}", secret="another" + SECRET)),
    "of another user": (403, lambda tag: minted("read:tags:user:another")),
}


@pytest.mark.parametrize("token", REFUSED)
def test_a_rejected_token_is_shown_and_not_retried(chat: Chat, page: Page, token: str) -> None:
    status, make = REFUSED[token]
    replace_tokens(page, chat, token=make)
    page.goto(chat.url)
    page.wait_for_selector("aside [role=alert]")
    assert f"HTTP Error {status}" in page.inner_text("aside [role=alert]")
    assert requests_while_idle(page, chat) == []


def test_a_rejected_trigger_is_shown(chat: Chat, page: Page, errors: list[str]) -> None:
    replace_tokens(page, chat, triggerToken=lambda tag: minted("trigger:tasks:publish"))
    page.goto(chat.url)
    page.fill("textarea", QUESTION)
    page.keyboard.press("Enter")
    page.wait_for_selector("form [role=alert]")
    assert "trigger:tasks:chat" in page.inner_text("form [role=alert]")
    assert requests_while_idle(page, chat) == []
    assert "trigger:tasks:chat" in errors.pop()  # the `submit` of the hook also causes an unhandled rejection


def test_an_answer_outlives_the_token_that_it_started_with(chat: Chat, page: Page, held: FakeModel) -> None:
    """The client renews the token of a stream, but not that of a feed, which ends with an error."""
    page.goto(chat.url)
    ask(page)
    lives_s = iter([3.0, 900.0])
    asked = replace_tokens(page, chat, token=lambda tag: minted(f"read:tags:{tag}", expires_in_s=next(lives_s)))
    page.reload()
    wait_for_answer(page, 10)
    page.wait_for_selector("article [role=alert]")
    assert "HTTP Error 401" in page.inner_text("article [role=alert]")
    held.let_go()

    wait_for_answer(page, len(ANSWER))
    assert len(asked) == 2
    assert requests_while_idle(page, chat) == []


# An idle page


def requests_while_idle(page: Page, chat: Chat) -> list[str]:
    """The requests of the page while the server handles others. A client in a busy loop sends hundreds."""
    seen: list[str] = []

    def note(request: Request) -> None:
        seen.append(request.url)

    page.on("request", note)
    for _ in range(ROUND_TRIPS):
        page.request.post(f"{chat.url}/session")
    page.remove_listener("request", note)
    return seen


def test_an_idle_page_sends_no_requests(chat: Chat, page: Page, held: FakeModel) -> None:
    page.goto(chat.url)
    run_id = ask(page)
    wait_for_answer(page, 10)
    for status in ("article footer .status", "aside .status"):  # the last change was published
        page.wait_for_selector(f"{status}:has-text('10 tokens')")
    assert len(requests_while_idle(page, chat)) <= 2  # the held poll of each feed can end in between

    held.let_go()
    wait_for_status(page, "COMPLETED")
    wait_for_answer(page, len(ANSWER))
    page.wait_for_selector(row(run_id, "COMPLETED"))
    assert len(requests_while_idle(page, chat)) <= 1


# A host with its own CORS middleware


@contextmanager
def host_with_cors(cure: str, built: Path, fake: FakeModel, folder: Path) -> Iterator[Chat]:
    environment = {**fake.environment, "CURE": cure}
    with (
        example("cors_app", environment, package="tests.e2e") as server,
        react_page.served(built, folder, server.url) as url,
    ):
        yield Chat(server, url)


def test_a_host_that_exposes_other_headers_breaks_feeds(
    built: Path, fake: FakeModel, tmp_path: Path, page: Page
) -> None:
    with host_with_cors("none", built, fake, tmp_path) as chat:
        page.goto(chat.url)
        page.wait_for_selector("aside [role=alert]")
        assert "electric-offset" in page.inner_text("aside [role=alert]")


@pytest.mark.parametrize("cure", ["exposed", "outermost"])
def test_the_fixes_for_such_a_host(built: Path, fake: FakeModel, tmp_path: Path, page: Page, cure: str) -> None:
    with host_with_cors(cure, built, fake, tmp_path) as chat:
        page.goto(chat.url)
        run_id = ask(page)
        wait_for_status(page, "COMPLETED")
        wait_for_answer(page, len(ANSWER))
        page.wait_for_selector(row(run_id, "COMPLETED"))
