"""The unmodified `useChat` of the AI SDK, in versions 5, 6 and 7, in Chromium."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext

from tests.chromium import profile
from tests.e2e.answers import ANSWERS, OUTPUT, TEXT, end, say
from tests.e2e.conftest import Relay
from tests.e2e.site import Site, serving, starting
from tests.e2e.usechat_page import Chat, build

pytestmark = [pytest.mark.slow, pytest.mark.chromium]


APP = "tests.e2e.frontends_app:app"
VERSIONS = ["5", "6", "7"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"PAGE": str(build(tmp_path_factory.mktemp("pages")))}


@pytest.fixture(scope="module")
def host(environment: dict[str, str]) -> Iterator[Site]:
    with serving("memory", app=APP, environment=environment) as site:
        yield site


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    version: str = request.param
    return version


@pytest.fixture
def context(chromium: Browser) -> Iterator[BrowserContext]:
    with profile(chromium) as context:
        yield context


@pytest.fixture
def chat(context: BrowserContext, host: Site, version: str) -> Chat:
    host.ensure_running()
    return Chat(context.new_page(), host, version, f"chat-{secrets.token_hex(4)}")


def test_an_answer_is_shown_as_it_arrives(chat: Chat) -> None:
    chat.open()
    run = chat.send()
    say(run, "Hel")
    chat.until_text("Hel", streams=True)
    say(run, "lo")
    chat.until_text("Hello")
    end(run)
    state = chat.until("status === 'ready'")
    assert state["error"] is None
    assert [message["role"] for message in state["messages"]] == ["user", "assistant"]
    assert chat.send().id != run.id  # the thread is free as soon as the answer has ended


def test_tool_calls_are_shown(chat: Chat) -> None:
    chat.open()
    run = chat.send()
    *calls, finish = ANSWERS["two tool calls at once"]
    before = calls.index(OUTPUT)
    say(run, *calls[:before])
    chat.until("messages.at(-1).parts.length === 2 && messages.at(-1).parts[1].state === 'output-available'")
    say(run, *calls[before:], finish)
    end(run)
    state = chat.until("status === 'ready'")
    tools = [(part["type"], part["state"], part["output"]) for part in state["messages"][1]["parts"]]
    assert tools == [
        ("tool-weather", "output-available", {"degrees": 21}),
        ("tool-clock", "output-available", None),
    ]


def test_a_reload_in_mid_answer_continues_it(chat: Chat) -> None:
    chat.open()
    run = chat.send()
    say(run, "Hel", "l")
    stored = chat.until_text("Hell")["messages"]
    before: list[Any] = []
    for messages in (before, stored):  # the page may have stored the part that it has seen
        chat.open(resume=True, messages=messages)
        chat.until_text("Hell", streams=True)
    say(run, "o")
    state = chat.until_text("Hello")
    assert [message["id"] for message in state["messages"]] == [message["id"] for message in stored]
    end(run)
    chat.until("status === 'ready' && !error")

    chat.open(resume=True, messages=state["messages"])
    with chat.page.expect_response("**/stream") as resumed:
        chat.open(resume=True, messages=state["messages"])
    assert resumed.value.status == 204
    assert chat.until("status === 'ready'")["messages"] == state["messages"]


def test_two_tabs_show_the_same_answer(chat: Chat, context: BrowserContext, host: Site, version: str) -> None:
    chat.open()
    run = chat.send()
    say(run, "Hel")
    messages = chat.until_text("Hel")["messages"]
    other = Chat(context.new_page(), host, version, chat.id)
    other.open(resume=True, messages=messages[:1])
    other.until_text("Hel")
    say(run, "lo")
    end(run)
    states = [tab.until("status === 'ready' && messages.at(-1).parts[0].text === 'Hello'") for tab in (chat, other)]
    assert states[0]["messages"] == states[1]["messages"]


def test_a_stopped_answer_keeps_its_text(chat: Chat, host: Site) -> None:
    chat.open()
    run = chat.send()
    say(run, "Hel")
    chat.until_text("Hel")
    assert host.http.post(f"{host.origin}/api/chat/{chat.id}/stop").status_code == 204
    state = chat.until("status === 'ready'")
    assert state["error"] is None
    assert state["messages"][1]["parts"][-1]["text"] == "Hel"
    assert chat.send().id != run.id


def test_a_failed_answer_shows_the_error_of_the_task(chat: Chat) -> None:
    chat.open()
    run = chat.send()
    say(run, "Hel")
    end(run, "The model is not available.")
    state = chat.until("status === 'error'")
    assert state["error"] == "The model is not available."
    assert state["messages"][1]["parts"][-1]["text"] == "Hel"


def test_an_answer_that_takes_too_long_shows_an_error(chat: Chat) -> None:
    chat.open()
    chat.page.evaluate("void chat.sendMessage({ text: 'Hello' }, { body: { maxDuration: 0.05 } })")
    state = chat.until("status === 'error'")
    assert "0.05" in state["error"]


def test_a_second_question_during_an_answer_is_rejected_with_a_reason(
    chat: Chat, context: BrowserContext, host: Site, version: str
) -> None:
    chat.open()
    run = chat.send()
    other = Chat(context.new_page(), host, version, chat.id)
    other.open()
    other.page.evaluate("void chat.sendMessage({ text: 'Me too' })")
    state = other.until("status === 'error'")
    assert chat.id in state["error"]
    say(run, "Hello")
    end(run)
    chat.until_text("Hello")


def test_a_stopped_server_is_an_error_and_not_an_end(chat: Chat, host: Site) -> None:
    chat.open()
    run = chat.send()
    say(run, *TEXT[:2])
    chat.until_text("Hel", streams=True)
    host.stop()
    state = chat.until("status !== 'streaming'")
    host.start()
    assert state["status"] == "error"
    assert state["error"]


@pytest.mark.redis
def test_a_process_that_stops_breaks_the_answers_of_others(
    context: BrowserContext, environment: dict[str, str], redis_url: str
) -> None:
    """The answer continues, so its end must not be shown to those who read it here: they would take it for the end."""
    site = Site(redis_url, app=APP, environment=environment)
    other = Site(redis_url, app=APP, environment=environment, prefix=site.prefix)
    with starting(site, other):
        first, *chats = [Chat(context.new_page(), site, version, "chat") for version in ("7", *VERSIONS)]
        first.open()
        run = first.send()
        say(run, "Hel")
        for chat in chats:
            chat.origin = other.origin
            chat.open(resume=True)
            chat.until_text("Hel", streams=True)
        other.stop()
        for chat in chats:
            assert chat.until("status !== 'streaming'")["status"] == "error"
        say(run, "lo")
        end(run)
        first.until("status === 'ready'")
        first.until_text("Hello")


def test_being_offline_is_invisible(chat: Chat, host: Site) -> None:
    with Relay(host.port) as relay:
        chat.origin = relay.url
        chat.open(resuming=True)
        run = chat.send()
        say(run, "Hel")
        chat.until_text("Hel")
        chat.page.context.set_offline(True)
        relay.cut()
        say(run, "l")
        say(run, "o")
        end(run)  # the answer has ended before the page is back
        host.until(lambda: host.post("active", thread=chat.id)["run"] is None, "the run ends")
        assert chat.until_text("Hel")["status"] == "streaming"
        chat.page.context.set_offline(False)
        state = chat.until("status !== 'streaming'")
    assert (state["status"], state["error"]) == ("ready", None)
    assert [part["text"] for part in state["messages"][1]["parts"]] == ["Hello"]
