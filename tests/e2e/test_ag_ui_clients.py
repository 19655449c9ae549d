"""Unmodified clients of AG-UI in Node: @ag-ui/client, and TanStack AI's, which resumes and joins runs."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.answers import ANSWERS, ERROR, TEXT, End, active_run, body_of, end, say
from tests.e2e.conftest import Relay
from tests.e2e.node import Program, frontend
from tests.e2e.site import Opened, Site, serving

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def host() -> Iterator[Site]:
    with serving("memory", app="tests.e2e.frontends_app:app") as site:
        yield site


@pytest.fixture
def thread(host: Site) -> str:
    host.ensure_running()
    return f"thread-{secrets.token_hex(4)}"


@pytest.fixture(scope="module")
def client() -> Iterator[Program]:
    with frontend("ag_ui") as program:
        yield program


# @ag-ui/client


def run_agent(client: Program, host: Site, thread: str) -> Opened:
    """Run the agent, and return the run that answers."""
    client.send({"url": f"{host.origin}/ag-ui", "threadId": thread, "runId": f"run-of-{thread}"})
    return active_run(host, thread)


def until_delta(client: Program, delta: str) -> None:
    client.until("event", lambda event: event.get("delta") == delta)


def text_of(end: dict[str, Any]) -> str:
    return "".join(message.get("content", "") for message in end["messages"] if message["role"] == "assistant")


def test_the_client_shows_an_answer_as_it_arrives(client: Program, host: Site, thread: str) -> None:
    run = run_agent(client, host, thread)
    say(run, "Hel")
    until_delta(client, "Hel")
    say(run, "lo")
    until_delta(client, "lo")
    end(run)
    ended = client.until("end")
    assert (ended["error"], text_of(ended)) == (None, "Hello")


def test_a_late_reader_has_the_whole_answer(client: Program, host: Site, thread: str) -> None:
    run = run_agent(client, host, thread)
    say(run, "Hel")
    until_delta(client, "Hel")
    say(run, "l")
    until_delta(client, "l")
    with frontend("ag_ui") as late:
        assert run_agent(late, host, thread).id == run.id  # the same run of the client
        until_delta(late, "Hell")
        say(run, "o")
        end(run)
        ends = [reader.until("end") for reader in (client, late)]
    assert [text_of(end) for end in ends] == ["Hello", "Hello"]
    assert ends[0]["messages"] == ends[1]["messages"]


def test_a_stopped_server_is_an_error(client: Program, host: Site, thread: str) -> None:
    say(run_agent(client, host, thread), *TEXT[:2])
    until_delta(client, "Hel")
    host.stop()
    ended = client.until("end")
    host.start()
    assert ended["error"] is not None


def recorded(client: Program, body: bytes) -> dict[str, Any]:
    client.send({"threadId": "thread", "runId": "run", "body": body.decode()})
    end: dict[str, Any] = client.until("end")
    return end


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_client_accepts_every_answer(client: Program, answer: str) -> None:
    chunks = ANSWERS[answer]
    ended = recorded(client, body_of(chunks, "ag-ui"))
    assert ended["error"] is None
    texts = [chunk["delta"] for chunk in chunks if isinstance(chunk, dict) and chunk["type"] == "text-delta"]
    assert text_of(ended) == "".join(texts + [chunk for chunk in chunks if isinstance(chunk, str)])


def test_the_client_has_tool_calls_and_their_results(client: Program) -> None:
    messages = recorded(client, body_of(ANSWERS["two tool calls at once"], "ag-ui"))["messages"]
    calls = {
        call["id"]: (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for message in messages
        for call in message.get("toolCalls", [])
    }
    assert calls == {"call-1": ("weather", {"city": "Paris"}), "call-2": ("clock", {})}
    results = {
        message["toolCallId"]: json.loads(message["content"]) for message in messages if message["role"] == "tool"
    }
    assert results == {"call-1": {"degrees": 21}, "call-2": None}


@pytest.mark.parametrize(
    ("how", "error", "outcome"),
    [("completed", None, None), ("failed", ERROR, None), ("canceled", None, {"type": "cancelled"})],
)
def test_the_client_shows_how_a_run_ended(client: Program, how: End, error: str | None, outcome: Any) -> None:
    ended = recorded(client, body_of(TEXT[:2], "ag-ui", how=how))
    assert (ended["error"], ended["outcome"], text_of(ended)) == (error, outcome, "Hel")


# TanStack AI


def chat(url: str, thread: str) -> Any:
    return frontend("tanstack", url=f"{url}/ag-ui", threadId=thread)


def until_text(client: Program, text: str) -> None:
    def is_shown(messages: list[dict[str, Any]]) -> bool:
        parts = messages[-1]["parts"] if messages else []
        return "".join(part.get("content", "") for part in parts if part["type"] == "text") == text

    client.until("messages", is_shown)


def test_a_lost_connection_continues_after_the_last_event(host: Site, thread: str) -> None:
    with Relay(host.port) as relay, chat(relay.url, thread) as client:
        client.send("Hello?")
        run = active_run(host, thread)
        say(run, "Hel")
        until_text(client, "Hel")
        relay.cut()
        say(run, "lo")
        until_text(client, "Hello")
        assert active_run(host, thread).id == run.id  # the repeated request did not start another
        end(run)
        client.until("status", lambda status: status == "ready")


def test_a_page_that_opens_joins_the_run(host: Site, thread: str) -> None:
    with chat(host.origin, thread) as first:
        first.send("Hello?")
        run = active_run(host, thread)
        say(run, "Hel", "l")
        until_text(first, "Hell")
        with chat(host.origin, thread) as other:
            until_text(other, "Hell")
            say(run, "o")
            until_text(other, "Hello")
            end(run)
            for client in (first, other):
                client.until("status", lambda status: status == "ready")


def test_a_failed_run_is_shown(host: Site, thread: str) -> None:
    with chat(host.origin, thread) as client:
        client.send("Hello?")
        run = active_run(host, thread)
        say(run, "Hel")
        until_text(client, "Hel")
        end(run, "The model is not available.")
        assert client.until("error", bool) == "The model is not available."
