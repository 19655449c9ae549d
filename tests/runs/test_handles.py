from __future__ import annotations

import copy
import io
import json
import logging
import pickle
import pprint
from datetime import UTC, datetime
from typing import Any

import anyio
import fastapi
import httpx
import litestar
import msgspec
import pydantic
import pytest
import quart
from pydantic.alias_generators import to_camel

from asgi_realtime import BatchHandle, Realtime, RunHandle, RunRecord, UsageError
from asgi_realtime.core.run_json import run_json
from asgi_realtime.core.runs import RunError, Status
from tests.core.test_run_json import FULL, QUEUED
from tests.inprocess import GUARD_S, make_realtime

pytestmark = pytest.mark.anyio


def with_echo() -> Realtime:
    realtime = make_realtime()

    @realtime.task("echo")
    async def echo(payload: Any) -> Any:
        return payload

    return realtime


async def handles() -> tuple[RunHandle[Any], BatchHandle]:
    async with with_echo() as realtime:
        return await realtime.trigger("echo", 1), await realtime.batch_trigger([("echo", 1), ("echo", 2)])


async def test_a_handle_has_protocol_keys_and_python_attributes() -> None:
    run, batch = await handles()
    assert isinstance(run, dict)
    assert dict(run) == {"id": run.id, "publicAccessToken": run.public_access_token, "isCached": False}
    assert run.is_cached is False
    assert set(batch) == {"id", "publicAccessToken", "isCached", "runs", "runCount"}
    assert batch["runCount"] == len(batch.runs) == 2


async def test_a_handle_is_json() -> None:
    for handle in await handles():
        assert json.loads(json.dumps(handle)) == dict(handle)
        assert msgspec.json.decode(msgspec.json.encode(handle)) == dict(handle)
        assert msgspec.to_builtins(handle) == dict(handle)


async def test_the_repr_hides_the_token() -> None:
    for handle in await handles():
        token = handle.public_access_token
        stream = io.StringIO()
        logger = logging.getLogger("tests.handles")
        shown = logging.StreamHandler(stream)
        logger.addHandler(shown)
        logger.warning("handle %s %r", handle, handle)
        logger.warning("handle", extra={"handle": handle})
        logger.removeHandler(shown)
        texts = [repr(handle), str(handle), f"{handle}", f"{handle!r}", pprint.pformat(handle), repr([handle])]
        for text in (*texts, stream.getvalue()):
            assert token not in text
        assert repr(handle) == f"<{type(handle).__name__} {handle.id}>"


async def test_a_handle_is_a_valid_fastapi_response() -> None:
    realtime = with_echo()
    app = fastapi.FastAPI(lifespan=realtime.lifespan)

    @app.post("/run")
    async def run() -> Any:
        return await realtime.trigger("echo", 1)

    @app.post("/batch")
    async def batch() -> dict[str, Any]:
        return await realtime.batch_trigger([("echo", 1)])

    async with realtime, httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://host") as client:
        body = (await client.post("/run")).json()
        assert set(body) == {"id", "publicAccessToken", "isCached"}
        assert realtime.verify_token(body["publicAccessToken"]).scopes[0] == f"read:runs:{body['id']}"
        body = (await client.post("/batch")).json()
        assert body["runCount"] == 1


async def test_handles_and_records_are_annotations_of_fastapi_routes() -> None:
    """`-> RunHandle` failed at import, and a returned `RunRecord` was a 500."""
    realtime = with_echo()
    run, batch = await handles()
    record = RunRecord(QUEUED)
    returned: list[tuple[Any, Any]] = [
        (RunHandle, run),
        (RunHandle[int], run),
        (BatchHandle, batch),
        (list[RunHandle[int]], [run]),
        (RunRecord, record),
        (None, record),
    ]
    app = fastapi.FastAPI()
    for number, (annotation, value) in enumerate(returned):
        app.get(f"/{number}", response_model=annotation)(lambda value=value: value)
    async with realtime, httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://host") as client:
        for number, (_, value) in enumerate(returned):
            response = await client.get(f"/{number}")
            assert response.json() == (value if isinstance(value, list) else dict(value)), response.text
        paths = (await client.get("/openapi.json")).json()["paths"]
    run_schema, record_schema = (
        paths[path]["get"]["responses"]["200"]["content"]["application/json"]["schema"] for path in ("/0", "/4")
    )
    assert list(run_schema["properties"]) == list(run)
    assert set(record_schema["required"]) == set(dict(record)), "the optional fields of this one are absent"
    error = RunError("E", "m")
    full = [RunRecord(one) for one in (FULL, msgspec.structs.replace(FULL, status=Status.EXPIRED, error=error))]
    assert set(record_schema["properties"]) == {name for one in full for name in dict(one)}


async def test_a_pydantic_model_can_have_a_handle() -> None:
    class Answer(pydantic.BaseModel):
        run: RunHandle[int]

    run, _ = await handles()
    assert Answer(run=run).run is run
    read = Answer.model_validate_json(Answer(run=run).model_dump_json()).run
    assert (type(read), dict(read)) == (RunHandle, dict(run))
    with pytest.raises(pydantic.ValidationError):
        Answer.model_validate({"run": {"id": "run_1"}})


async def test_handles_can_be_pickled_and_copied() -> None:
    realtime = with_echo()
    async with realtime:
        run = await realtime.trigger("echo", 1)
        assert await copy.copy(run).result() == await copy.deepcopy(run).result() == 1
        for handle in (run, await realtime.batch_trigger([("echo", 2)])):
            read = pickle.loads(pickle.dumps(handle))
            assert (type(read), dict(read)) == (type(handle), dict(handle))
            assert handle.public_access_token not in repr(read)
        read = pickle.loads(pickle.dumps(run))
        with pytest.raises(UsageError, match=r"use realtime.result\(handle\)"):
            await read.result()
        assert await realtime.result(read) == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # for Quart
@pytest.mark.parametrize("framework", ["litestar", "quart"])
async def test_routes_of_other_frameworks_return_handles_and_records(framework: str) -> None:
    """Quart raised `TypeError` for a `RunRecord`, and Litestar sent the owner, the token's owner and the trace."""
    realtime = with_echo()
    secretive = msgspec.structs.replace(FULL, owner="me", token_owner="user:1", traceparent="00-1-2-01", thread="t")

    async def run() -> RunHandle[Any]:
        return await realtime.trigger("echo", 1)

    async def batch() -> BatchHandle:
        return await realtime.batch_trigger([("echo", 1)])

    async def record() -> RunRecord:
        return RunRecord(secretive)

    async def records() -> list[RunRecord]:
        return [RunRecord(secretive)]

    routes = {"/run": run, "/batch": batch, "/record": record, "/records": records}
    app: Any
    if framework == "litestar":
        app = litestar.Litestar([litestar.get(path)(route) for path, route in routes.items()], logging_config=None)
    else:
        app = quart.Quart(__name__)
        for path, route in routes.items():
            app.get(path)(route)
    async with realtime, httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://host") as client:
        found = {path: (await client.get(path)).json() for path in routes}
        if framework == "litestar":
            schema = (await client.get("/schema/openapi.json")).json()
            assert set(schema["paths"]) == set(routes)
    assert set(found["/run"]) == {"id", "publicAccessToken", "isCached"}
    assert found["/batch"]["runCount"] == 1
    assert found["/record"] == json.loads(run_json(secretive))
    assert found["/records"] == [found["/record"]]


async def test_records_can_be_pickled_and_copied() -> None:
    async with with_echo() as realtime:
        handle = await realtime.trigger("echo", 1, tags=["user:1"], metadata={"a": 1})
        await handle.result()
        record = await realtime.get_run(handle)
    for made in (copy.copy(record), copy.deepcopy(record), pickle.loads(pickle.dumps(record))):
        assert made == record
        assert (type(made), made.status, made.version) == (RunRecord, Status.COMPLETED, record.version)
        assert (made.output, made.metadata) == (1, {"a": 1})


def test_the_attributes_of_a_record_are_its_values_in_python() -> None:
    full = RunRecord(msgspec.structs.replace(FULL, error=RunError("E", "m"), completed_at_ms=1_500))
    assert {name: getattr(full, name) for name in ("id", "task", "payload", "output", "metadata", "ttl")} == {
        "id": full["id"],
        "task": full["taskIdentifier"],
        "payload": full["payload"],
        "output": full["output"],
        "metadata": full["metadata"],
        "ttl": full["ttl"],
    }
    assert full.finished_at == datetime.fromtimestamp(1.5, UTC)
    for name in ("created_at", "updated_at", "started_at", "delayed_until"):
        assert getattr(full, name) == datetime.fromisoformat(full[to_camel(name)])
    for name in ("is_queued", "is_executing", "is_completed", "is_success", "is_failed", "depth", "duration_ms"):
        assert getattr(full, name) == full[to_camel(name)]
    assert (full.is_canceled, full.tags, full.streams) == (False, ("a", "b"), ("default",))
    assert (full.error, full.idempotency_key) == (RunError("E", "m"), full["idempotencyKey"])
    assert full.batch is not None and full.batch.id == full["batchId"]
    assert (full.thread, full.parent_id, full.root_id, full.max_duration_s) == (None, None, None, None)
    empty = RunRecord(QUEUED)
    assert (empty.payload, empty.output, empty.error, empty.started_at) == (None, None, None, None)
    assert (empty.cancel_requested_at, empty.batch) == (None, None)
    assert repr(full) == str(full) == f"<RunRecord {full.id} COMPLETED>"


async def test_the_token_reads_the_run_and_writes_its_inputs_only() -> None:
    realtime = with_echo()
    async with realtime:
        handle = await realtime.trigger("echo", 1, token_expires_in="2m")
        claims = realtime.verify_token(handle.public_access_token)
    assert claims.scopes == (f"read:runs:{handle.id}", f"write:inputStreams:{handle.id}")
    assert 0 < claims.expires_at - realtime.clock() <= 121


async def test_the_token_lasts_one_hour_by_default() -> None:
    realtime = with_echo()
    async with realtime:
        handle = await realtime.trigger("echo", 1)
        claims = realtime.verify_token(handle.public_access_token)
    assert 3590 < claims.expires_at - realtime.clock() <= 3601


async def test_a_batch_handle_waits_for_all_results() -> None:
    realtime = with_echo()
    async with realtime:
        batch = await realtime.batch_trigger([("echo", number) for number in range(3)])
        assert await batch.results(timeout=GUARD_S) == [0, 1, 2]


async def test_the_timeout_of_a_batch_is_for_all_runs_and_says_how_many_ended() -> None:
    realtime = with_echo()

    @realtime.task("endless")
    async def endless() -> None:
        await anyio.sleep_forever()

    async with realtime:
        batch = await realtime.batch_trigger([("echo", 1), (endless, None), (endless, None)])
        await realtime.result(batch.runs[0], timeout=GUARD_S)
        with pytest.raises(TimeoutError) as caught:
            await batch.results(timeout=0.05)
        words = f"1 of 3 runs of batch '{batch.id}' have ended within 0.05 s; the others continue"
        assert str(caught.value) == words
        for run_id in batch.runs:
            await realtime.cancel(run_id)
