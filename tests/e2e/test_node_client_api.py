"""The official client in Node triggers runs and batches, with the secret key and with tokens, and retrieves them."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.e2e.conftest import Relay, both_brokers
from tests.e2e.node import running
from tests.e2e.site import SECRET, Line, Site

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("node_ready")]


def new_tag() -> str:
    return f"user:{secrets.token_hex(4)}"


def of(kind: str, lines: list[Line]) -> list[Any]:
    return [line[kind] for line in lines if kind in line]


def runs_with(site: Site, tag: str) -> int:
    """The number of runs with this tag."""
    query = {"tags": tag, "offset": "-1", "log": "full"}
    headers = {"authorization": f"Bearer {SECRET}", "trigger-version": "4.8.3"}
    rows = site.http.get(f"{site.base_url}/realtime/v1/runs", params=query, headers=headers).json()
    return sum("value" in row for row in rows)


@both_brokers
def test_the_token_of_the_handle_is_enough(site: Site) -> None:
    tag = new_tag()
    options = {"tags": [tag], "metadata": {"a": 1}}
    sent = [{"input": "next", "data": number} for number in range(2)]
    with running("trigger", site, task="steps", payload={"count": 2}, options=options, send=sent) as program:
        lines = program.rest()
    (handle,) = of("handle", lines)
    assert handle["id"].startswith("run_") and handle["publicAccessToken"].count(".") == 2
    *_, last = of("run", lines)
    assert (last["id"], last["status"], last["tags"]) == (handle["id"], "COMPLETED", [tag])
    assert (last["payload"], last["output"]) == ({"count": 2}, {"received": [0, 1]})
    (retrieved,) = of("retrieved", lines)
    assert (retrieved["status"], retrieved["output"]) == ("COMPLETED", {"received": [0, 1]})
    assert retrieved["metadata"] == {"a": 1, "step": 1}
    assert of("chunks", lines) == [[{"step": 0}, {"step": 1}]]


def test_a_payload_with_dates_is_shown_with_dates(site: Site) -> None:
    with running("trigger", site, task="echo", rich=True) as program:
        lines = program.rest()
    *_, last = of("run", lines)
    when = {"$date": "2026-01-02T03:04:05.678Z"}
    assert last["payload"] == {"when": when, "tags": {"$set": ["a", "b"]}, "big": {"$bigint": str(2**70)}}
    # The task is a Python function that received JSON, so its output has the JSON form.
    assert last["output"]["when"] == "2026-01-02T03:04:05.678Z"
    assert last["output"]["tags"] == ["a", "b"]


def test_a_task_receives_the_types_of_its_annotations(site: Site) -> None:
    with running("trigger", site, task="typed", payload={"when": "2026-01-02T03:04:05.678Z"}) as program:
        *_, last = of("run", program.rest())
    assert last["output"]["weekday"] == "Friday"
    assert datetime.fromisoformat(last["output"]["when"]) == datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)


def test_a_payload_of_any_kind_arrives_unchanged(site: Site) -> None:
    for payload in ("text", "", 0, False, None, [], [1, {"a": None}], {"\u2028": "\U0001f600"}):
        with running("trigger", site, task="echo", payload=payload) as program:
            *_, last = of("run", program.rest())
        assert (last.get("payload"), last.get("output")) == (payload, payload)


def test_a_payload_is_optional(site: Site) -> None:
    with running("trigger", site, task="unlucky") as program:
        *_, last = of("run", program.rest())
    assert last["status"] == "FAILED" and "payload" not in last


def test_trigger_options_take_effect(site: Site) -> None:
    tag = new_tag()
    options = {"tags": tag, "delay": "1h", "ttl": "2h", "idempotencyKey": secrets.token_hex(8)}
    with running("api", site, calls=["trigger", "trigger"], task="echo", payload=1, options=options) as program:
        first, again = of("handle", program.rest())
    assert (again["id"], again["isCached"], first["isCached"]) == (first["id"], True, False)
    with running("api", site, calls=["retrieve"], run=first["id"]) as program:
        run = program.next("run")
    assert (run["status"], run["tags"], run["isQueued"]) == ("DELAYED", [tag], True)
    assert run["delayedUntil"]["$date"] > run["createdAt"]["$date"]
    assert runs_with(site, tag) == 1


def test_an_unknown_task_is_an_error(site: Site) -> None:
    with running("api", site, calls=["trigger"], task="unknown", payload=1) as program:
        (line,) = program.rest()
    assert line["error"]["status"] == 404


def test_a_payload_of_the_wrong_type_is_an_error(site: Site) -> None:
    with running("api", site, calls=["trigger"], task="typed", payload={"when": "tomorrow"}) as program:
        (line,) = program.rest()
    assert line["error"]["status"] == 422
    assert "when" in line["error"]["message"]


def test_a_trigger_token_lets_a_browser_trigger(site: Site) -> None:
    token = site.tokens.create_trigger_public_token("echo", multiple_use=True)
    with running("trigger", site, task="echo", payload={"by": "browser"}, token=token) as program:
        lines = program.rest()
    *_, last = of("run", lines)
    assert last["output"] == {"by": "browser"}
    assert of("error", lines) == []


def test_a_trigger_token_triggers_only_its_tasks(site: Site) -> None:
    token = site.tokens.create_trigger_public_token(["echo", "typed"], multiple_use=True)
    for task, expected in (("echo", None), ("steps", 403)):
        with running("api", site, calls=["trigger"], task=task, payload=1, token=token) as program:
            (line,) = program.rest()
        assert line.get("error", {}).get("status") == expected


def test_a_token_created_by_the_client_triggers_once(site: Site) -> None:
    tag = new_tag()
    with running("one_time", site, task="echo", times=3, options={"tags": [tag]}) as program:
        lines = program.rest()
    assert list(lines[0]) == ["handle"]
    assert [error["status"] for error in of("error", lines)] == [422, 422]
    assert runs_with(site, tag) == 1


@both_brokers
def test_a_one_time_token_used_by_many_at_once_triggers_once(site: Site) -> None:
    tag = new_tag()
    token = site.tokens.create_trigger_public_token("echo")
    with running(
        "one_time", site, task="echo", minted=token, times=8, together=True, options={"tags": [tag]}
    ) as program:
        lines = program.rest()
    assert (len(of("handle", lines)), [error["status"] for error in of("error", lines)]) == (1, [422] * 7)
    assert runs_with(site, tag) == 1


def test_a_one_time_token_can_be_retried_when_the_response_was_lost(site: Site) -> None:
    """The client retries when a connection breaks. It must get the existing run, not 422."""
    tag = new_tag()
    token = site.tokens.create_trigger_public_token("echo")
    path = "/realtime/api/v1/tasks/echo/trigger"
    before = len(site.requests(path))
    with Relay(site.port) as relay:
        site.post("hold", path=path)
        base_url = f"{relay.url}/realtime"
        with running(
            "one_time", site, baseURL=base_url, task="echo", minted=token, times=2, options={"tags": [tag]}
        ) as program:
            site.until(lambda: [seen for seen in site.requests(path)[before:] if seen["status"]], "it is answered")
            relay.cut()
            site.post("let_go", path=path)
            lines = program.rest()
    assert len(of("handle", lines)) == 1
    assert [error["status"] for error in of("error", lines)] == [422]  # the second use
    assert len(site.requests(path)) - before == 3
    assert runs_with(site, tag) == 1


def test_a_trigger_is_not_doubled_when_the_response_was_lost(site: Site) -> None:
    tag = new_tag()
    path = "/realtime/api/v1/tasks/echo/trigger"
    before = len(site.requests(path))
    with Relay(site.port) as relay:
        site.post("hold", path=path)
        with running(
            "api", site, baseURL=f"{relay.url}/realtime", calls=["trigger"], task="echo", options={"tags": [tag]}
        ) as program:
            site.until(lambda: [seen for seen in site.requests(path)[before:] if seen["status"]], "it is answered")
            relay.cut()
            site.post("let_go", path=path)
            assert list(program.rest()[0]) == ["handle"]
    assert len(site.requests(path)) - before == 2
    assert runs_with(site, tag) == 1


@both_brokers
def test_a_batch_is_triggered_followed_and_retrieved(site: Site) -> None:
    tag = new_tag()
    items = [{"payload": {"number": number}, "options": {"tags": [tag]}} for number in range(5)]
    with running("api", site, calls=["batch"], task="echo", items=items) as program:
        lines = program.rest()
    (batch,) = of("batch", lines)
    assert batch["runCount"] == 5
    (retrieved,) = of("retrieved", lines)
    assert (retrieved["id"], retrieved["status"], retrieved["runCount"]) == (batch["batchId"], "COMPLETED", 5)
    outputs = {run["id"]: run["output"]["number"] for run in of("run", lines) if "output" in run}
    assert [outputs[run_id] for run_id in retrieved["runs"]] == list(range(5))
    assert runs_with(site, tag) == 5


def test_a_large_batch_arrives_complete(site: Site) -> None:
    items = [{"payload": "x" * 5000, "options": {"idempotencyKey": f"{new_tag()}"}} for _ in range(200)]
    with running("api", site, calls=["batch"], task="echo", items=items) as program:
        lines = program.rest()
    (retrieved,) = of("retrieved", lines)
    assert len(set(retrieved["runs"])) == 200


def test_a_batch_can_have_several_tasks(site: Site) -> None:
    items = [
        {"id": "echo", "payload": 1},
        {"id": "typed", "payload": {"when": "2026-01-02T03:04:05Z"}},
        {"id": "unlucky"},
    ]
    with running("api", site, calls=["batchOfTasks"], items=items) as program:
        batch = program.next("batch")
    with running("subscribe", site, feed="batch", batch=batch["batchId"], token=batch["publicAccessToken"]) as feed:
        over: dict[str, Line] = {}
        while len(over) < 3:
            run = feed.until("run", lambda run: "finishedAt" in run)
            over[run["taskIdentifier"]] = run
    assert (over["echo"]["output"], over["unlucky"]["status"]) == (1, "FAILED")
    assert over["typed"]["output"]["weekday"] == "Friday"


def test_a_batch_token_triggers_batches_of_its_tasks(site: Site) -> None:
    items = [{"payload": 1}, {"payload": 2}]
    for allowed in ("echo", ["typed", "echo"]):
        with running("api", site, calls=["batchWithToken"], task="echo", items=items, allowed=allowed) as program:
            assert program.rest()[-1]["retrieved"]["runCount"] == 2
    with running("api", site, calls=["batchWithToken"], task="echo", items=items, allowed="typed") as program:
        (line,) = program.rest()
    assert line["error"]["name"] == "BatchTriggerError" and "batchTrigger:tasks:echo" in line["error"]["message"]


def test_an_idempotency_key_gives_one_run(site: Site) -> None:
    with running("api", site, calls=["keyed"], task="echo", payload=1, key=secrets.token_hex(8)) as program:
        first, again = of("handle", program.rest())
    assert (again["id"], again["isCached"], first["isCached"]) == (first["id"], True, False)


def test_options_that_have_no_effect_are_no_error(site: Site) -> None:
    options = {
        "queue": "fast",
        "concurrencyKey": "user-1",
        "machine": "large-1x",
        "priority": 10,
        "maxAttempts": 3,
        "maxDuration": 60,
        "debounce": {"key": "a", "delay": "1s"},
        "version": "20260101.1",
        "region": "eu-central-1",
    }
    with running("trigger", site, task="echo", payload=1, options=options) as program:
        *_, last = of("run", program.rest())
    assert last["output"] == 1


def test_a_payload_that_the_client_would_upload_is_an_error(site: Site) -> None:
    with running("api", site, calls=["trigger"], task="echo", payload="x" * 200_000) as program:
        (line,) = program.rest()
    assert line["error"]["status"] == 413
    assert "131072 bytes" in line["error"]["message"]


def test_unsupported_calls_are_errors(site: Site) -> None:
    calls = ["list", "replay", "reschedule", "createToken"]
    run = site.open()
    with running("api", site, calls=calls, run=run.id) as program:
        assert [line["error"]["status"] for line in program.rest()] == [404] * len(calls)
    run.end()


def test_a_scope_with_a_public_token(site: Site) -> None:
    run = site.open()
    run.append("a", "b", stream="words")
    run.end(output=1)
    with running("api", site, calls=["withPublicToken"], run=run.id, key="words") as program:
        assert program.next("run")["output"] == 1
        assert program.rest() == [{"chunk": "a"}, {"chunk": "b"}]


def test_a_worker_adds_tags(site: Site) -> None:
    tag, other = new_tag(), new_tag()
    run = site.open(tags=[tag])
    with running("api", site, calls=["addTags", "retrieve"], run=run.id, tags=[tag, other]) as program:
        assert program.next("added").keys() == {"message"}
        assert program.next("run")["tags"] == [tag, other]
    assert runs_with(site, other) == 1
    run.end()


def test_a_run_is_retrieved_and_polled(site: Site) -> None:
    run = site.open(tags=["a", "b"], metadata={"m": [1]})
    with running("api", site, calls=["retrieve", "poll"], run=run.id, token=run.token) as program:
        open_run = program.next("run")
        assert (open_run["status"], open_run["isExecuting"]) == ("EXECUTING", True)
        site.until_asked(f"/api/v3/runs/{run.id}", times=3)
        run.end(output={"done": True})
        closed = program.next("run")
    assert (closed["status"], closed["output"], closed["metadata"]) == ("COMPLETED", {"done": True}, {"m": [1]})
    assert sorted(closed["tags"]) == ["a", "b"]
    assert closed["createdAt"]["$date"] <= closed["startedAt"]["$date"] <= closed["finishedAt"]["$date"]


def test_a_failed_run_is_retrieved_with_its_error(site: Site) -> None:
    run = site.open()
    run.end(error="no luck")
    with running("api", site, calls=["retrieve"], run=run.id) as program:
        shown = program.next("run")
    assert (shown["status"], shown["isFailed"], shown["error"]["message"]) == ("FAILED", True, "no luck")


def test_an_unknown_run_is_an_error(site: Site) -> None:
    with running("api", site, calls=["retrieve", "cancel", "poll"], run="run_never") as program:
        assert [line["error"]["status"] for line in program.rest()] == [404] * 3


def test_the_token_of_a_handle_does_not_cancel(site: Site) -> None:
    run = site.open()
    with running("api", site, calls=["cancel"], run=run.id, token=run.token) as program:
        assert [line["error"]["status"] for line in program.rest()] == [403]
    with running("api", site, calls=["cancel"], run=run.id, token=site.token(f"write:runs:{run.id}")) as program:
        assert program.rest() == [{"canceled": {"id": run.id}}]


@both_brokers
def test_a_worker_changes_metadata(site: Site) -> None:
    before = {"old": True, "log": [], "deep": {}}
    run = site.open(metadata=before)
    with running("metadata", site, run=run.id, metadata=before) as worker:
        first, second = worker.rest()
    middle = {"log": ["one", "two"], "status": "reading", "pages": 3, "deep": {"inside": {"a": 1}}}
    assert first == {"current": middle}
    assert second == {"current": {**middle, "log": ["two"], "pages": 2, "status": "done"}}
    with running("subscribe", site, feed="run", run=run.id, token=run.token, breakAfter=1) as feed:
        assert feed.next("run")["metadata"] == second["current"]
    run.end()


def test_tokens_created_by_the_client_are_valid(site: Site) -> None:
    tag = new_tag()
    run = site.open(tags=[tag])
    run.end(output=1)
    options = {"scopes": {"read": {"tags": [tag]}}, "expirationTime": "1hr"}
    with running("api", site, calls=["publicToken"], options=options) as program:
        token = program.next("token")
    assert site.tokens.verify_token(token).scopes == (f"read:tags:{tag}",)
    with running("subscribe", site, feed="tags", tags=tag, token=token, breakAfter=1) as feed:
        assert feed.next("run")["output"] == 1
    with running("api", site, calls=["publicToken"], options=options, token=token) as program:
        assert program.next("error")["status"] in (401, 403)  # a public token cannot create another
