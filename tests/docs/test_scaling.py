"""The claims of docs/scaling.md about Redis, checked with a real Redis."""

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
from tests.inprocess import GUARD_S
from tests.redis_servers import RedisServer

RULES = blocks("acl")["rules"].text.split()
SCRIPTS = Path(asgi_realtime.brokers.redis.__file__).parent / "lua"


@pytest.mark.redis
@pytest.mark.asyncio
async def test_the_documented_rules_are_sufficient(redis_server: RedisServer) -> None:
    url = redis_server.add_user("app", "secret", *RULES)
    timeouts = Timeouts(tick=0.02, lease=4, append=3)
    retention = Retention(after_end=2, stream_bytes=1000)
    async with Realtime(
        secret_key=SECRET, signals=False, broker=url, timeouts=timeouts, retention=retention
    ) as realtime:

        @realtime.task("t")
        async def task(count: int) -> int:
            for number in range(count):
                await realtime.append([number, "x" * 100])
            await anyio.sleep(timeouts.lease / 2)  # long enough to be renewed
            return count

        handle = await realtime.trigger(task, 40, tags=["a"], idempotency_key="key", delay=0.05)
        assert await handle.result(timeout=GUARD_S) == 40
        await realtime.broker.ping()
        with anyio.fail_after(GUARD_S), pytest.raises(RunNotFound):
            while True:
                await realtime.get_run(handle)
                await anyio.sleep(0.02)
    assert redis_server.command("ACL", "LOG") == []


def test_the_rules_include_the_commands_of_the_scripts() -> None:
    called = chain.from_iterable(re.findall(r"\bcall\('(\w+)'", path.read_text()) for path in SCRIPTS.glob("*.lua"))
    assert {f"+{command.lower()}" for command in called} <= set(RULES)
