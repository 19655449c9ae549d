"""Celery's queue, the Realtime and the tasks, imported by the worker and by programs that trigger runs."""

import asyncio
import os
from collections.abc import AsyncIterator

from anyio import to_thread
from celery import Celery

from asgi_realtime import BrokerUnavailable, Realtime

REDIS_URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379")
celery = Celery("tasks", broker=REDIS_URL.replace("unix://", "redis+socket://"))  # the scheme that Celery uses


class CeleryExecutor:
    async def enqueue(self, run_id: str, task_id: str) -> None:
        await to_thread.run_sync(execute.delay, run_id, abandon_on_cancel=True)


realtime = Realtime(
    secret_key=os.environ["REALTIME_SECRET_KEY"],  # the same in all processes
    broker=REDIS_URL,
    executor=CeleryExecutor(),
)


@celery.task(autoretry_for=(BrokerUnavailable,), retry_backoff=True, max_retries=None, ignore_result=True)
def execute(run_id: str) -> None:
    realtime.sync.execute(run_id)


@realtime.task("words")
async def words(text: str) -> dict[str, int]:
    async def speak() -> AsyncIterator[str]:
        for word in text.split():
            yield word
            await asyncio.sleep(0.1)

    result = await realtime.pipe(speak()).wait_until_complete()
    return {"words": result.chunks, "worker": os.getpid()}
