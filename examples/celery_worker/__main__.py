"""`python -m examples.celery_worker`: starts Redis and a Celery worker, triggers a run, and prints it as it comes.

With REDIS_URL set no Redis is started. Needs `pip install '.[redis]' 'celery[redis]'`.
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
    from examples.celery_worker.tasks import realtime, words  # once the environment says where Redis is

    async with realtime:
        handle = await realtime.trigger(words, "Each word comes from a process of Celery as soon as it is produced.")
        async for word in realtime.read(handle):
            print(word, end=" ", flush=True)
        print(f"\nprocess {os.getpid()} read what another has done: {await handle.result()}")


if __name__ == "__main__":
    try:
        with local_redis() as redis:
            os.environ |= {"REDIS_URL": redis.url, "REALTIME_SECRET_KEY": secrets.token_urlsafe(32)}
            with running(sys.executable, "-m", *WORKER.split(), environment=os.environ):
                asyncio.run(watch())
    except KeyboardInterrupt:
        pass
