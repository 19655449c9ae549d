"""Reads events of streams and feeds."""

from __future__ import annotations

import json
from typing import Any

from asgi_realtime.testing import AsgiClient, Event
from tests.asgi.fake_host import FakeHost


def kinds(events: list[Event]) -> list[str]:
    return [event.event for event in events]


def chunks(events: list[Event]) -> list[Any]:
    return [json.loads(event.data) for event in events if event.event == "message"]


def runs(events: list[Event]) -> list[str]:
    """The ids in the `run` events."""
    return [json.loads(event.data)["id"] for event in events if event.event == "run"]


def statuses(events: list[Event]) -> list[str]:
    return [json.loads(event.data)["status"] for event in events if event.event == "run"]


async def tag_snapshot(host: FakeHost, tags: str, scope: str = "read:runs", **query: str) -> list[Event]:
    headers = host.feed_headers(scope)
    async with AsgiClient(host).stream("/v1/runs", headers=headers, query={"tags": tags, **query}) as response:
        assert response.status_code == 200, await response.read()
        return await response.read_until("ready")
