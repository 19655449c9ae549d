"""The examples with `useChat`, as `make demo` starts them: Redis, two web processes, and the built page.

They are in one file, because the first one builds the page for both.

A fake language model gives the answer that the test sets, and can be held in the middle of it. The agent has models of
its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from playwright.sync_api import Browser, BrowserContext, Page

from examples.local_redis import wait_until
from examples.processes import running
from examples.redis_workers.__main__ import is_up
from examples.usechat_app.serving import FOLDER, web
from tests.chromium import profile
from tests.e2e.conftest import Relay, example
from tests.e2e.fake_model import ANSWER, FAILS, FakeModel
from tests.ports import free_port
from tests.requirements import node_binary, npm_packages

pytestmark = [pytest.mark.slow, pytest.mark.chromium, pytest.mark.redis]

QUESTION = "Tell me a story."
BUSY = "This chat is still answering. Wait for the answer, or stop it."
NOT_YOURS = "There is no such chat, or it is not yours."


@dataclass(frozen=True)
class Demo:
    url: str
    other_url: str
    """Another web process of the same app."""


@pytest.fixture(scope="module")
def demo(fake: FakeModel, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    node_binary()
    npm_packages(FOLDER)
    environment = {
        **fake.environment,
        "REDIS_URL": redis_url,
        "REALTIME_BROKER": redis_url,
        "REALTIME_SECRET_KEY": "secret-key-of-the-tests-with-32-bytes-or-more",
        "CHAT_DATABASE": str(tmp_path_factory.mktemp("chats") / "chats.sqlite3"),
    }
    with example("usechat_app", environment) as server:
        port = free_port()
        command = web("examples.usechat_app.app:app", port)
        with running(*command, environment=environment) as process:
            other_url = f"http://127.0.0.1:{port}"
            wait_until(lambda: is_up(other_url), [process])
            yield Demo(server.url, other_url)


@pytest.fixture
def context(chromium: Browser) -> Iterator[BrowserContext]:
    with profile(chromium) as context:
        yield context


@pytest.fixture
def page(context: BrowserContext, demo: Demo) -> Page:
    page = context.new_page()
    page.goto(demo.url)
    return page


@pytest.fixture
def held(fake: FakeModel) -> Iterator[FakeModel]:
    fake.hold()
    yield fake
    fake.let_go()


def ask(page: Page, question: str = QUESTION) -> None:
    page.fill("textarea", question)
    page.keyboard.press("Enter")


def wait_for_answer(page: Page, words: int = len(ANSWER)) -> None:
    """Wait until the last answer has so many words, and check that all others are whole."""
    text = "".join(ANSWER[:words]).strip()
    page.wait_for_function(
        "text => [...document.querySelectorAll('.answer')].at(-1)?.textContent.trim() === text", arg=text
    )


def wait_for_end(page: Page) -> None:
    page.wait_for_selector("button:text-is('Ask')")


def test_answers_and_questions_are_in_the_history(page: Page) -> None:
    ask(page)
    wait_for_answer(page)
    wait_for_end(page)
    ask(page, "Another one.")
    page.wait_for_function("document.querySelectorAll('.answer').length === 2")
    wait_for_answer(page)
    wait_for_end(page)
    shown = page.inner_text("article")
    assert page.inner_text("aside li") == QUESTION
    page.reload()
    page.wait_for_function("text => document.querySelector('article')?.innerText === text", arg=shown)
    assert page.locator(".ending, [role=alert]").count() == 0


def test_a_reload_in_mid_answer_continues_it(page: Page, held: FakeModel) -> None:
    ask(page)
    wait_for_answer(page, 10)
    page.reload()
    wait_for_answer(page, 10)
    held.let_go()
    wait_for_answer(page)
    wait_for_end(page)
    assert page.locator(".answer").count() == 1


def test_a_question_that_is_asked_again_replaces_its_answer(page: Page, demo: Demo) -> None:
    """What `regenerate` sends."""
    url = f"{demo.url}/api/chat"
    page.wait_for_load_state("networkidle")  # it has the cookie

    def stored() -> list[str]:
        return [message["id"] for message in page.request.get(f"{url}/again").json()]

    def ask_for(id: str, count: int) -> list[str]:
        assert page.request.post(url, data={"id": "again", "message": {**question("One."), "id": id}}).status == 200
        wait_until(lambda: len(stored()) == count, [])
        return stored()

    first = ask_for("1", 2)
    assert ask_for("2", 4)[:2] == first
    again = ask_for("1", 2)
    assert again[0] == "1" and again[1] not in first


def test_an_answer_that_is_stored_after_the_reload_appears(page: Page) -> None:
    ask(page)
    wait_for_answer(page)
    wait_for_end(page)
    chat = page.url.rpartition("#")[2]
    page.route(f"**/api/chat/{chat}", lambda route: route.fulfill(json=route.fetch().json()[:1]), times=1)
    page.reload()
    wait_for_answer(page)


def test_stop_keeps_the_text_and_says_so(page: Page, held: FakeModel) -> None:
    ask(page)
    wait_for_answer(page, 10)
    page.click("button:text-is('Stop')")
    page.wait_for_selector(".ending:text-is('Stopped')")
    wait_for_answer(page, 10)
    page.reload()
    page.wait_for_selector(".ending:text-is('Stopped')")
    wait_for_answer(page, 10)


def test_another_tab_and_another_process_show_and_stop_the_answer(
    page: Page, context: BrowserContext, demo: Demo, held: FakeModel
) -> None:
    ask(page)
    wait_for_answer(page, 10)
    other = context.new_page()
    other.goto(page.url.replace(demo.url, demo.other_url))
    wait_for_answer(other, 10)
    other.click("button:text-is('Stop')")
    for tab in (page, other):
        tab.wait_for_selector(".ending:text-is('Stopped')")
        wait_for_answer(tab, 10)


def test_a_connection_that_breaks_is_not_noticed(
    page: Page, context: BrowserContext, demo: Demo, held: FakeModel
) -> None:
    with Relay(int(demo.url.rpartition(":")[2])) as relay:
        page.goto(relay.url)
        ask(page)
        wait_for_answer(page, 10)
        context.set_offline(True)
        relay.cut()
        held.let_go()
        context.set_offline(False)
        wait_for_answer(page)
        wait_for_end(page)
        assert page.locator("[role=alert]").count() == 0


def test_a_failed_answer_is_shown_as_failed(page: Page) -> None:
    ask(page, FAILS)
    page.wait_for_selector("[role=alert]:text-is('task failed')")
    page.reload()
    page.wait_for_selector(".question")
    page.wait_for_selector(".ending:text-is('Interrupted by an error')")


# Requests that the server rejects


def question(text: str) -> dict[str, object]:
    return {"id": "m", "role": "user", "parts": [{"type": "text", "text": text}]}


def wait_for_rejection(page: Page, error: str, question: str) -> None:
    """The page shows the error, and the question is back in the field."""
    page.wait_for_selector(f"[role=alert]:text-is({error!r})")
    page.wait_for_function("text => document.querySelector('textarea').value === text", arg=question)


def test_a_question_in_a_busy_chat_is_returned_to_the_user(
    page: Page, context: BrowserContext, held: FakeModel
) -> None:
    ask(page)
    wait_for_answer(page, 10)
    other = context.new_page()
    other.route("**/stream", lambda route: route.fulfill(status=204))  # so that it does not know of the answer
    other.goto(page.url)
    ask(other, "Me too.")
    wait_for_rejection(other, BUSY, "Me too.")
    held.let_go()
    wait_for_answer(page)
    page.reload()
    assert page.locator(".question").all_inner_texts() in ([], [QUESTION])
    wait_for_answer(page)


def test_of_questions_at_the_same_moment_one_is_answered(page: Page, held: FakeModel) -> None:
    """In either web process, whichever gets them."""
    send_all = """(questions) => Promise.all(questions.map(async (message) => {
        const body = JSON.stringify({ id: "at-once", message });
        const headers = { "content-type": "application/json" };
        const response = await fetch("/api/chat", { method: "POST", headers, body });
        return [response.status, response.ok ? "" : await response.text()];
    }))"""
    page.wait_for_selector("textarea")
    answers = page.evaluate(send_all, [question(text) for text in ("One.", "Two.", "Three.")])
    assert sorted(answers) == [[200, ""], [409, BUSY], [409, BUSY]]


def test_the_chat_of_someone_else_is_not_shown(page: Page, chromium: Browser) -> None:
    ask(page)
    wait_for_answer(page)
    stranger = chromium.new_context()
    tab = stranger.new_page()
    for url in (page.url, f"{page.url}-unknown"):
        tab.goto(url)
        tab.reload()
        tab.wait_for_selector(f"[role=alert]:text-is({NOT_YOURS!r})")
    stranger.close()


def test_a_question_that_is_too_long_is_returned_to_the_user(page: Page) -> None:
    question = "x" * 20_001
    ask(page, question)
    error = "This cannot be sent. message.parts.0.text: String should have at most 20000 characters"
    wait_for_rejection(page, error, question)
    ask(page)  # the chat still works
    wait_for_answer(page)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({}, "This cannot be sent. id: Field required; message: Field required"),
        (
            {"id": "1", "message": {"id": "m", "role": "user", "parts": []}},
            "message.parts: List should have at least 1",
        ),
        ({"id": "1", "message": {"id": "m", "role": "system", "parts": [{}]}}, "message.role: Input should be 'user'"),
        ({"id": "1", "message": question("x" * 10_000_000)}, "message.parts.0.text: String should have at most 20000"),
        ({"id": "../1", "message": {"id": "m", "role": "user", "parts": [{}]}}, "id: String should match pattern"),
    ],
    ids=["empty", "no parts", "role", "10 MB", "id"],
)
def test_malformed_requests_are_rejected_with_a_reason(page: Page, demo: Demo, body: object, error: str) -> None:
    response = page.request.post(f"{demo.url}/api/chat", data=body)
    assert response.status == 422
    assert error in response.text()


def test_a_resume_after_the_end_of_the_stream_is_rejected(page: Page, demo: Demo, held: FakeModel) -> None:
    ask(page)
    wait_for_answer(page, 10)
    chat = page.url.rpartition("#")[2]
    response = page.request.get(f"{demo.url}/api/chat/{chat}/stream", headers={"last-event-id": "1000"})
    assert response.status != 200
    assert "1000" in response.text()


# The agent of pydantic-ai, with a scripted model and with pydantic-ai's own test model


@pytest.fixture(scope="module", params=["scripted", "test"])
def agent(request: pytest.FixtureRequest, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    node_binary()
    npm_packages(FOLDER)
    database = tmp_path_factory.mktemp("chats") / "chats.sqlite3"
    model = {} if request.param == "scripted" else {"AGENT_MODEL": request.param}
    with example("pydantic_ai_app", {"REDIS_URL": redis_url, "CHAT_DATABASE": str(database), **model}) as server:
        yield server.url


@pytest.fixture
def asking(context: BrowserContext, agent: str) -> Page:
    page = context.new_page()
    page.goto(agent)
    page.fill("textarea", "How is the weather in Lisbon?")
    page.keyboard.press("Enter")
    page.wait_for_selector("button:text-is('Approve')")
    return page


@pytest.mark.parametrize(
    ("button", "shown", "result"),
    [("Approve", "Approved", '"sent"'), ("Reject", "Rejected", '"The user does not want that."')],
)
def test_a_tool_waits_for_the_approval_of_the_user(asking: Page, button: str, shown: str, result: str) -> None:
    asking.reload()  # the question survives it
    asking.click(f"button:text-is('{button}')")
    asking.wait_for_selector("button:text-is('Ask')")
    asking.reload()
    asking.wait_for_selector(f".approval:has-text('{shown}')")
    calls = asking.locator(".tool").all_inner_texts()
    assert [call.partition("(")[0] for call in calls] == ["weather", "send_postcard"]
    assert calls[1].endswith(f"→ {result}")
    assert asking.locator("[role=alert]").count() == 0


def test_an_approval_that_comes_too_late_is_rejected_with_a_reason(asking: Page, agent: str) -> None:
    asking.click("button:text-is('Stop')")
    asking.wait_for_selector(".ending:text-is('Stopped')")
    assert asking.locator(".approval button").count() == 0
    chat = asking.url.rpartition("#")[2]
    late = asking.request.post(f"{agent}/api/chat/{chat}/approve", data={"id": "1", "approved": True})
    assert (late.status, late.text()) == (409, "This question is no longer open.")
