"""Chat frontends on Redis, where this process holds only the newest part of a stream and reads the rest."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from typing import Any

import pytest

from asgi_realtime import Limits, Realtime
from asgi_realtime.brokers.redis import RedisBroker
from asgi_realtime.testing import EventParser
from tests.faults import SECRET

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

WORDS = [f"w{number} " for number in range(600)]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def realtime(redis_url: str) -> AsyncIterator[Realtime]:
    broker = RedisBroker(redis_url, prefix=f"t{secrets.token_hex(4)}", limits=Limits(mirror_bytes=5000))
    async with Realtime(secret_key=SECRET, signals=False, broker=broker) as realtime:
        yield realtime


async def write(realtime: Realtime, *chunks: Any) -> None:
    async with realtime.open_run("chat", run_id="run_1"), realtime.writer() as writer:
        for chunk in chunks:
            await writer.write(chunk)


async def read(realtime: Realtime, protocol: Any, last_event_id: int | None = None) -> list[tuple[Any, str | None]]:
    id = None if last_event_id is None else str(last_event_id)
    response = realtime.response("run_1", protocol=protocol, last_event_id=id)
    parser = EventParser()
    events = [event for body in [body async for body in response] for event in parser.feed(body)]
    return [(json.loads(event.data), event.id) for event in events if event.data != "[DONE]"]


@pytest.mark.parametrize("protocol", ["ai-sdk", "ag-ui"])
async def test_a_late_reader_gets_everything_and_resumes_anywhere(realtime: Realtime, protocol: str) -> None:
    await write(realtime, *WORDS)
    whole = await read(realtime, protocol)
    assert "".join(event.get("delta", "") for event, _ in whole) == "".join(WORDS)
    assert len(whole) < 20, "stored deltas are joined"
    for position in (0, 311, 598):
        rest = await read(realtime, protocol, position)
        assert "".join(event.get("delta", "") for event, _ in rest) == "".join(WORDS[position + 1 :])
        assert rest[-2:] == whole[-2:]
        assert rest[0][0]["type"] not in ("start", "RUN_STARTED", "text-start", "TEXT_MESSAGE_START")


async def test_an_old_chunk_that_is_no_part_ends_with_an_error(realtime: Realtime) -> None:
    await write(realtime, *WORDS[:50], {"choices": []}, *WORDS[50:])
    events = [event for event, _ in await read(realtime, "ai-sdk")]
    assert "".join(event.get("delta", "") for event in events) == "".join(WORDS[:50])
    assert events[-1]["type"] == "error"
