"""The app of `test_workers` and `test_celery`: the tests, the web process and the workers all import it.

REDIS_URL and PREFIX locate its data; PREFIX is also the name of the queue. Without them the module only defines
`make`.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import anyio
import redis.asyncio
from starlette.applications import Starlette
from starlette.routing import Mount
from taskiq_redis import RedisStreamBroker

from asgi_realtime import Realtime, Run, StreamClosed, Timeouts, current_run
from asgi_realtime.brokers.redis import RedisBroker
from asgi_realtime.tasks.taskiq import TaskiqExecutor

SECRET = "a key of the tests, 32 bytes or more"
TIMEOUTS = Timeouts(lease=2.0, tick=0.1, drain=0.2)


@dataclass(frozen=True)
class Made:
    realtime: Realtime
    queue: RedisStreamBroker


def make(url: str, prefix: str, executor: Any = None) -> Made:
    """A `Realtime` with its tasks, and a queue that soon redelivers unacknowledged messages."""
    queue = RedisStreamBroker(url, queue_name=f"{prefix}:queue", idle_timeout=200, xread_block=100)
    realtime = Realtime(
        secret_key=SECRET,
        broker=RedisBroker(url, prefix=prefix, timeouts=TIMEOUTS),
        executor=executor or TaskiqExecutor(queue),
        timeouts=TIMEOUTS,
    )
    register(realtime, url, prefix)
    return Made(realtime, queue)


def register(realtime: Realtime, url: str, prefix: str) -> None:
    async def note(what: str, value: str) -> None:
        """Leave a note outside the run, which may be over."""
        async with redis.asyncio.from_url(url) as client:
            await client.hset(f"{prefix}:notes", what, value)

    async def count(run: Run) -> None:
        async with redis.asyncio.from_url(url) as client:
            await client.hincrby(f"{prefix}:executions", run.id, 1)

    async def numbers() -> AsyncIterator[int]:
        for number in range(1_000_000):
            yield number
            await anyio.sleep(0.01)

    @realtime.task("context")
    async def context(payload: dict[str, int], run: Run) -> dict[str, Any]:
        assert current_run() is run
        run.metadata.set("pid", os.getpid())
        await run.metadata.flush()
        first = await run.input("first").get(timeout=30)
        await realtime.pipe(range(payload["count"])).wait_until_complete()
        return {"input": first, "user": "user:1" in run.tags}

    @realtime.task("quick")
    async def quick(payload: int) -> int:
        return payload

    @realtime.task("endless")
    async def endless(run: Run) -> None:
        await count(run)
        run.metadata.set("pid", os.getpid())
        realtime.pipe(numbers())
        how = ""
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            how = "cancelled"
            run.metadata.set("cleaned", True)
            raise
        finally:
            with anyio.CancelScope(shield=True):
                try:
                    await realtime.append("last word")
                except StreamClosed:
                    how += ", refused"
                await note(run.id, how)

    @realtime.task("patient")
    async def patient(run: Run) -> Any:
        await count(run)
        return await run.input("enough").get()

    @realtime.task("blocking")
    async def blocking(payload: float, run: Run) -> int:
        time.sleep(payload)  # noqa: ASYNC251 - on the loop, as it should not be
        return os.getpid()

    @realtime.task("sync")
    def sync(payload: int) -> int:
        for number in range(payload):
            realtime.sync.append(number)
        return payload


if "PREFIX" in os.environ:
    made = make(os.environ["REDIS_URL"], os.environ["PREFIX"])
    realtime, queue = made.realtime, made.queue
    app = Starlette(routes=[Mount("/realtime", realtime)], lifespan=realtime.lifespan)
