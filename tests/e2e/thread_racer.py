"""One of two processes that start runs in the same threads at the same moments; a program of `test_threads`.

`python -m tests.e2e.thread_racer reject|replace ROUNDS`. REDIS_URL and PREFIX locate the data. It then stays, and its
runs with it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any, cast

import redis.asyncio

from asgi_realtime import Realtime, Run, ThreadBusy, Timeouts
from asgi_realtime.brokers.redis import RedisBroker
from asgi_realtime.tasks.options import OnConflict

SECRET = "a key of the tests, 32 bytes or more"
TIMEOUTS = Timeouts(lease=1.0, tick=0.05, drain=0.2)
PROCESSES = 2


def make(url: str, prefix: str) -> Realtime:
    broker = RedisBroker(url, prefix=prefix, timeouts=TIMEOUTS)
    realtime = Realtime(secret_key=SECRET, broker=broker, timeouts=TIMEOUTS)

    @realtime.task("wait")
    async def wait(run: Run) -> Any:
        await realtime.append("a word")
        return await run.input("finish").get()

    return realtime


async def main(on_conflict: OnConflict, rounds: int) -> None:
    url, prefix = os.environ["REDIS_URL"], os.environ["PREFIX"]
    async with redis.asyncio.from_url(url) as client, make(url, prefix) as realtime:
        for number in range(rounds):
            ready = await client.incr(f"{prefix}:ready:{number}")
            while ready < PROCESSES:
                ready = await client.incrby(f"{prefix}:ready:{number}", 0)
            try:
                handle = await realtime.trigger("wait", thread=f"chat:{number}", on_conflict=on_conflict)
            except ThreadBusy as busy:
                await client.rpush(f"{prefix}:rejected:{number}", busy.run_id)
            else:
                await client.rpush(f"{prefix}:accepted:{number}", handle.id)
        await client.incr(f"{prefix}:done")
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(cast(OnConflict, sys.argv[1]), int(sys.argv[2])))
