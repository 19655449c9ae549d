"""What an operator reads in the log, and what must never be in it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from asgi_realtime import Limits, Run, RunEnd, TaskError, Timeouts
from asgi_realtime.testing import AsgiClient
from tests.asgi.fake_host import FakeHost
from tests.inprocess import SECRET, ended, make_realtime, until

pytestmark = pytest.mark.anyio

CANARY = "canary-7d2f"


@pytest.fixture(autouse=True)
def everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "asgi_realtime")


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Level and message, without the times."""
    found = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "asgi_realtime"]
    return [(level, message.partition(" after ")[0]) for level, message in found]


async def test_the_log_of_a_whole_life(caplog: pytest.LogCaptureFixture) -> None:
    realtime = make_realtime(limits=Limits(subscribers_per_run=1))

    @realtime.task("works")
    async def works() -> None: ...

    @realtime.task("fails")
    async def fails() -> None:
        raise ValueError("a bug")

    @realtime.task("refuses")
    async def refuses() -> None:
        raise TaskError("for the user")

    @realtime.task("endless")
    async def endless() -> None:
        await anyio.sleep_forever()

    async with realtime:
        good = await realtime.trigger(works)
        await ended(realtime, good)
        bad = await realtime.trigger(fails)
        await ended(realtime, bad)
        refused = await realtime.trigger(refuses)
        await ended(realtime, refused)
        stuck = await realtime.trigger(endless)
        await until(lambda: stuck.id in realtime.engine.executions)
        client, path = AsgiClient(realtime), f"/v1/streams/{stuck.id}/default"
        async with client.stream(path, token=SECRET):
            for _ in range(15):
                await client.get(path, token=SECRET)
            await client.get(path, token="forged")
    full = "this run has 1 open subscriptions, limit 1; close one, or try later"
    route = "GET v1/streams/{run_id}/{key}"
    assert lines(caplog) == [
        ("DEBUG", f"run {good.id} of task 'works' started"),
        ("DEBUG", f"run {good.id} of task 'works' ended COMPLETED"),
        ("DEBUG", f"run {bad.id} of task 'fails' started"),
        ("ERROR", f"run {bad.id} of task 'fails' failed"),
        ("INFO", f"run {bad.id} of task 'fails' ended FAILED (ValueError)"),
        ("DEBUG", f"run {refused.id} of task 'refuses' started"),
        ("INFO", f"run {refused.id} of task 'refuses' ended FAILED (TaskError)"),
        ("DEBUG", f"run {stuck.id} of task 'endless' started"),
        *[("WARNING", f"rejected {route} with 429 limit_exceeded: {full}")] * 10,
        ("WARNING", f"rejected {route} with 401 invalid_token"),
        ("INFO", f"run {stuck.id} of task 'endless' ended FAILED (ServerShutdown)"),
        ("WARNING", "shutdown: 0 runs finished, 1 cut"),
    ]


async def test_a_cut_reader_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    host = FakeHost(timeouts=Timeouts(send=30))
    await host.create()
    async with AsgiClient(host).stream("/v1/streams/run_1/default", headers=host.headers()):
        await anyio.wait_all_tasks_blocked()  # the preamble is being sent, and the client does not read it
        host.tick()
        host.tick(30)
    message = "a reader was cut, because it accepted no data for 30 s (stream of run run_1)"
    assert ("WARNING", message) in lines(caplog)


async def test_clients_that_come_early_are_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    realtime = make_realtime()
    async with realtime:
        assert (await AsgiClient(realtime, token=SECRET).get("/v1/streams/run_none/default")).status_code == 404
    assert lines(caplog) == [("DEBUG", "rejected GET v1/streams/{run_id}/{key} with 404 run_not_found")]


async def test_a_token_that_has_expired_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A client refreshes its token when it gets this 401, which is not worth a line each time."""
    host = FakeHost()
    expired = host.token(expires_in_s=1)
    host.tick(2)
    assert (await AsgiClient(host, token=expired).get("/v1/streams/run_1/default")).status_code == 401
    assert lines(caplog) == [("DEBUG", "rejected GET v1/streams/{run_id}/{key} with 401 token_expired")]


async def test_a_thousand_failures_are_not_a_thousand_tracebacks(caplog: pytest.LogCaptureFixture) -> None:
    realtime = make_realtime()

    @realtime.task("fails")
    async def fails() -> None:
        raise ValueError

    async with realtime:
        runs = [await realtime.trigger(fails) for _ in range(100)]
        for run in runs:
            await ended(realtime, run)
    assert sum(record.exc_info is not None for record in caplog.records) == 10
    assert sum(record.levelno >= logging.WARNING for record in caplog.records) == 10


async def test_a_hundred_failures_of_on_end_are_not_a_hundred_tracebacks(caplog: pytest.LogCaptureFixture) -> None:
    """A database that is down makes all of them fail."""
    realtime, called = make_realtime(), list[str]()

    async def save(end: RunEnd) -> None:
        called.append(end.run.id)
        raise OSError("the database is down")

    @realtime.task("works", on_end=save)
    async def works() -> None: ...

    async with realtime:
        for _ in range(100):
            await realtime.trigger(works)
        await until(lambda: len(called) == 100)
    assert sum(record.exc_info is not None for record in caplog.records) == 10


async def test_runs_that_succeed_are_not_logged_at_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "asgi_realtime")
    realtime = make_realtime()
    async with realtime, realtime.open_run("chat"):
        pass
    assert not caplog.records


async def test_no_token_payload_or_chunk_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    realtime = make_realtime(limits=Limits(chunk_bytes=100, payload_bytes=100))

    async def source() -> AsyncIterator[Any]:
        yield f"chunk {CANARY}"
        yield {"unencodable": object(), "text": CANARY}
        yield CANARY * 20

    @realtime.task("chat")
    async def chat(payload: dict[str, int], run: Run) -> None:
        run.metadata.set("secret", CANARY)
        async for _ in realtime.pipe(source()):
            pass

    @realtime.task("raises")
    async def raises(payload: dict[str, str]) -> str:
        raise KeyError("lost")

    async with realtime:
        client = AsgiClient(realtime)
        run = await realtime.trigger(raises, {"key": CANARY}, tags=["user:1"])
        await ended(realtime, run)
        await ended(realtime, await realtime.trigger(chat, {"number": 1}))
        public = realtime.create_public_token(scopes={"read": {"runs": ["run_other"]}})
        for path in (f"/v1/streams/{run.id}/default", f"/v1/runs/{run.id}", "/v1/metrics"):
            await client.get(path, token=public)
            await client.get(f"{path}?access_token={public}", headers={"accept": "text/event-stream"})
            await client.get(f"{path}?access_token={SECRET}")
            await client.get(f"{path}?access_token={CANARY}")
            await client.get(path, headers={"authorization": f"Basic {CANARY}"})
        wrong: tuple[Any, ...] = (
            {"payload": {"number": CANARY}},
            {"payload": {"number": CANARY * 20}},
            {"payload": CANARY, "options": {"tags": [CANARY * 20]}},
            {"payload": {}, "options": {"ttl": CANARY}},
        )
        for body in wrong:
            for task in ("chat", f"none-{CANARY}"):
                rejected = await client.post(f"/api/v1/tasks/{task}/trigger", json=body, token=SECRET)
                assert rejected.status_code >= 400
        broken = await client.post("/api/v1/tasks/chat/trigger", body=f'{{"payload": {CANARY}'.encode(), token=SECRET)
        assert broken.status_code == 400
        await client.post(f"/v1/streams/{run.id}/self/log/append", body=CANARY.encode() * 20, token=SECRET)
        await client.post(f"/v1/streams/{run.id}/input/answer", json={"data": CANARY}, token=public)
        await client.get(f"/v1/nothing/{CANARY}", token=SECRET)
    logged = [caplog.handler.format(record) for record in caplog.records]
    assert any("rejected" in line for line in logged) and any("a pipe skips item" in line for line in logged)
    for secret_text in (CANARY, SECRET, public, public.rpartition(".")[2]):
        assert [line for line in logged if secret_text in line] == []
