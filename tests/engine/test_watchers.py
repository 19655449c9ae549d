"""`on_unwatched`: the readers of all processes count, and a run that nobody reads anymore is canceled."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest

from asgi_realtime import BrokerUnavailable, Limits, Realtime, Run, RunCanceled, Status, UsageError, current_run
from asgi_realtime.asgi.host import App
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.engine.watchers import BETWEEN_POLLS_S
from asgi_realtime.testing import AsgiClient, StreamedResponse
from tests.inprocess import GUARD_S, SECRET, FakeClock, ended, make_realtime, until

pytestmark = pytest.mark.anyio

HEADERS = {"authorization": f"Bearer {SECRET}"}
GRACE_S = 15


class Processes:
    """Several `Realtime`s that share a broker and a clock, with the task "endless"."""

    def __init__(self, *made: Realtime, clock: FakeClock) -> None:
        self.first, self.second = made
        self.both = made
        self.clock = clock
        self._started = AsyncExitStack()

    async def __aenter__(self) -> Processes:
        for process in self.both:
            await self._started.enter_async_context(process)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._started.aclose()

    async def tick(self) -> None:
        """Everything that is due now is done, as if all processes had ticked."""
        for process in self.both:
            await process.engine.watchers.report()
        for process in self.both:
            await process.engine.make_ticker().once()

    async def pass_time(self, seconds: float) -> None:
        """In steps, as leases have to be renewed."""
        for _ in range(int(seconds)):
            self.clock.seconds += 1
            await self.tick()

    async def run(self, **options: Any) -> str:
        """The id of a run that executes and has a chunk."""
        handle = await self.first.trigger("endless", **options)
        await anext(aiter(self.first.read(handle)))
        return handle.id

    async def watchers(self, run_id: str) -> int:
        await self.tick()
        return await self.first.broker.watchers(run_id)

    async def is_canceled(self, run_id: str) -> bool:
        record = await self.first.runs.get(run_id)
        return record.status is Status.CANCELED or record.cancel_requested_at_ms is not None


def processes(**unwatched: Any) -> Processes:
    clock = FakeClock()
    broker = MemoryBroker(clock=clock)
    made = [make_realtime(broker=broker, clock=clock) for _ in range(2)]
    for realtime in made:
        add_task(realtime, unwatched)
    return Processes(*made, clock=clock)


def add_task(realtime: Realtime, unwatched: dict[str, Any]) -> None:
    @realtime.task("endless", **unwatched)
    async def endless() -> None:
        await realtime.append("text")
        await anyio.sleep_forever()


def host_of(realtime: Realtime) -> App:
    """An app that responds with streams itself."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await realtime.response(scope["path"].strip("/"))(scope, receive, send)

    return app


async def opened(started: AsyncExitStack, realtime: App, path: str, **headers: str) -> StreamedResponse:
    """An open response that has sent something."""
    stream = AsgiClient(realtime).stream(path, headers={**HEADERS, **headers})
    response = await started.enter_async_context(stream)
    await response.chunk()
    return response


async def test_a_run_is_canceled_when_its_last_reader_has_left_for_the_grace_period() -> None:
    async with processes(on_unwatched="cancel") as both:
        never_read, run_id = await both.run(), await both.run()
        path = f"/v1/streams/{run_id}/default"
        async with AsyncExitStack() as here, AsyncExitStack() as there:
            await opened(here, both.first, path)
            await opened(there, both.second, path)
            await opened(there, both.second, path, **{"trigger-version": "4.8.3"})  # of an official client
            await opened(there, both.second, f"{path}?protocol=ai-sdk")
            await opened(there, host_of(both.second), f"/{run_id}")
            assert await both.watchers(run_id) == 5
            await there.aclose()
            await until(lambda: len(both.second.subscribers) == 0)
            assert await both.watchers(run_id) == 1
            await both.pass_time(200)  # the count is renewed
            assert await both.watchers(run_id) == 1
        await both.pass_time(GRACE_S - 1)
        async with AsyncExitStack() as reloaded:
            await opened(reloaded, both.second, path)
            await both.pass_time(200)
            assert not await both.is_canceled(run_id)
        assert await both.watchers(run_id) == 0
        await both.pass_time(GRACE_S - 1)
        assert not await both.is_canceled(run_id)
        await both.pass_time(2)
        assert (await ended(both.first, run_id)).status is Status.CANCELED
        assert (await both.first.get_run(never_read)).status is Status.EXECUTING


async def test_a_process_that_dies_leaves_no_reader_behind() -> None:
    async with processes(on_unwatched="cancel", unwatched_grace=3) as both:
        run_id = await both.run()
        async with AsyncExitStack() as there:
            await opened(there, both.second, f"/v1/streams/{run_id}/default")
            assert await both.watchers(run_id) == 1
            both.second.engine.watchers.clear()  # as if it were dead
            await both.pass_time(both.first.timeouts.lease - 1)
            assert await both.watchers(run_id) == 1
            await both.pass_time(2)
            assert await both.watchers(run_id) == 0
            await both.pass_time(3)
            assert await both.is_canceled(run_id)


async def test_other_readers_are_no_watchers() -> None:
    async with processes(on_unwatched="cancel") as both, AsyncExitStack() as open_now:
        run_id = await both.run(tags="a")
        await both.first.send_input(run_id, "approval", 1)
        events = {"accept": "text/event-stream"}
        for path in (f"/v1/runs/{run_id}", "/v1/runs?tags=a", f"/v1/streams/{run_id}/input/approval"):
            await opened(open_now, both.first, path, **events)
        await anext(aiter(both.first.subscribe_to_run(run_id)))
        assert await both.watchers(run_id) == 0
        await both.pass_time(2 * GRACE_S)
        assert not await both.is_canceled(run_id)


async def poll(realtime: Realtime, run_id: str, cursor: dict[str, str]) -> dict[str, str]:
    """Poll like an official client. Returns the next cursor."""
    headers = {**HEADERS, "x-trigger-electric-version": "1.0.0-beta.1"}
    response = await AsgiClient(realtime).get(f"/realtime/v1/runs/{run_id}", query=cursor, headers=headers)
    assert response.status_code == 200, response.body
    return {"handle": response.headers["electric-handle"], "offset": response.headers["electric-offset"]}


async def test_an_official_client_that_polls_a_run_is_a_watcher_between_two_polls() -> None:
    async with processes(on_unwatched="cancel", unwatched_grace=1) as both:
        run_id = await both.run()
        cursor = await poll(both.first, run_id, {"offset": "-1"})
        for number in range(5):
            assert await both.watchers(run_id) == 1
            await both.pass_time(BETWEEN_POLLS_S - 1)
            for _ in range(number + 1):
                cursor = await poll(both.first, run_id, cursor)
        assert not await both.is_canceled(run_id)
        await both.pass_time(2)
        await poll(both.second, run_id, cursor)  # for a moment both processes count it
        assert await both.watchers(run_id) == 2
        await both.pass_time(BETWEEN_POLLS_S - 1)
        assert await both.watchers(run_id) == 1
        assert not await both.is_canceled(run_id)
        await both.pass_time(BETWEEN_POLLS_S + 2)
        assert await both.watchers(run_id) == 0
        assert await both.is_canceled(run_id)


async def test_the_feed_of_other_runs_has_no_mark() -> None:
    async with processes() as both:
        run_id = await both.run()
        cursor = await poll(both.first, run_id, {"offset": "-1"})
        assert cursor["handle"].endswith(".0")
        await poll(both.first, run_id, {**cursor, "handle": f"{cursor['handle'][:-1]}1"})  # forged
        assert await both.watchers(run_id) == 0
        await both.pass_time(2 * GRACE_S)
        assert await both.watchers(run_id) == 0
        assert not await both.is_canceled(run_id)


class WithoutWatching(MemoryBroker):
    async def watch(self, run_id: str, *, process: str, readers: int, grace_s: float | None) -> None:
        raise AssertionError("this run does not ask for it")


async def test_runs_that_do_not_ask_for_it_cost_no_call() -> None:
    clock = FakeClock()
    both = Processes(*(make_realtime(broker=WithoutWatching(clock=clock), clock=clock) for _ in range(2)), clock=clock)
    add_task(both.first, {})
    async with both, AsyncExitStack() as started:
        run_id = await both.run()
        await opened(started, both.first, f"/v1/streams/{run_id}/default")
        await both.pass_time(2 * GRACE_S)
        assert not await both.is_canceled(run_id)


async def test_a_run_that_waits_is_canceled_too() -> None:
    async with processes(on_unwatched="cancel") as both:
        handle = await both.first.trigger("endless", delay="1h")
        async with AsyncExitStack() as started:
            await opened(started, both.first, f"/v1/streams/{handle.id}/default")
        await both.pass_time(GRACE_S + 2)
        assert (await both.first.get_run(handle)).status is Status.CANCELED


async def test_a_trigger_replaces_what_the_task_says() -> None:
    async with processes(on_unwatched="cancel") as both:
        for options, expected in (
            ({}, (True, 15.0)),
            ({"on_unwatched": "continue"}, (True, None)),
            ({"on_unwatched": "cancel", "unwatched_grace": "1m"}, (True, 60.0)),
        ):
            record = await both.first.runs.get(await both.run(**options))
            assert (record.counts_watchers, record.unwatched_grace_s) == expected


async def test_pipes_and_open_runs_have_the_options_too() -> None:
    async def endless() -> AsyncIterator[int]:
        yield 1
        await anyio.sleep_forever()

    async with processes() as both:
        pipe = both.first.pipe(endless(), on_unwatched="cancel", unwatched_grace=1)
        await pipe.wait_until_started()
        async with AsyncExitStack() as started:
            await opened(started, both.second, f"/v1/streams/{pipe.handle.id}/default")
            assert await both.watchers(pipe.handle.id) == 1
        await both.pass_time(3)
        assert (await ended(both.first, pipe.handle.id)).status is Status.CANCELED

        async with both.first.open_run("r", on_unwatched="continue") as run, AsyncExitStack() as started:
            await both.first.append(1)
            assert await run.watchers() == 0
            await opened(started, both.second, f"/v1/streams/{run.id}/default")
            await both.tick()
            assert await run.watchers() == 1
            await started.aclose()
            await both.pass_time(2 * GRACE_S)
            assert await run.watchers() == 0


async def test_the_readers_of_a_run_that_does_not_ask_for_it_are_unknown() -> None:
    async with make_realtime() as realtime, realtime.open_run("r"):
        run: Run = current_run()
        with pytest.raises(UsageError, match=r"are not counted; create it with on_unwatched="):
            await run.watchers()


async def test_invalid_options_are_rejected() -> None:
    async with make_realtime() as realtime:
        add_task(realtime, {})
        wrong: list[tuple[Any, str]] = [
            ({"on_unwatched": "stop"}, "on_unwatched is 'stop'; allowed are 'continue' and 'cancel'"),
            ({"on_unwatched": "continue", "unwatched_grace": "1m"}, "pass on_unwatched='cancel' too"),
            ({"unwatched_grace": "1m"}, "pass on_unwatched='cancel' too"),
            ({"on_unwatched": "cancel", "unwatched_grace": "soon"}, "unwatched_grace is 'soon'"),
        ]
        for options, message in wrong:
            with pytest.raises(UsageError, match=message):
                await realtime.trigger("endless", **options)
            with pytest.raises(UsageError, match=message):
                realtime.task("t", **options)(anyio.sleep_forever)
            with pytest.raises(UsageError, match=message):
                realtime.open_run("r", **options)
        async with realtime.open_run("r"):
            with pytest.raises(UsageError, match="on_unwatched= is for a run that pipe"):
                realtime.pipe([1], on_unwatched="cancel")


class Failing(MemoryBroker):
    fails = 0

    async def watch(self, run_id: str, *, process: str, readers: int, grace_s: float | None) -> None:
        if self.fails:
            self.fails -= 1
            raise BrokerUnavailable("it is away")
        await super().watch(run_id, process=process, readers=readers, grace_s=grace_s)


async def test_a_report_that_failed_is_repeated() -> None:
    clock = FakeClock()
    broker = Failing(clock=clock)
    both = Processes(*(make_realtime(broker=broker, clock=clock) for _ in range(2)), clock=clock)
    add_task(both.first, {"on_unwatched": "continue"})
    async with both, AsyncExitStack() as started:
        run_id = await both.run()
        broker.fails = 3
        await opened(started, both.second, f"/v1/streams/{run_id}/default")
        await until(lambda: not broker.fails)
        assert await both.watchers(run_id) == 1
        broker.fails = 3
        await opened(started, both.second, f"/v1/streams/{run_id}/default")
        await until(lambda: not broker.fails)
        assert await both.watchers(run_id) == 2


async def test_a_reader_that_was_dropped_is_counted_down_once() -> None:
    """The `send()` of some servers cannot be cancelled, so the subscription is released before it ends."""
    async with processes(on_unwatched="continue") as both, AsyncExitStack() as started:
        run_id = await both.run()
        for _ in range(2):
            await opened(started, both.first, f"/v1/streams/{run_id}/default")
        subscription: Any = next(iter(both.first.subscribers))
        subscription._drop()
        await until(lambda: subscription._phase.name == "CLOSED")
        assert await both.watchers(run_id) == 1


async def test_a_run_that_does_not_stop_is_canceled_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with processes() as both:
        with pytest.raises(RunCanceled):
            async with both.first.open_run("r", on_unwatched="cancel", unwatched_grace=1) as run:
                async with AsyncExitStack() as started:
                    await both.first.append(1)
                    await opened(started, both.second, f"/v1/streams/{run.id}/default")
                with anyio.CancelScope(shield=True):
                    await both.pass_time(5)
    text = f"run {run.id} is canceled: nobody has read it for 1 s"
    assert [record.getMessage() for record in caplog.records].count(text) == 1


class Recording(MemoryBroker):
    grace_s: float | None = None

    async def watch(self, run_id: str, *, process: str, readers: int, grace_s: float | None) -> None:
        self.grace_s = grace_s
        await super().watch(run_id, process=process, readers=readers, grace_s=grace_s)


async def test_a_reader_that_returns_at_the_last_moment_is_in_time() -> None:
    """Its process reports it at the next tick only."""
    clock = FakeClock()
    broker = Recording(clock=clock)
    both = Processes(*(make_realtime(broker=broker, clock=clock) for _ in range(2)), clock=clock)
    add_task(both.first, {"on_unwatched": "cancel", "unwatched_grace": 3})
    async with both, AsyncExitStack() as started:
        run_id = await both.run()
        await opened(started, both.first, f"/v1/streams/{run_id}/default")
        assert await both.watchers(run_id) == 1
    assert broker.grace_s == 3 + 2 * both.first.timeouts.tick


async def test_a_rejected_reader_does_not_count() -> None:
    clock = FakeClock()
    first, second = (make_realtime(clock=clock, limits=Limits(subscribers_per_run=2)) for _ in range(2))
    add_task(first, {"on_unwatched": "continue"})
    async with Processes(first, second, clock=clock) as both, AsyncExitStack() as started:
        run_id = await both.run()
        path = f"/v1/streams/{run_id}/default"
        for _ in range(2):
            await opened(started, first, path)
        assert (await AsgiClient(first).get(path, headers=HEADERS)).status_code == 429
        assert await both.watchers(run_id) == 2


async def test_a_reader_that_resumes_where_it_cannot_does_not_count() -> None:
    """Otherwise a wrong position would cancel a run that nobody has read yet."""
    async with processes(on_unwatched="cancel") as both:
        run_id = await both.run()
        path = f"/v1/streams/{run_id}/default?protocol=ai-sdk"
        response = await AsgiClient(both.first).get(path, headers={**HEADERS, "last-event-id": "7"})
        assert response.status_code == 400
        await both.pass_time(2 * GRACE_S)
        assert not await both.is_canceled(run_id)


async def test_runs_are_reported_concurrently() -> None:
    """With thousands of runs on Redis, one call after the other held up everything else that is due."""
    async with processes(on_unwatched="continue") as both, AsyncExitStack() as started:
        broker, calls, all_called = both.first.broker, 0, anyio.Event()
        watch = broker.watch

        async def slow(*args: Any, **options: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 4:  # the ticker reports, too
                all_called.set()
            await all_called.wait()
            await watch(*args, **options)

        broker.watch = slow  # type: ignore[method-assign]
        for _ in range(4):
            await opened(started, both.first, f"/v1/streams/{await both.run()}/default")
        with anyio.fail_after(GUARD_S):
            await both.first.engine.watchers.report()
            await all_called.wait()
