"""The samples and tables of docs/protocol.md match what the app sends.

Values that differ from run to run are normalized on both sides: run ids, epochs, the random delay of `reconnect`.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from asgi_realtime import Cors, Realtime, Retention, Run, RunHandle, TaskError
from asgi_realtime.asgi.cors import EXPOSED, METHODS
from asgi_realtime.asgi.trigger_dev import shapes
from asgi_realtime.core import errors
from asgi_realtime.core.runs import END_REASONS, Status
from asgi_realtime.testing import AsgiClient, Response
from tests.docs.blocks import ROOT, blocks

SECRET = "a secret that is long enough for the tests"
NOW = 1_768_469_400.0  # 2026-01-15T09:30:00Z
ADMIN = {"authorization": f"Bearer {SECRET}"}
FEED = {**ADMIN, "accept": "text/event-stream"}

SAMPLES = blocks("sample")
PROTOCOL = (ROOT / "docs/protocol.md").read_text("utf-8")


class WaitingExecutor:
    """Executes nothing, so that a test sees a QUEUED run."""

    async def enqueue(self, run_id: str, task_id: str) -> None:
        return None


def make(**settings: Any) -> Realtime:
    return Realtime(secret_key=SECRET, signals=False, clock=lambda: NOW, **settings)


def normalize(text: str) -> str:
    text = re.sub(r"(run|batch)_[0-9a-f]{26}", r"\1_", text)
    text = re.sub(r"^((?:electric-handle|id): )[0-9a-f]{8}\.", r"\1epoch.", text, flags=re.MULTILINE)
    text = re.sub(r'^(.*"value":\{"id":"run_"),.*(\},"headers":.*)$', r"\1, …\2", text, flags=re.MULTILINE)
    text = re.sub(r"^(electric-offset: )\d+_0$", r"\1n_0", text, flags=re.MULTILINE)
    text = re.sub(r"^(data: \{\"id\":\"run_\",\"status\":\"\w+\"),.*$", r"\1, …}", text, flags=re.MULTILINE)
    text = re.sub(r'("sentAt":)\d+', r"\1ms", text)
    return re.sub(r"^(retry: |data: \{\"retry\":)(?!1000$)\d+", r"\1ms", text, flags=re.MULTILINE)


async def body(realtime: Realtime, path: str) -> str:
    """The complete body of a stream that ends."""
    return (await AsgiClient(realtime).get(path, headers=ADMIN)).body.decode()


async def ended_run(realtime: Realtime, *chunks: Any) -> str:
    async with realtime.open_run("sample") as run:
        for chunk in chunks:
            await realtime.append(chunk)
    return run.id


async def stream() -> str:
    async with make() as realtime:
        run_id = await ended_run(realtime, "Hel", {"token": "lo"})
        return await body(realtime, f"/v1/streams/{run_id}/default")


async def unwritten() -> str:
    async with make() as realtime, realtime.open_run("sample") as run:
        await realtime.append("x")
        path = f"/v1/streams/{run.id}/defualt"
        async with AsgiClient(realtime).stream(path, headers=ADMIN) as response:
            return (await response.chunk()).decode()


async def failed() -> str:
    async with make() as realtime:
        try:
            async with realtime.open_run("sample") as run:
                await realtime.append("x")
                raise TaskError("no luck")
        except TaskError:
            pass
        return (await body(realtime, f"/v1/streams/{run.id}/default"))[-len(SAMPLES["failed"].text) :]


async def gap() -> str:
    async with make(retention=Retention(stream_bytes=90)) as realtime:
        run_id = await ended_run(realtime, *range(20))
        text = await body(realtime, f"/v1/streams/{run_id}/default")
        assert "id: 15\ndata: 15\n\n" in text
        return text[text.index("event: gap") : text.index("id: 15")]


async def executed_elsewhere(realtime: Realtime) -> str:
    """A run of another process: the shutdown does not wait for it."""
    record = realtime.tasks.records.new_open_run("sample", {}).record
    await realtime.runs.create(record)
    return record.id


async def reconnect() -> str:
    async with make() as realtime:
        path = f"/v1/streams/{await executed_elsewhere(realtime)}/default"
        async with AsgiClient(realtime).stream(path, headers=ADMIN) as response:
            await response.chunk()
            realtime.begin_shutdown()
            return (await response.read()).decode()


OFFICIAL = {**ADMIN, "trigger-version": "4.8.3"}


async def chat_of(protocol: str) -> str:
    async with make() as realtime:
        run_id = await ended_run(realtime, "Hel", "lo")
        return await body(realtime, f"/v1/streams/{run_id}/default?protocol={protocol}")


async def ai_sdk() -> str:
    return await chat_of("ai-sdk")


async def ag_ui() -> str:
    return await chat_of("ag-ui")


async def batches() -> str:
    async with make() as realtime:
        run_id = await ended_run(realtime, "Hel", {"token": "lo"})
        path = f"/v1/streams/{run_id}/default"
        answer = await AsgiClient(realtime).get(path, headers=OFFICIAL)
        assert answer.headers["x-stream-version"] == "v2"
        return answer.body.decode()


async def interrupted() -> str:
    async with make() as realtime:
        path = f"/v1/streams/{await executed_elsewhere(realtime)}/default"
        async with AsgiClient(realtime).stream(path, headers=OFFICIAL) as response:
            await response.chunk()
            realtime.begin_shutdown()
            return (await response.read()).decode()


async def shape() -> str:
    async with make(executor=WaitingExecutor()) as realtime:

        @realtime.task("sample")
        async def sample() -> None: ...

        run = await realtime.trigger(sample)
        path, query = f"/v1/runs/{run.id}", {"offset": "-1", "live": "true"}
        answer = await AsgiClient(realtime).get(path, headers=ADMIN, query=query)
        names = ("cache-control", "content-type", *(name for name in answer.headers if name.startswith("electric-")))
        head = "".join(f"{name}: {answer.headers[name]}\n" for name in names)
        return f"HTTP/1.1 {answer.status_code}\n{head}\n{answer.body.decode()}\n"


async def refetch() -> str:
    async with chatted() as (realtime, handle):
        path, query = f"/v1/runs/{handle.id}", {"offset": "7_0", "handle": "9f3c01d2.0"}
        answer = await AsgiClient(realtime).get(path, headers=ADMIN, query=query)
        assert answer.status_code == 409
        return answer.body.decode()


async def feed() -> str:
    async with make(executor=WaitingExecutor()) as realtime:
        gate = anyio.Event()

        @realtime.task("sample")
        async def sample() -> None:
            await gate.wait()

        run = await realtime.trigger(sample)
        async with AsgiClient(realtime).stream(f"/v1/runs/{run.id}", headers=FEED) as response:
            parts = [await response.chunk(), await response.chunk()]
            async with anyio.create_task_group() as group:
                group.start_soon(realtime.execute, run.id)
                parts.append(await response.chunk())
                gate.set()
                parts.append(await response.read())
        return b"".join(parts).decode()


@asynccontextmanager
async def chatted() -> AsyncIterator[tuple[Realtime, RunHandle[dict[str, str]]]]:
    async with make() as realtime:

        @realtime.task("chat")
        async def chat(payload: dict[str, str], run: Run) -> dict[str, str]:
            run.metadata.set("progress", 0.5)
            await realtime.append("Hi")
            return {"text": "Hi"}

        run = await realtime.trigger(chat, {"text": "Hello"}, tags=["user:1"])
        await run.result()
        yield realtime, run


async def run() -> str:
    async with chatted() as (realtime, handle):
        return await body(realtime, f"/api/v3/runs/{handle.id}")


async def input() -> str:
    async with make() as realtime, realtime.open_run("sample") as run:
        path = f"/v1/streams/{run.id}/input/approval"
        answer = await AsgiClient(realtime).post(path, headers=ADMIN, body=b'{"data": "yes"}')
        assert await run.input("approval").get() == "yes"
        return answer.body.decode()


async def cancel() -> str:
    async with chatted() as (realtime, handle):
        answer = await AsgiClient(realtime).post(f"/api/v2/runs/{handle.id}/cancel", headers=ADMIN)
        return answer.body.decode()


async def post(realtime: Realtime, method: str, path: str, body: bytes) -> Response:
    answer = await AsgiClient(realtime).request(method, path, headers=ADMIN, body=body)
    assert answer.status_code in (200, 202), answer.body
    return answer


async def triggered() -> str:
    async with chatted() as (realtime, _):
        body = b'{"payload": {"text": "Hello"}, "options": {"tags": ["user:1"], "ttl": "10m"}}'
        answer = await post(realtime, "POST", "/api/v1/tasks/chat/trigger", body)
        assert realtime.verify_token(answer.headers["x-trigger-jwt"]).expires_at == NOW + 3600
        return answer.body.decode()


@asynccontextmanager
async def batched() -> AsyncIterator[tuple[Realtime, str, Response]]:
    async with chatted() as (realtime, _):
        created = await post(realtime, "POST", "/api/v3/batches", b'{"runCount": 2, "taskIdentifiers": ["chat"]}')
        yield realtime, json.loads(created.body)["id"], created


ITEMS = b"".join(b'{"index": %d, "task": "chat", "payload": {"text": "Hello"}}\n' % index for index in range(2))


async def batch() -> str:
    async with batched() as (_, _, created):
        return created.body.decode()


async def filled() -> str:
    async with batched() as (realtime, batch_id, _):
        return (await post(realtime, "POST", f"/api/v3/batches/{batch_id}/items", ITEMS)).body.decode()


async def retrieved() -> str:
    async with batched() as (realtime, batch_id, _):
        await post(realtime, "POST", f"/api/v3/batches/{batch_id}/items", ITEMS)
        assert len([record async for record in realtime.subscribe_to_batch(batch_id) if record.is_completed]) == 2
        return await body(realtime, f"/api/v2/batches/{batch_id}")


async def metadata() -> str:
    async with make() as realtime, realtime.open_run("sample", metadata={"progress": 0.5}) as run:
        operations = {
            "operations": [
                {"type": "set", "key": "status", "value": "reading"},
                {"type": "increment", "key": "pages", "value": 1},
            ],
            "parentOperations": [],
            "rootOperations": [{"type": "append", "key": "log", "value": "one"}],
        }
        path = f"/api/v1/runs/{run.id}/metadata"
        return (await post(realtime, "PUT", path, json.dumps(operations).encode())).body.decode()


async def claims() -> str:
    async with make() as realtime:
        return (await post(realtime, "POST", "/api/v1/auth/jwt/claims", b"")).body.decode()


async def health() -> str:
    async with make() as realtime:
        return (await AsgiClient(realtime).get("/v1/health")).body.decode()


async def probe() -> str:
    async with (
        make() as realtime,
        AsgiClient(realtime).stream("/v1/health", headers={"accept": "text/event-stream"}) as response,
    ):
        await response.chunk()  # the comment
        return (await response.chunk()).decode()


async def forbidden() -> str:
    async with chatted() as (realtime, handle):
        token = realtime.create_public_token(scopes={"read": {"runs": ["run_1"]}})
        answer = await AsgiClient(realtime).get(f"/api/v3/runs/{handle.id}", query={"access_token": token})
        assert answer.status_code == 403
        return answer.body.decode()


ACTUAL: dict[str, Callable[[], Awaitable[str]]] = {
    sample.__name__: sample
    for sample in (
        *(stream, unwritten, failed, gap, reconnect, batches, interrupted, ai_sdk, ag_ui),
        *(feed, shape, refetch, run, input),
        *(cancel, health, probe, forbidden, triggered, batch, filled, retrieved, metadata, claims),
    )
}


def test_every_sample_is_compared() -> None:
    assert set(ACTUAL) == set(SAMPLES)


@pytest.mark.asyncio
@pytest.mark.parametrize("name", SAMPLES)
async def test_sample(name: str) -> None:
    actual, printed = normalize(await ACTUAL[name]()), normalize(SAMPLES[name].text)
    if SAMPLES[name].language == "json":
        assert json.loads(actual) == json.loads(printed)
        assert list(json.loads(actual)) == list(json.loads(printed))  # the order of the fields
    else:
        assert actual == printed


# Tables


def section(number: int) -> str:
    return PROTOCOL.partition(f"\n## {number}. ")[2].partition("\n## ")[0]


def test_the_table_of_errors_has_the_status_of_each_code() -> None:
    rows = set(re.findall(r"^\| (\d{3}) \| `(\w+)` \|", section(10), re.MULTILINE))
    raised: list[type[errors.RealtimeError]] = [
        errors.InvalidRequest,
        errors.InvalidToken,
        errors.ExpiredToken,
        errors.ScopeDenied,
        errors.RunNotFound,
        errors.RunKeptElsewhere,
    ]
    raised += [errors.UsageError, errors.RealtimeError, errors.BrokerUnavailable, errors.ServerShutdown]
    raised += [errors.AuthorizeFailed]
    raised += [errors.StreamGap, errors.StreamLost, errors.RequestCutOff, errors.ThreadBusy]
    raised += [errors.UnknownTask, errors.InvalidPayload, errors.TokenSpent]
    expected = {(str(error.status), error.code) for error in raised}
    expected |= {(status, errors.LimitExceeded.code) for status in ("413", "414", "422", "429", "503")}
    expected |= {("404", "not_found"), ("405", "method_not_allowed"), ("408", "silent")}
    expected |= {("503", errors.ProducerGap.code)}
    assert rows == expected


@pytest.mark.asyncio
async def test_errors_of_the_router() -> None:
    async with chatted() as (realtime, handle):
        for method, path, status, code in (
            ("GET", "/v2/runs", 404, "not_found"),
            ("PATCH", "/v1/runs", 405, "method_not_allowed"),
            ("GET", f"/v1/runs/{handle.id}", 400, "invalid_request"),
        ):
            answer = await AsgiClient(realtime).request(method, path, headers=ADMIN)
            assert (answer.status_code, json.loads(answer.body)["code"]) == (status, code)


def test_all_end_reasons_are_documented() -> None:
    reasons = set(re.findall(r"^\| `(\w+)` \|", section(4), re.MULTILINE))
    assert reasons - {"reason"} == {*END_REASONS.values(), "token_expired", "lost"}


def test_all_statuses_are_documented() -> None:
    row = next(line for line in section(6).splitlines() if line.startswith("| `status` |"))
    assert set(re.findall(r"`([A-Z_]+)`", row)) == set(Status)


def test_all_columns_are_documented() -> None:
    table = section(5).partition("### 5.2")[2].partition("| column |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines()[1:]))) == set(
        json.loads(shapes.schema())
    )
    statuses = next(line for line in table.splitlines() if line.startswith("| `status` |"))
    assert set(re.findall(r"`([A-Z_]+)`", statuses)) == set(shapes.WIRE_STATUS.values())


def test_cors_headers_are_documented() -> None:
    text = section(11)
    assert {f"`{name}`" for name in EXPOSED.decode().split(", ")} <= set(re.findall(r"`[\w-]+`", text))
    assert f"`{METHODS.decode()}`" in text
    assert f"`Access-Control-Max-Age: {Cors().max_age}`" in text


@pytest.mark.asyncio
@pytest.mark.parametrize("prefix", ["", "/realtime", "/realtime/realtime"])
async def test_documented_routes_exist(prefix: str) -> None:
    rows = re.findall(r"^\| `(GET|HEAD|POST|PUT) (/[^`?]+)(\?[^`]*)?` \|", section(1), re.MULTILINE)
    assert len(rows) == 26
    async with make() as realtime:
        for method, path, _ in rows:
            full_path = prefix + re.sub(r"\{\w+\}", "x", path)
            answer = await AsgiClient(realtime).request(method, full_path)
            is_off = path == "/v1/metrics" or path.startswith("/inspect")
            assert answer.status_code == (200 if path == "/v1/health" else 404 if is_off else 401), full_path
