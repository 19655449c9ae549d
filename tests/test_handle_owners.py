"""The owner of the token in a handle that the host creates."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest

from asgi_realtime import BatchHandle, LimitExceeded, Realtime, Run, RunHandle, UsageError
from asgi_realtime.brokers.memory import MemoryBroker
from tests.asgi.official_sdk import trigger
from tests.inprocess import ended, make_realtime

pytestmark = pytest.mark.anyio

Handle = RunHandle[Any] | BatchHandle
Make = Callable[..., Awaitable[Handle]]


async def triggered(realtime: Realtime, **options: Any) -> Handle:
    return await realtime.trigger("echo", 1, **options)


async def batch(realtime: Realtime, **options: Any) -> Handle:
    return await realtime.batch_trigger([("echo", 1), ("echo", 2)], **options)


async def opened(realtime: Realtime, **options: Any) -> Handle:
    async with realtime.open_run("r", **options) as run:
        return run.handle


async def nested(realtime: Realtime, **options: Any) -> Handle:
    """The handle of a run that is triggered inside of another one."""
    async with realtime.open_run("r", **options):
        return await realtime.trigger("echo", 1)


async def source() -> AsyncIterator[int]:
    yield 1


async def piped(realtime: Realtime, **options: Any) -> Handle:
    pipe = realtime.pipe(source(), **options)
    await pipe.wait_until_complete()
    return pipe.handle


async def typed(realtime: Realtime, **options: Any) -> Handle:
    pipe = realtime.define_stream("s", int).pipe(source(), **options)
    await pipe.wait_until_complete()
    return pipe.handle


async def in_the_source(realtime: Realtime, **options: Any) -> Handle:
    """The handle of the run of a pipe, created by the source of the pipe."""
    made: list[Handle] = []

    async def items() -> AsyncIterator[int]:
        made.append(await realtime.trigger("echo", 1))
        yield 1

    await realtime.pipe(items(), **options).wait_until_complete()
    return made[0]


def _in_thread(work: Callable[[], Handle]) -> Awaitable[Handle]:
    return anyio.to_thread.run_sync(work)


async def sync_triggered(realtime: Realtime, **options: Any) -> Handle:
    return await _in_thread(lambda: realtime.sync.trigger("echo", 1, **options))


async def sync_batch(realtime: Realtime, **options: Any) -> Handle:
    return await _in_thread(lambda: realtime.sync.batch_trigger([("echo", 1)], **options))


async def sync_piped(realtime: Realtime, **options: Any) -> Handle:
    return await _in_thread(lambda: realtime.sync.pipe([1], **options).handle)


async def sync_opened(realtime: Realtime, **options: Any) -> Handle:
    def work() -> Handle:
        with realtime.sync.open_run("r", **options) as run:
            return run.handle

    return await _in_thread(work)


MAKE = [triggered, batch, opened, nested, piped, typed, in_the_source]
SYNC = [sync_triggered, sync_batch, sync_piped, sync_opened]


def with_echo() -> Realtime:
    realtime = make_realtime()

    @realtime.task("echo")
    async def echo(payload: Any) -> Any:
        return payload

    return realtime


def owner_of(realtime: Realtime, handle: Handle) -> str:
    return realtime.verify_token(handle.public_access_token).owner


async def charged(realtime: Realtime, owner: str) -> list[str]:
    return [change.run_id for change in (await realtime.broker.changes(f"owner:{owner}")).items]


@pytest.mark.parametrize("make", [*MAKE, *SYNC])
async def test_the_host_sets_the_owner_of_the_token_and_the_run_is_not_charged_to_it(make: Make) -> None:
    async with with_echo() as realtime:
        assert owner_of(realtime, await make(realtime, owner="user:1")) == "user:1"
        assert await charged(realtime, "user:1") == []
        handle = await make(realtime)
        assert owner_of(realtime, handle) == realtime.verify_token(handle.public_access_token).token_id


@pytest.mark.parametrize("make", [triggered, batch, opened, piped, typed])
async def test_an_invalid_owner_is_rejected_before_anything_is_stored(make: Make) -> None:
    async with with_echo() as realtime:
        for owner, error in ((" ", UsageError), (7, UsageError), ("x" * 129, LimitExceeded)):
            with pytest.raises(error, match="owner is "):
                await make(realtime, owner=owner)
        assert isinstance(realtime.broker, MemoryBroker) and realtime.broker.size == 0


@pytest.mark.parametrize("make", [triggered, batch, opened, piped, typed, sync_triggered, sync_opened])
async def test_handles_inside_of_a_run_have_the_owner_of_the_token_that_triggered_it(make: Make) -> None:
    async with with_echo() as realtime:
        found: list[Handle] = []

        @realtime.task("outer")
        async def outer(run: Run) -> None:
            found.extend([run.handle, await make(realtime), await make(realtime, owner="user:2")])

        token = realtime.create_trigger_public_token("outer", owner="user:1")
        answer = await trigger(realtime, "outer", token=token)
        run = await ended(realtime, answer.json["id"])
        assert run.is_success
        assert [owner_of(realtime, handle) for handle in found] == ["user:1", "user:1", "user:2"]
        assert await charged(realtime, "user:1") == [run.id]
        assert await charged(realtime, "user:2") == []
