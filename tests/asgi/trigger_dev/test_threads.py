"""Threads over HTTP: the options of a trigger request, and what the caller learns of a busy thread."""

from __future__ import annotations

from typing import Any

import pytest

from asgi_realtime import Realtime, Status
from asgi_realtime.testing import AsgiClient
from tests.asgi.official_sdk import call, create_batch, fill_batch, item, lines, on_one_loop, trigger
from tests.inprocess import ended, make_realtime

pytestmark = pytest.mark.anyio

THREAD = "chat:1"


def with_tasks() -> Realtime:
    """With a task that does not end by itself."""
    realtime = make_realtime()

    @realtime.task("answer")
    async def answer(payload: Any, run: Any) -> Any:
        return await run.input("finish").get()

    return realtime


async def test_a_busy_thread_is_409_and_names_the_run(caplog: pytest.LogCaptureFixture) -> None:
    async with with_tasks() as realtime:
        first = await trigger(realtime, "answer", thread=THREAD)
        assert first.status == 200
        run_id = first.json["id"]
        busy = await trigger(realtime, "answer", thread=THREAD, onConflict="reject")
        assert (busy.status, busy.json["code"], busy.json["runId"]) == (409, "thread_busy", run_id)
        assert busy.error.startswith("the previous request is still in progress; ")
        assert f"409 thread_busy: thread 'chat:1' has an active run, {run_id}; " in caplog.text
        assert busy.headers["x-should-retry"] == "false", "the official SDK would repeat the request four times"
        active = await realtime.active_run(THREAD)
        assert active is not None and active.id == run_id


async def test_replace_cancels_and_starts() -> None:
    async with with_tasks() as realtime:
        first, second = [await trigger(realtime, "answer", thread=THREAD, onConflict="replace") for _ in range(2)]
        assert (first.status, second.status) == (200, 200)
        assert (await ended(realtime, first.json["id"])).status is Status.CANCELED
        active = await realtime.active_run(THREAD)
        assert active is not None and active.id == second.json["id"]


async def test_the_threads_of_each_owner_are_its_own() -> None:
    async with with_tasks() as realtime:
        tokens = [
            realtime.create_trigger_public_token("answer", owner=owner, multiple_use=True)
            for owner in ("user:1", "user:1", "user:2")
        ]
        host = await realtime.trigger("answer", thread=THREAD)
        answers = [await trigger(realtime, "answer", thread=THREAD, token=token) for token in tokens]
        assert [answer.status for answer in answers] == [200, 409, 200]
        assert answers[1].json["runId"] == answers[0].json["id"]
        replaced = await trigger(realtime, "answer", thread=THREAD, onConflict="replace", token=tokens[2])
        found = [await realtime.active_run(THREAD, token_owner=owner) for owner in (None, "user:1", "user:2")]
        assert [run and run.id for run in found] == [host.id, answers[0].json["id"], replaced.json["id"]]


async def test_a_busy_thread_does_not_spend_a_one_time_token() -> None:
    async with with_tasks() as realtime:
        first = await trigger(
            realtime, "answer", thread=THREAD, token=realtime.create_trigger_public_token("answer", owner="user:1")
        )
        token = realtime.create_trigger_public_token("answer", owner="user:1")
        for key in ("a", "b"):
            assert (await trigger(realtime, "answer", thread=THREAD, token=token, key=key)).status == 409
        await realtime.send_input(first.json["id"], "finish", 1)
        await ended(realtime, first.json["id"])
        assert (await trigger(realtime, "answer", thread=THREAD, token=token, key="c")).status == 200
        assert (await trigger(realtime, "answer", thread=THREAD, token=token, key="d")).json["code"] == "token_spent"


@pytest.mark.parametrize("on_conflict", ["reject", "replace"])
async def test_a_repeated_request_finds_its_run_in_the_thread(on_conflict: str) -> None:
    async with with_tasks() as realtime:
        first, again = [
            await trigger(realtime, "answer", thread=THREAD, onConflict=on_conflict, key="a") for _ in range(2)
        ]
        assert first.json == again.json
        assert (await realtime.get_run(first.json["id"])).status is not Status.CANCELED


@on_one_loop
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thread": ""}, "a thread is empty"),
        ({"thread": "x" * 129}, "thread is 129 characters, limit 128"),
        ({"thread": "a\nb"}, "control character"),
        ({"thread": 7}, "thread"),
        ({"thread": THREAD, "onConflict": "cancel"}, "onConflict"),
        ({"onConflict": "replace"}, "on_conflict is 'replace', but the run has no thread"),
    ],
)
async def test_bad_options_are_422(options: dict[str, Any], message: str) -> None:
    async with with_tasks() as realtime:
        answer = await trigger(realtime, "answer", **options)
        assert answer.status == 422 and message in answer.error


async def test_null_means_no_thread() -> None:
    async with with_tasks() as realtime:
        answers = [await trigger(realtime, "answer", thread=None, onConflict=None) for _ in range(2)]
        assert [answer.status for answer in answers] == [200, 200]


async def test_a_batch_has_no_threads() -> None:
    async with with_tasks() as realtime:
        batch = await create_batch(realtime, 2)
        items = lines(item(0, 1, "answer"), item(1, 2, "answer", thread=THREAD))
        filled = await fill_batch(realtime, batch.json["id"], items)
        assert filled.status == 422 and "item 1 of the batch has a thread" in filled.error
        assert await realtime.active_run(THREAD) is None


async def test_subscribers_do_not_see_the_thread() -> None:
    async with with_tasks() as realtime:
        run = await trigger(realtime, "answer", thread="a private name")
        read = await call(realtime, "GET", f"/api/v3/runs/{run.json['id']}", token=run.token)
        assert read.status == 200 and "a private name" not in str(read.json)
        headers = {"authorization": f"Bearer {run.token}"}
        async with AsgiClient(realtime).stream(f"/v1/runs/{run.json['id']}", headers=headers) as feed:
            assert "a private name" not in (await feed.next_event()).data
