"""The queue, the Realtime and the tasks, imported by web processes and job workers."""

import os

from openai import AsyncOpenAI
from pydantic import BaseModel
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from taskiq_redis import RedisStreamBroker

from asgi_realtime import Realtime, Run
from asgi_realtime.tasks.taskiq import TaskiqExecutor

REDIS_URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379")
queue = RedisStreamBroker(
    REDIS_URL,
    queue_name="chat",
    unacknowledged_lock_timeout=10,
    retry=Retry(ExponentialBackoff(cap=1, base=0.1), retries=-1),  # or a worker exits when Redis is unavailable
)
realtime = Realtime(
    secret_key=os.environ["REALTIME_SECRET_KEY"],  # the same in all processes
    broker=REDIS_URL,
    executor=TaskiqExecutor(queue),
)
openai = AsyncOpenAI()  # OPENAI_API_KEY, OPENAI_BASE_URL
MODEL = os.environ.get("OPENAI_MODEL", "gpt-4o-mini")


class Question(BaseModel):
    text: str


@realtime.task("chat")
async def chat(question: Question, run: Run) -> dict[str, str]:
    completion = await openai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": question.text}], stream=True
    )
    text = ""
    stream = realtime.pipe(completion)  # sends each chunk to subscribers in all processes
    async for chunk in stream:
        token = "".join(choice.delta.content or "" for choice in chunk.choices)
        text += token
        run.metadata.increment("tokens", 1 if token else 0)
    await stream.wait_until_complete()
    return {"text": text}
