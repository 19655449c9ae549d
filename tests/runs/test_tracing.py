from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from asgi_realtime import Realtime, TaskError
from asgi_realtime.brokers.redis import RedisBroker
from asgi_realtime.core.run_record import RunRecord
from asgi_realtime.testing import AsgiClient
from tests.inprocess import SECRET, ended, make_realtime, until

pytestmark = pytest.mark.anyio

TRACER = "tests"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What a host sets up once: a provider that records spans."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return exporter


def span_of(exporter: InMemorySpanExporter, name: str) -> ReadableSpan:
    (span,) = [span for span in exporter.get_finished_spans() if span.name == name]
    return span


def is_child(span: ReadableSpan, parent: ReadableSpan) -> bool:
    assert span.context is not None and parent.context is not None
    assert span.context.trace_id == parent.context.trace_id
    return span.parent is not None and bool(span.parent.span_id == parent.context.span_id)


async def words() -> AsyncIterator[str]:
    with trace.get_tracer(TRACER).start_as_current_span("read the source"):
        yield "a"


async def test_a_run_continues_the_trace_of_its_trigger(exporter: InMemorySpanExporter) -> None:
    realtime = make_realtime()

    @realtime.task("chat")
    async def chat() -> None:
        with trace.get_tracer(TRACER).start_as_current_span("call the model"):
            pass

    async with realtime:
        with trace.get_tracer(TRACER).start_as_current_span("POST /chat"):
            run = await realtime.trigger(chat)
        await ended(realtime, run)
        await until(lambda: not realtime.engine.executions)
    found = span_of(exporter, "run chat")
    assert is_child(found, span_of(exporter, "POST /chat"))
    assert is_child(span_of(exporter, "call the model"), found)
    assert found.kind is SpanKind.CONSUMER
    assert found.attributes == {
        "asgi_realtime.run.id": run.id,
        "asgi_realtime.run.task": "chat",
        "asgi_realtime.run.status": "COMPLETED",
    }
    assert found.status.status_code is StatusCode.UNSET


async def test_a_run_in_a_run_is_its_child(exporter: InMemorySpanExporter) -> None:
    realtime = make_realtime()

    @realtime.task("child")
    def child() -> None:
        trace.get_tracer(TRACER).start_span("in a thread").end()

    @realtime.task("parent")
    async def parent() -> None:
        await (await realtime.trigger(child)).result()

    async with realtime:
        await ended(realtime, await realtime.trigger(parent))
        await until(lambda: not realtime.engine.executions)
    assert span_of(exporter, "run parent").parent is None
    assert is_child(span_of(exporter, "run child"), span_of(exporter, "run parent"))
    assert is_child(span_of(exporter, "in a thread"), span_of(exporter, "run child"))


async def test_open_runs_and_pipes_have_spans(exporter: InMemorySpanExporter) -> None:
    realtime = make_realtime()
    async with realtime:
        with trace.get_tracer(TRACER).start_as_current_span("request"):
            async with realtime.open_run("opened"):
                trace.get_tracer(TRACER).start_span("inside").end()
            trace.get_tracer(TRACER).start_span("after").end()
            pipe = realtime.pipe(words())
        await pipe.wait_until_complete()
        await until(lambda: not realtime.engine.executions)
    request = span_of(exporter, "request")
    assert is_child(span_of(exporter, "run opened"), request)
    assert is_child(span_of(exporter, "inside"), span_of(exporter, "run opened"))
    assert is_child(span_of(exporter, "after"), request)
    assert is_child(span_of(exporter, "run pipe"), request)
    assert is_child(span_of(exporter, "read the source"), span_of(exporter, "run pipe"))


async def test_a_failed_run_is_an_error(exporter: InMemorySpanExporter) -> None:
    realtime = make_realtime()

    @realtime.task("fails")
    async def fails() -> None:
        raise TaskError("no")

    @realtime.task("stuck")
    async def stuck() -> None:
        await anyio.sleep_forever()

    async with realtime:
        await ended(realtime, await realtime.trigger(fails))
        run = await realtime.trigger(stuck)
        await until(lambda: run.id in realtime.engine.executions)
        await realtime.cancel(run)
        await ended(realtime, run)
        await until(lambda: not realtime.engine.executions)
    failed, canceled = span_of(exporter, "run fails"), span_of(exporter, "run stuck")
    assert (failed.status.status_code, failed.status.description) == (StatusCode.ERROR, "TaskError")
    assert [event.name for event in failed.events] == ["exception"]
    assert canceled.status.status_code is StatusCode.UNSET
    assert canceled.attributes is not None and canceled.attributes["asgi_realtime.run.status"] == "CANCELED"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_open_run_can_be_left_in_another_task(
    exporter: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    realtime = make_realtime()
    async with realtime:
        opened = realtime.open_run("opened")
        async with anyio.create_task_group() as group:
            group.start_soon(opened.__aenter__)
        await opened.__aexit__(None, None, None)
    span_of(exporter, "run opened")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_subscribers_do_not_see_the_position_in_the_trace(exporter: InMemorySpanExporter) -> None:
    realtime = make_realtime()
    async with realtime:
        with trace.get_tracer(TRACER).start_as_current_span("request") as span:
            async with realtime.open_run("opened") as run:
                pass
        record = await realtime.runs.get(run.id)
        trace_id = f"{span.get_span_context().trace_id:032x}"
        assert (record.traceparent or "").startswith(f"00-{trace_id}-{span.get_span_context().span_id:016x}-")
        client = AsgiClient(realtime, token=SECRET)
        bodies = [(await client.get(path)).text for path in (f"/v1/runs/{run.id}", f"/api/v3/runs/{run.id}")]
        async with client.stream(f"/v1/runs/{run.id}") as feed:
            bodies.append((await feed.read()).decode())
    assert all(run.id in body and trace_id not in body for body in [*bodies[1:], str(RunRecord(record))])


class _Elsewhere:
    """An executor whose worker is another process."""

    async def enqueue(self, run_id: str, task_id: str) -> None:
        pass


class _Instrumented:
    """An app behind a middleware that does what `opentelemetry-instrumentation-asgi` does."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        carrier = {name.decode(): value.decode() for name, value in scope["headers"]}
        context = TraceContextTextMapPropagator().extract(carrier)
        with trace.get_tracer(TRACER).start_as_current_span("POST", context=context, kind=SpanKind.SERVER):
            await self._app(scope, receive, send)


@pytest.mark.slow
@pytest.mark.redis
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_trace_of_a_request_leads_to_the_run_in_another_worker(
    exporter: InMemorySpanExporter, redis_url: str
) -> None:
    prefix = "tracing-workers"
    realtime = Realtime(
        secret_key=SECRET, broker=RedisBroker(redis_url, prefix=prefix), executor=_Elsewhere(), signals=False
    )

    @realtime.task("chat")
    async def chat() -> None:
        raise AssertionError("another process executes it")

    headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    async with realtime:
        client = AsgiClient(_Instrumented(realtime), token=SECRET, lifespan=False)
        response = await client.post("/api/v1/tasks/chat/trigger", json={}, headers=headers)
        assert response.status_code == 200
        command = [sys.executable, "-m", "tests.tracing_worker", redis_url, prefix, response.json()["id"]]
        done = await anyio.run_process(command)
    spans = {span["name"]: span for span in json.loads(done.stdout)}
    request = span_of(exporter, "POST").get_span_context()
    assert request is not None
    trace_id = "0x0af7651916cd43dd8448eb211c80319c"
    assert [spans[name]["context"]["trace_id"] for name in ("run chat", "call the model")] == [trace_id] * 2
    assert spans["run chat"]["parent_id"] == f"0x{request.span_id:016x}"
    assert spans["call the model"]["parent_id"] == spans["run chat"]["context"]["span_id"]
    assert spans["run chat"]["attributes"]["asgi_realtime.run.status"] == "COMPLETED"


def test_a_host_without_opentelemetry_does_not_load_it() -> None:
    script = (
        "import asyncio, sys\n"
        "from asgi_realtime import Realtime\n"
        "async def main():\n"
        "    async with Realtime(secret_key='x' * 32, signals=False) as realtime:\n"
        "        async with realtime.open_run('chat') as run: pass\n"
        "        assert (await realtime.runs.get(run.id)).traceparent is None\n"
        "asyncio.run(main())\n"
        "print([name for name in sys.modules if 'opentelemetry' in name])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
