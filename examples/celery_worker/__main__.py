"""`python -m examples.celery_worker`: start Redis and a Celery worker, trigger a run, and print its output live.

Set REDIS_URL to use another Redis. Needs `pip install '.[redis]' 'celery[redis]'`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys

from examples.local_redis import local_redis
from examples.processes import running

WORKER = "celery -A examples.celery_worker.tasks worker --concurrency 2 --loglevel WARNING"


async def watch() -> None:
    from examples.celery_worker.tasks import realtime, words  # after REDIS_URL is set

    async with realtime:
        handle = await realtime.trigger(words, "Each word arrives from a Celery process as soon as it is produced.")
        async for word in realtime.read(handle):
            print(word, end=" ", flush=True)
        print(f"\nprocess {os.getpid()} received the result of another process: {await handle.result()}")


if __name__ == "__main__":
    try:
        with local_redis() as redis:
            os.environ |= {"REDIS_URL": redis.url, "REALTIME_SECRET_KEY": secrets.token_urlsafe(32)}
            with running(sys.executable, "-m", *WORKER.split(), environment=os.environ):
                asyncio.run(watch())
    except KeyboardInterrupt:
        pass
