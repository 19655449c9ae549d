"""The chat page in Chromium, on a real server.

A whole answer comes from a real language model, on each host. The other tests hold a fake model in the middle of its
answer and let it go again, so that nothing depends on timing. What the page shows is compared with what the run holds.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect

from examples.local_model import Model
from tests.chromium import profile
from tests.e2e.conftest import GUARD_S, Relay, Server, example
from tests.e2e.fake_model import ANSWER, FakeModel
from tests.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.chromium]

QUESTION = "Tell me a long story about a lighthouse keeper and a whale."

WATCH = """
    window.opened = [];
    window.mostAtOnce = 0;
    window.isOpen = ({ signal }) => !signal.aborted;
    const { fetch } = window;
    window.fetch = async (url, init) => {
      if (!String(url).includes("/realtime/v1/")) return await fetch(url, init);
      const request = { signal: init.signal, responded: false };
      opened.push(request);
      mostAtOnce = Math.max(mostAtOnce, opened.filter(isOpen).length);
      const response = await fetch(url, init);
      request.responded = true;
      return response;
    };
    window.addEventListener("DOMContentLoaded", () => {
      window.lengths = new Set();
      const note = () => lengths.add(document.querySelector("#answer").textContent.length);
      new MutationObserver(note).observe(document, { subtree: true, childList: true, characterData: true });
    });
"""
"""Runs in each page and records every request for a stream or feed, and every length that the answer had."""


@pytest.fixture(scope="module", params=["fastapi_app", "litestar_app", "quart_app"])
def any_server(request: pytest.FixtureRequest, model: Model) -> Iterator[Server]:
    with example(request.param, model.environment) as server:
        yield server


@pytest.fixture(scope="module")
def server(fake: FakeModel) -> Iterator[Server]:
    with example("fastapi_app", fake.environment) as server:
        yield server


@pytest.fixture
def context(chromium: Browser) -> Iterator[BrowserContext]:
    with profile(chromium) as context:
        context.add_init_script(WATCH)
        yield context


@pytest.fixture
def page(context: BrowserContext) -> Page:
    return context.new_page()


@pytest.fixture
def held(fake: FakeModel) -> Iterator[FakeModel]:
    yield fake
    fake.let_go()


def open_chat(page: Page, server: Server) -> None:
    page.goto(server.url)
    page.wait_for_selector("#feed[data-state=live]")


def ask(page: Page, question: str = QUESTION) -> str:
    """Ask, and return the run's id."""
    before = shown_run(page)
    page.fill("#prompt", question)
    page.keyboard.press("Enter")
    page.wait_for_function(f"before => ({SHOWN_RUN}) !== before", arg=before)
    run_id = shown_run(page)
    assert run_id is not None
    return run_id


SHOWN_RUN = "/^#(run_.+)/.exec(location.hash)?.[1] ?? null"


def shown_run(page: Page) -> str | None:
    found: str | None = page.evaluate(SHOWN_RUN)
    return found


def wait_for_text(page: Page, characters: int) -> None:
    page.wait_for_function("n => document.querySelector('#answer').textContent.length >= n", arg=characters)


def wait_for_end(page: Page, status: str) -> None:
    page.wait_for_selector(f"#status[data-status={status}]")
    page.wait_for_selector("#answer[aria-busy=false]")


def answer(page: Page) -> str:
    return page.text_content("#answer") or ""


def load_run(page: Page, server: Server, run_id: str) -> dict[str, Any]:
    session = page.request.post(f"{server.url}/session").json()
    response = page.request.get(
        f"{server.url}/realtime/api/v3/runs/{run_id}", headers={"authorization": f"Bearer {session['token']}"}
    )
    assert response.status == 200, response.text()
    run: dict[str, Any] = response.json()
    return run


def ask_and_hold(page: Page, held: FakeModel) -> str:
    """Ask, and wait until the page shows the answer of a held model as far as it goes. Returns the run's id."""
    held.hold(after=10)
    run_id = ask(page)
    wait_for_text(page, len("".join(ANSWER[:10])))
    return run_id


@pytest.mark.model
def test_an_answer_comes_token_by_token_and_is_the_output(any_server: Server, page: Page) -> None:
    open_chat(page, any_server)
    run_id = ask(page)
    wait_for_end(page, "COMPLETED")

    run = load_run(page, any_server, run_id)
    assert answer(page) == run["output"]["text"]
    assert page.text_content("#progress") == f"{run['metadata']['tokens']} tokens"
    assert page.evaluate("lengths.size") > run["metadata"]["tokens"] / 10  # drawn as it arrived, not at the end
    assert page.evaluate("mostAtOnce") == 2
    assert page.evaluate("opened.filter(isOpen).length") == 1  # the stream was closed at its end


def test_a_reload_in_mid_answer_resumes_without_a_missing_or_doubled_token(
    server: Server, page: Page, held: FakeModel
) -> None:
    open_chat(page, server)
    run_id = ask_and_hold(page, held)
    before = answer(page)

    page.reload()
    wait_for_text(page, len(before))
    assert answer(page).startswith(before)
    expect(page.locator("#question")).to_have_text(QUESTION, timeout=GUARD_S * 1000)
    held.let_go()

    wait_for_end(page, "COMPLETED")
    output = load_run(page, server, run_id)["output"]["text"]
    assert answer(page) == output
    assert len(output) > len(before)


def test_a_lost_connection_resumes_without_a_missing_or_doubled_token(
    server: Server, page: Page, held: FakeModel
) -> None:
    with Relay(server.port) as relay:
        through_relay = Server(server.process, relay.url)
        open_chat(page, through_relay)
        run_id = ask_and_hold(page, held)
        relay.cut()
        # The page reconnects and sends the id of the last token that it has.
        page.wait_for_function(
            "opened.length >= 4 && opened.filter(isOpen).filter((one) => one.responded).length === 2"
        )
        held.let_go()

        wait_for_end(page, "COMPLETED")
        assert answer(page) == load_run(page, server, run_id)["output"]["text"]


def test_runs_lost_in_a_restart_disappear_from_the_page(page: Page, held: FakeModel) -> None:
    key, port = "a fixed key for tests, 32 bytes or more", str(free_port())
    environment = {**held.environment, "REALTIME_SECRET_KEY": key, "PORT": port}
    with example("fastapi_app", environment) as before:
        open_chat(page, before)
        ask(page, "Say hello.")
        wait_for_end(page, "COMPLETED")
        ask_and_hold(page, held)
        assert page.locator("[data-run]").count() >= 2
    with example("fastapi_app", environment) as after:
        assert after.url == before.url
        page.wait_for_selector("#no-runs")
        assert page.locator("[data-run]").count() == 0
        page.wait_for_selector("#note:has-text('This run no longer exists on the server.')")


def test_stop_ends_the_run_and_keeps_the_partial_answer(server: Server, page: Page, held: FakeModel) -> None:
    open_chat(page, server)
    run_id = ask_and_hold(page, held)
    before = answer(page)
    page.click("#stop")
    wait_for_end(page, "CANCELED")
    held.let_go()
    partial = answer(page)
    assert partial.startswith(before)
    assert load_run(page, server, run_id)["status"] == "CANCELED"
    assert page.is_hidden("#stop")

    page.click("#new")
    page.click(f"[data-run={run_id}]")  # a past run can be shown again at any time
    wait_for_end(page, "CANCELED")
    assert answer(page) == partial


def test_the_list_of_runs_follows_what_happens_in_another_tab(
    server: Server, context: BrowserContext, page: Page, held: FakeModel
) -> None:
    open_chat(page, server)
    other = context.new_page()
    open_chat(other, server)
    assert other.is_visible("#no-runs")

    run_id = ask_and_hold(page, held)
    row = f"[data-run={run_id}]"
    other.wait_for_selector(f"{row} [data-status=EXECUTING]")
    assert other.text_content(f"{row} .text") == QUESTION

    other.click(row)  # the answer can be read there too
    wait_for_text(other, len(answer(page)))
    held.let_go()
    other.wait_for_selector(f"{row} [data-status=COMPLETED]")
    wait_for_end(other, "COMPLETED")
    wait_for_end(page, "COMPLETED")
    assert answer(other) == answer(page)


def test_the_address_names_the_open_answer(server: Server, page: Page) -> None:
    open_chat(page, server)
    ask(page, "Say hello.")
    wait_for_end(page, "COMPLETED")
    expect(page.locator("#prompt")).to_be_focused()
    before = answer(page)

    page.click("#new")
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator("#prompt")).to_be_focused()
    assert page.is_hidden("#conversation")

    page.go_back()
    wait_for_end(page, "COMPLETED")
    assert answer(page) == before
    assert page.is_hidden("#welcome")


def test_a_question_that_was_not_sent_stays_in_the_field(server: Server, page: Page) -> None:
    open_chat(page, server)
    page.route("**/chat", lambda route: route.abort())
    page.click("#ideas button >> nth=0")
    page.wait_for_selector("#note:has-text('The question was not sent')")
    assert page.input_value("#prompt") == QUESTION
    page.unroute("**/chat")
    page.click("#send")
    wait_for_end(page, "COMPLETED")
    expect(page.locator("#question")).to_have_text(QUESTION)
    assert page.text_content("#note") == ""


def test_users_do_not_see_each_other(server: Server, chromium: Browser, page: Page) -> None:
    open_chat(page, server)
    run_id = ask(page)
    wait_for_end(page, "COMPLETED")

    stranger = chromium.new_context()
    session = stranger.request.post(f"{server.url}/session").json()
    feed = stranger.request.get(
        f"{server.url}/realtime/api/v3/runs/{run_id}", headers={"authorization": f"Bearer {session['token']}"}
    )
    stop = stranger.request.post(f"{server.url}/chat/{run_id}/stop")
    stranger.close()
    assert feed.status == 403
    assert stop.status == 404


def test_the_feed_is_dropped_while_the_tab_is_hidden(server: Server, page: Page) -> None:
    open_chat(page, server)
    page.evaluate(
        """() => {
            Object.defineProperty(document, "hidden", { get: () => window.away, configurable: true });
            const change = new Event("visibilitychange", { bubbles: true });
            window.turn = (away) => { window.away = away; document.dispatchEvent(change); };
        }"""
    )
    page.evaluate("turn(true)")
    assert page.evaluate("opened.filter(isOpen).length") == 0
    page.evaluate("turn(false)")
    page.wait_for_function("opened.length === 2 && opened[1].responded && isOpen(opened[1])")


def plain_event_source(page: Page, path: str) -> list[str]:
    """Read a stream with an EventSource that the page never closes, until it gives up. Returns the requested URLs."""
    requested: list[str] = []

    def note(request: Request) -> None:
        requested.append(request.url)

    page.on("request", note)
    page.evaluate(
        "path => new Promise((done) => { const source = new EventSource(path);"
        " source.onerror = () => source.readyState === EventSource.CLOSED && done(); })",
        path,
    )
    page.remove_listener("request", note)
    return requested


def test_a_browser_stops_at_the_end_of_a_stream_that_the_page_never_closes(server: Server, page: Page) -> None:
    open_chat(page, server)
    run_id = ask(page, "Say hello.")
    wait_for_end(page, "COMPLETED")
    token = page.request.post(f"{server.url}/session").json()["token"]

    # EventSource reconnects after the end, and a 204 then stops it permanently.
    path = f"realtime/v1/streams/{run_id}/default?access_token={token}"
    assert len(plain_event_source(page, path)) == 2


def test_a_browser_stops_at_the_end_of_an_empty_stream(server: Server, page: Page, held: FakeModel) -> None:
    open_chat(page, server)
    held.hold(after=0)
    run_id = ask(page)
    page.wait_for_selector("#status[data-status=EXECUTING]")
    page.click("#stop")
    wait_for_end(page, "CANCELED")
    assert answer(page) == ""
    token = page.request.post(f"{server.url}/session").json()["token"]

    path = f"realtime/v1/streams/{run_id}/default?access_token={token}"
    assert len(plain_event_source(page, path)) == 2


@pytest.mark.model
def test_ctrl_c_in_mid_answer_ends_server_and_model_immediately(model_path: Path, page: Page) -> None:
    with example("fastapi_app", {}) as server:  # with its own model, as `make demo` starts it
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        assert len(children) == 1
        open_chat(page, server)
        ask(page)
        wait_for_text(page, 20)
        server.process.send_signal(signal.SIGINT)
        output, _ = server.process.communicate(timeout=GUARD_S)
        assert server.process.returncode == 0
        assert [line for line in output.splitlines() if not line.startswith("asgi_realtime: shutdown: ")] == []
        assert not Path(f"/proc/{children[0]}").exists()
