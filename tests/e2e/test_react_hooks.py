"""Each of the official React hooks on its own, in Chromium, on a cross-origin page.

The chat of `test_react_app` uses most of them as an app does. This module covers the others, and their options.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from playwright.sync_api import Browser, Page

from tests.e2e import react_page
from tests.e2e.site import GUARD_S, Opened, Site

pytestmark = [pytest.mark.slow, pytest.mark.chromium]

SOURCE = Path(__file__).parent / "hooks_page"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the page with one hook."""
    built = react_page.build_beside(tmp_path_factory.mktemp("hooks"), source=SOURCE)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(built))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class Hook:
    """A hook on an open page."""

    def __init__(self, page: Page, address: str, base_url: str) -> None:
        self.page = page
        self.errors: list[str] = []
        self._address = address
        self._base_url = base_url
        page.set_default_timeout(GUARD_S * 1000)
        page.on("pageerror", lambda error: self.errors.append(error.message))

    def use(self, name: str, *args: Any, token: str, **options: Any) -> None:
        options = {"baseURL": self._base_url, "accessToken": token, **options}
        self.page.goto(f"{self._address}/?use={quote(json.dumps({'name': name, 'args': [*args, options]}))}")
        self.page.wait_for_selector("pre", state="attached")

    def until(self, condition: str) -> dict[str, Any]:
        """Wait until the return value of the hook fulfills a condition, and return it."""
        self.page.wait_for_function(f"() => {{ const hook = window.hook; return {condition}; }}")
        state: dict[str, Any] = json.loads(self.page.inner_text("pre"))
        return state

    def call(self, call: str) -> None:
        self.page.evaluate(f"() => void hook.{call}")


@pytest.fixture
def hook(chromium: Browser, pages: str, site: Site) -> Iterator[Hook]:
    context = chromium.new_context()
    hook = Hook(context.new_page(), pages, site.base_url)
    yield hook
    context.close()
    assert hook.errors == []


def load_run(site: Site, run: Opened) -> dict[str, Any]:
    url = f"{site.base_url}/api/v3/runs/{run.id}"
    loaded: dict[str, Any] = site.http.get(url, headers={"authorization": f"Bearer {run.token}"}).json()
    return loaded


def test_use_realtime_run_follows_a_run_to_its_end(site: Site, hook: Hook) -> None:
    run = site.open(metadata={"step": 0}, tags=["user:1"])
    hook.use("useRealtimeRun", run.id, token=run.token, onComplete=True)
    state = hook.until("hook.run")
    assert (state["run"]["status"], state["run"]["metadata"]) == ("EXECUTING", {"step": 0})

    run.update(metadata={"step": 1})
    hook.until("hook.run.metadata.step === 1")
    run.end(output={"rows": 3})
    state = hook.until("hook.run.isCompleted")
    assert state["run"]["output"] == {"rows": 3}
    hook.page.wait_for_function("calls.join() === 'COMPLETED'")


def test_use_realtime_run_skips_columns(site: Site, hook: Hook) -> None:
    run = site.trigger("echo", "hello", metadata={"step": 0})
    hook.use("useRealtimeRun", run.id, token=run.token, skipColumns=["payload"])
    state = hook.until("hook.run?.isCompleted")
    assert "payload" not in state["run"]
    assert (state["run"]["output"], state["run"]["metadata"]) == ("hello", {"step": 0})


def test_use_realtime_runs_with_tag_follows_new_runs_and_changes(site: Site, hook: Hook) -> None:
    tags = ["list:1", "list:2"]
    first = site.open(tags=tags)
    site.open(tags=tags[:1])  # a run must have all of them
    hook.use("useRealtimeRunsWithTag", tags, token=site.token("read:tags:list:1"))
    hook.until("hook.runs.length === 1")
    second = site.open(tags=tags)
    hook.until("hook.runs.length === 2")
    first.end()
    state = hook.until("hook.runs[0].status === 'COMPLETED'")
    assert [run["id"] for run in state["runs"]] == [first.id, second.id]


def test_use_realtime_batch_follows_all_runs(site: Site, hook: Hook) -> None:
    items = [["steps", {"count": 1}], ["echo", "hello"], ["unlucky", None]]
    batch = site.post("batch_trigger", items=items)
    hook.use("useRealtimeBatch", batch["id"], token=batch["publicAccessToken"])
    hook.until("hook.runs.map((run) => run.status).sort().join() === 'COMPLETED,EXECUTING,FAILED'")
    site.send(batch["runs"][0], "next", "go")
    state = hook.until("hook.runs.filter((run) => run.isSuccess).length === 2")
    found = {run["id"]: run.get("output") or run["error"]["message"] for run in state["runs"]}
    assert [found[run_id] for run_id in batch["runs"]] == [{"received": ["go"]}, "hello", "no luck"]


def test_use_realtime_run_with_streams_returns_all_streams_of_a_run(site: Site, hook: Hook) -> None:
    run = site.open()
    run.append("a1", stream="a")
    hook.use("useRealtimeRunWithStreams", run.id, token=run.token)
    hook.until("hook.streams.a?.length === 1")
    run.append("b1", "b2", stream="b")
    run.append("a2", stream="a")
    state = hook.until("hook.streams.a?.length === 2 && hook.streams.b?.length === 2")
    assert state["streams"] == {"a": ["a1", "a2"], "b": ["b1", "b2"]}
    run.end(output="done")
    assert hook.until("hook.run.isSuccess")["run"]["output"] == "done"


def test_use_realtime_task_trigger_with_streams_follows_the_triggered_run(site: Site, hook: Hook) -> None:
    hook.use("useRealtimeTaskTriggerWithStreams", "steps", token=site.token("trigger:tasks:steps"))
    hook.call("submit({ count: 1 })")
    state = hook.until("hook.run?.metadata.step === 0")
    site.send(state["run"]["id"], "next", "go")
    state = hook.until("hook.run.isSuccess && hook.streams.default?.length === 1")
    assert state["streams"] == {"default": [{"step": 0}]}
    assert state["run"]["output"] == {"received": ["go"]}


def test_use_run_retrieves_a_run_once(site: Site, hook: Hook) -> None:
    run = site.open(tags=["user:1"])
    run.end(output=7)
    hook.use("useRun", run.id, token=run.token)
    state = hook.until("hook.run")
    assert (state["run"]["status"], state["run"]["output"], state["run"]["tags"]) == ("COMPLETED", 7, ["user:1"])


def test_use_input_stream_send_reaches_the_run(site: Site, hook: Hook) -> None:
    run = site.trigger("steps", {"count": 1})
    hook.use("useInputStreamSend", "next", run.id, token=run.token)
    hook.until("hook.isReady")
    hook.call("send({ words: 'next' })")
    site.until(lambda: load_run(site, run)["status"] == "COMPLETED", "the run completes")
    assert load_run(site, run)["output"] == {"received": [{"words": "next"}]}


def test_use_realtime_stream_has_every_part_once(site: Site, hook: Hook) -> None:
    run = site.open()
    run.append(*range(10))
    hook.use("useRealtimeStream", run.id, "default", token=run.token)
    hook.until("hook.parts.length === 10")
    run.append(*range(10, 20))
    state = hook.until("hook.parts.length === 20")
    assert state["parts"] == list(range(20))
    assert state["lastEventId"] == "19"
    run.end()


@pytest.mark.parametrize(
    "options, parts",
    [({"startIndex": 2}, [2, 3, 4]), ({"lastEventId": 1}, [2, 3, 4]), ({"maxParts": 2}, [3, 4])],
    ids=["startIndex", "lastEventId", "maxParts"],
)
def test_use_realtime_stream_starts_at_the_given_index(
    site: Site, hook: Hook, options: dict[str, Any], parts: list[int]
) -> None:
    run = site.open()
    run.append(*range(5))
    hook.use("useRealtimeStream", run.id, "default", token=run.token, **options)
    state = hook.until("hook.lastEventId === '4'")
    assert state["parts"] == parts
    run.end()


def test_use_realtime_stream_from_latest_has_only_new_parts(site: Site, hook: Hook) -> None:
    run = site.open()
    run.append("old")
    with hook.page.expect_response(f"**/streams/{run.id}/default"):
        hook.use("useRealtimeStream", run.id, "default", token=run.token, **{"from": "latest"})
    run.append("new")
    assert hook.until("hook.parts.length")["parts"] == ["new"]
    run.end()
