"""The worker of `tests/runs/test_tracing.py`: executes one run and prints its spans.

`python -m tests.tracing_worker URL PREFIX RUN_ID`
"""

from __future__ import annotations

import asyncio
import json
import sys

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from asgi_realtime import Realtime
from asgi_realtime.brokers.redis import RedisBroker
from tests.inprocess import SECRET


async def main(url: str, prefix: str, run_id: str) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    realtime = Realtime(secret_key=SECRET, broker=RedisBroker(url, prefix=prefix), signals=False)

    @realtime.task("chat")
    async def chat() -> None:
        with trace.get_tracer("tests").start_as_current_span("call the model"):
            pass

    async with realtime:
        await realtime.execute(run_id)
    spans = [json.loads(span.to_json()) for span in exporter.get_finished_spans()]
    print(json.dumps(spans))  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
