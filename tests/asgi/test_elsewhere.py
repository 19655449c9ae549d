"""Requests for a run that another worker has in its own memory: the error says why it is not found."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

from asgi_realtime import Realtime
from asgi_realtime.asgi.app import KEPT_ELSEWHERE
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.runs.handles import RunHandle
from asgi_realtime.testing import AsgiClient
from tests.asgi.official_sdk import on_one_loop
from tests.inprocess import GUARD_S, SECRET, make_realtime

pytestmark = pytest.mark.anyio

REFUSED = {"error": KEPT_ELSEWHERE, "code": "run_kept_elsewhere"}


async def refused(realtime: Realtime, method: str, path: str, token: str) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {token}", "accept": "text/event-stream"}
    response = await AsgiClient(realtime).request(method, path, headers=headers)
    assert response.status_code == 404
    answer: dict[str, Any] = json.loads(response.body)
    return answer


async def finished(realtime: Realtime) -> RunHandle[Any]:
    pipe = realtime.pipe([1, 2])
    await pipe.wait_until_complete()
    return pipe.handle


@on_one_loop
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/streams/{}/default"),
        ("GET", "/v1/runs/{}"),
        ("GET", "/api/v3/runs/{}"),
        ("GET", "/v1/streams/{}/input/answer"),
    ],
)
async def test_a_run_of_another_worker_is_404_at_once_with_the_reason(method: str, path: str) -> None:
    """The request waited for the run and then said "no run", so users searched for a wrong id."""
    async with make_realtime() as first, make_realtime() as second:
        handle = await finished(first)
        with anyio.fail_after(GUARD_S / 2):  # less than `timeouts.find`
            assert await refused(second, method, path.format(handle.id), handle.public_access_token) == REFUSED
        answered = await refused(first, method, path.format("run_unknown"), SECRET)
        assert answered["code"] == "run_not_found"


async def test_the_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async with make_realtime() as first, make_realtime() as second:
        handle = await finished(first)
        for _ in range(3):
            await refused(second, "GET", f"/v1/runs/{handle.id}", handle.public_access_token)
    assert caplog.text.count("run not found in this worker") == 1


async def test_a_run_of_this_worker_can_be_read_with_a_token_from_another() -> None:
    """After a restart on the same broker, and if another process created the token."""
    broker = MemoryBroker()
    async with make_realtime(broker=broker) as first:
        handle = await finished(first)
    foreign = make_realtime().create_public_token(scopes={"read": {"runs": [handle.id]}})
    async with make_realtime(broker=broker) as again:
        for token in (handle.public_access_token, foreign):
            headers = {"authorization": f"Bearer {token}"}
            response = await AsgiClient(again).get(f"/v1/streams/{handle.id}/default", headers=headers)
            assert response.status_code == 200


async def test_an_expired_run_of_this_worker_is_not_reported_as_elsewhere() -> None:
    async with make_realtime() as realtime:
        handle = await finished(realtime)
        await realtime.broker.remove(handle.id)
        for path in (f"/api/v3/runs/{handle.id}", f"/v1/streams/{handle.id}/default"):
            headers = {"authorization": f"Bearer {realtime.create_public_token(scopes={'read': {'tags': ['x']}})}"}
            response = await AsgiClient(realtime).get(path, headers=headers)
            assert json.loads(response.body)["code"] == "run_not_found"
