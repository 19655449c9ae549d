from __future__ import annotations

import multiprocessing
from typing import Any

import anyio
import pytest

from asgi_realtime import hypercorn
from tests.inprocess import make_realtime, until


class Event:
    def __init__(self) -> None:
        self.set = False

    def is_set(self) -> bool:
        return self.set


class Child:
    """A child process of hypercorn's command line, as far as `watch` inspects it."""

    def __init__(self, **kwargs: Any) -> None:
        self._kwargs = kwargs

    def _target(self) -> None: ...

    _target.__module__ = "hypercorn.asyncio.run"


@pytest.fixture
def event(monkeypatch: pytest.MonkeyPatch) -> Event:
    found = Event()
    monkeypatch.setattr(multiprocessing, "current_process", lambda: Child(shutdown_event=found))
    return found


@pytest.mark.anyio
async def test_subscriptions_end_when_hypercorn_stops_its_child(event: Event) -> None:
    realtime = make_realtime()
    assert hypercorn.watch(realtime)
    async with realtime:
        assert not realtime.closing
        event.set = True
        await until(lambda: realtime.closing)
        assert realtime.engine.supervisor is not None  # the lifespan stops it


@pytest.mark.anyio
async def test_after_a_lazy_start_it_stops_too(event: Event) -> None:
    realtime = make_realtime()
    hypercorn.watch(realtime)
    async with realtime.open_run("r"):
        pass
    event.set = True
    await until(lambda: realtime.engine.supervisor is None)


@pytest.mark.anyio
async def test_the_event_is_watched_after_each_start(event: Event) -> None:
    realtime = make_realtime()
    hypercorn.watch(realtime)
    for _ in range(2):
        event.set = False
        async with realtime:
            event.set = True
            await until(lambda: realtime.closing)


@pytest.mark.anyio
async def test_in_any_other_process_it_does_nothing() -> None:
    realtime = make_realtime()
    assert not hypercorn.watch(realtime)
    async with realtime:
        await anyio.wait_all_tasks_blocked()
        assert not realtime.closing


@pytest.mark.parametrize("kwargs", [{}, {"shutdown_event": None}])
def test_a_missing_event_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kwargs: dict[str, Any]
) -> None:
    monkeypatch.setattr(multiprocessing, "current_process", lambda: Child(**kwargs))
    assert not hypercorn.watch(make_realtime())
    assert "hypercorn's shutdown event was not found" in caplog.text
