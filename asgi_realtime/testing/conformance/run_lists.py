"""Lists of runs, for the inspector. A broker need not have them (`brokers.base.RunLists`)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from asgi_realtime.brokers.base import RunLists
from asgi_realtime.testing.conformance.kit import MakeBroker, open_backend

Noted = tuple[str, int, int, bytes]


@asynccontextmanager
async def two_processes(make_broker: MakeBroker) -> AsyncIterator[tuple[RunLists, RunLists]]:
    async with open_backend(make_broker) as backend:
        broker, peer = backend.processes
        if not (isinstance(broker, RunLists) and isinstance(peer, RunLists)):
            pytest.skip("the broker has no lists of runs")
        yield broker, peer


def noted(number: int, *, at: int, version: int = 1, summary: bytes | None = None) -> Noted:
    return f"run_{number}", at, version, b"%d" % number if summary is None else summary


@pytest.mark.anyio
async def test_a_list_retains_the_runs_of_all_processes_that_changed_last(make_broker: MakeBroker) -> None:
    async with two_processes(make_broker) as (broker, peer):
        await broker.note_runs("recent", [noted(number, at=number) for number in (3, 1, 2)], size=3)
        again = noted(1, at=9, version=2, summary=b"1 again")
        await peer.note_runs("recent", [again, noted(4, at=4)], size=3)
        for process in (broker, peer):
            assert sorted(await process.noted_runs("recent")) == [b"1 again", b"3", b"4"]
            assert await process.noted_runs("failed") == []


@pytest.mark.anyio
async def test_an_older_version_of_a_noted_run_does_not_replace_a_newer_one(make_broker: MakeBroker) -> None:
    """The processes of a run note it at different times."""
    async with two_processes(make_broker) as (broker, peer):
        await broker.note_runs("recent", [noted(1, at=20, version=10, summary=b"new")], size=3)
        await peer.note_runs("recent", [noted(1, at=30, version=9, summary=b"old")], size=3)
        assert await peer.noted_runs("recent") == [b"new"]


@pytest.mark.anyio
async def test_a_list_never_exceeds_its_size(make_broker: MakeBroker) -> None:
    async with two_processes(make_broker) as (broker, peer):
        async with anyio.create_task_group() as group:
            for process, first in ((broker, 0), (peer, 50)):
                for start in range(first, first + 50, 10):
                    runs = [noted(number, at=number) for number in range(start, start + 10)]
                    group.start_soon(lambda process, runs: process.note_runs("recent", runs, size=20), process, runs)
        assert sorted(map(int, await broker.noted_runs("recent"))) == list(range(80, 100))


@pytest.mark.anyio
async def test_a_summary_of_a_run_is_any_bytes(make_broker: MakeBroker) -> None:
    summaries = [b"", b" ", b"1 2", bytes(range(256)), b'{"a":"\xc3\xa4"}']
    async with two_processes(make_broker) as (broker, peer):
        runs = [noted(number, at=0, summary=summary) for number, summary in enumerate(summaries)]
        await broker.note_runs("recent", runs, size=10)
        assert sorted(await peer.noted_runs("recent")) == sorted(summaries)
