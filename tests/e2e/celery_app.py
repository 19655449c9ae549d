"""The app of `test_celery`: that of the guide, with the tasks of `worker_app`. LATE enables late acknowledgment."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import anyio
import redis
from anyio import to_thread
from celery import Celery

from asgi_realtime import Realtime, Run
from asgi_realtime.brokers.redis import RedisBroker
from tests.e2e.worker_app import SECRET, TIMEOUTS, register


def make(url: str, prefix: str, *, late: bool) -> tuple[Realtime, Celery]:
    """A `Realtime` with its tasks, and the Celery app of its workers."""
    celery = Celery("tests", broker=url)
    celery.conf.update(
        broker_transport_options={"global_keyprefix": f"{prefix}:", "polling_interval": 0.05},
        task_acks_late=late,
        task_reject_on_worker_lost=late,
        worker_prefetch_multiplier=1,
    )

    class CeleryExecutor:
        async def enqueue(self, run_id: str, task_id: str) -> None:
            limit = 1 if task_id == "limited" else 3600
            await to_thread.run_sync(partial(execute.apply_async, (run_id,), soft_time_limit=limit))

    realtime = Realtime(
        secret_key=SECRET,
        broker=RedisBroker(url, prefix=prefix, timeouts=TIMEOUTS),
        executor=CeleryExecutor(),
        timeouts=TIMEOUTS,
    )

    @celery.task(name="execute", ignore_result=True)
    def execute(run_id: str) -> Any:
        with redis.from_url(url) as client:
            client.hincrby(f"{prefix}:deliveries", run_id, 1)
        realtime.sync.execute(run_id)

    @realtime.task("limited")
    async def limited(run: Run) -> None:
        run.metadata.set("pid", os.getpid())
        await realtime.append("begun")
        await anyio.sleep_forever()

    register(realtime, url, prefix)
    return realtime, celery


if "PREFIX" in os.environ:
    realtime, celery = make(os.environ["REDIS_URL"], os.environ["PREFIX"], late="LATE" in os.environ)
