"""An app whose types are checked: strict mypy and pyright accept it, and each `assert_type` holds."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import assert_type

from fastapi import FastAPI

from asgi_realtime import BatchHandle, Realtime, Run, RunEnd, RunHandle, RunRecord, TypedStream

realtime = Realtime(secret_key=os.environ["REALTIME_SECRET_KEY"])
app = FastAPI(lifespan=realtime.lifespan)
app.mount("/realtime", realtime)


@dataclass
class Report:
    title: str
    pages: int = 1


rows: TypedStream[Report] = realtime.define_stream("rows", Report)


async def words() -> AsyncIterator[str]:
    for word in ("a", "b"):
        yield word


async def save(end: RunEnd) -> None:
    assert_type(end.run, RunRecord)


@realtime.task("report", on_end=save)
async def report(payload: Report, run: Run) -> list[str]:
    run.metadata.set("title", payload.title)
    await rows.append(payload)
    found = [word async for word in realtime.pipe(words())]
    assert_type(found, list[str])
    return found


@realtime.task("typed_run")
async def typed_run(run: Run[Report]) -> int:
    assert_type(run.payload, Report)
    return run.payload.pages


@realtime.task("any_run")
def any_run(run: Run) -> None:
    assert_type(run.payload, object)


@realtime.task("crunch")
def crunch(rows: int) -> float:
    return rows / 2


@app.post("/reports")
async def start(title: str) -> RunHandle[list[str]]:
    return await realtime.trigger(report, Report(title))


@app.post("/batches")
async def start_many(title: str) -> BatchHandle:
    return await realtime.batch_trigger([(report, Report(title)), (crunch, 3)])


@app.get("/reports/{run_id}")
async def read(run_id: str) -> RunRecord:
    return await realtime.get_run(run_id)


async def calls() -> None:
    assert_type(await report(Report("a"), await opened()), list[str])
    assert_type(crunch(3), float)
    asyncio.create_task(typed_run(await opened_with(Report("a"))))

    handle = await realtime.trigger(report, Report("a"))
    assert_type(handle, RunHandle[list[str]])
    assert_type(await handle.result(), list[str])
    assert_type(await realtime.result(handle), list[str])
    assert_type(await realtime.result(await realtime.trigger(crunch, 3)), float)
    async for row in rows.read(handle):
        assert_type(row, Report)
    async for record in realtime.subscribe_to_run(handle):
        assert_type(record, RunRecord)


def blocking_calls() -> None:
    handle = realtime.sync.trigger(report, Report("a"))
    assert_type(handle, RunHandle[list[str]])
    assert_type(realtime.sync.result(handle), list[str])
    assert_type(list(realtime.sync.pipe(["a"])), list[str])


async def opened() -> Run:
    async with realtime.open_run("import") as run:
        return run


async def opened_with(report: Report) -> Run[Report]:
    raise NotImplementedError
