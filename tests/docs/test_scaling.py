"""What docs/scaling.md says of Redis, tried with a Redis."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

import anyio
import pytest

import asgi_realtime.brokers.redis
from asgi_realtime import Realtime, Retention, RunNotFound, Timeouts
from tests.docs.blocks import blocks
from tests.faults import SECRET
from tests.redis_servers import RedisServer

RULES = blocks("acl")["rules"].text.split()
SCRIPTS = Path(asgi_realtime.brokers.redis.__file__).parent / "lua"


@pytest.mark.redis
@pytest.mark.asyncio
async def test_a_user_with_these_rules_can_do_everything(redis_server: RedisServer) -> None:
    url = redis_server.add_user("app", "secret", *RULES)
    timeouts = Timeouts(tick=0.02, lease=0.3, append=3)
    retention = Retention(after_end=0.2, stream_bytes=1000)
    async with Realtime(
        secret_key=SECRET, signals=False, broker=url, timeouts=timeouts, retention=retention
    ) as realtime:

        @realtime.task("t")
        async def task(count: int) -> int:
            for number in range(count):
                await realtime.append([number, "x" * 100])
            await anyio.sleep(timeouts.lease)  # long enough to be renewed
            return count

        handle = await realtime.trigger(task, 40, tags=["a"], idempotency_key="key", delay=0.05)
        assert await handle.result(timeout=10) == 40
        await realtime.broker.ping()
        with anyio.fail_after(10), pytest.raises(RunNotFound):
            while True:
                await realtime.get_run(handle)
                await anyio.sleep(0.02)
    assert redis_server.command("ACL", "LOG") == []


def test_the_rules_name_what_the_scripts_call() -> None:
    called = chain.from_iterable(re.findall(r"\bcall\('(\w+)'", path.read_text()) for path in SCRIPTS.glob("*.lua"))
    assert {f"+{command.lower()}" for command in called} <= set(RULES)
