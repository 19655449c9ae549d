from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from asgi_realtime import BrokerUnavailable, InvalidConfiguration, Limits, Realtime, Retention, TaskError, Timeouts
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.brokers.redis import RedisBroker
from asgi_realtime.metrics import KINDS, MAX_TASKS, OTHER, Metrics
from asgi_realtime.testing import AsgiClient
from tests.asgi.fake_host import FakeHost
from tests.docs.blocks import blocks
from tests.inprocess import SECRET, FakeClock, ended, make_realtime, until
from tests.requirements import promtool_binary

pytestmark = pytest.mark.anyio

Values = dict[tuple[str, tuple[str, ...]], float]


def values(text: str) -> Values:
    """Our samples by name, without the prefix, and label values, sorted by the name of the label."""
    return {
        (
            sample.name.removeprefix("asgi_realtime_"),
            tuple(value for _, value in sorted(sample.labels.items())),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("asgi_realtime_")
    }


async def scrape(app: Any) -> Values:
    response = await AsgiClient(app, token=SECRET).get("/v1/metrics")
    assert response.status_code == 200
    return values(response.body.decode())


async def words() -> AsyncIterator[str]:
    for word in ("a", "b", "c"):
        yield word


# Runs


async def test_runs_are_counted_by_task_and_status() -> None:
    realtime = make_realtime(metrics=True)
    ready = anyio.Event()

    @realtime.task("works")
    async def works() -> None:
        await ready.wait()

    @realtime.task("fails")
    async def fails() -> None:
        raise TaskError("no")

    async with realtime:
        running = await realtime.trigger(works)
        await ended(realtime, await realtime.trigger(fails))
        found = await scrape(realtime)
        assert found["runs_executing", ("works",)] == 1
        assert found["runs_total", ("EXECUTING", "works")] == 1
        assert ("runs_total", ("COMPLETED", "works")) not in found
        assert found["runs_total", ("FAILED", "fails")] == 1
        ready.set()
        await ended(realtime, running)
        await until(lambda: not realtime.engine.executions)
        found = await scrape(realtime)
        assert found["runs_executing", ("works",)] == 0
        assert found["runs_total", ("COMPLETED", "works")] == 1


async def test_made_up_task_names_share_one_label() -> None:
    realtime = make_realtime(metrics=True)
    async with realtime:
        for number in range(MAX_TASKS + 2):
            async with realtime.open_run(f"chat {number}"):
                pass
        found = await scrape(realtime)
    tasks = {labels[1] for (name, labels) in found if name == "runs_total"}
    assert len(tasks) == MAX_TASKS + 1
    assert found["runs_total", ("COMPLETED", OTHER)] == 2


async def test_no_metric_has_the_id_of_a_run() -> None:
    realtime = make_realtime(metrics=True)
    async with realtime:
        pipe = realtime.pipe(words())
        await pipe.wait_until_complete()
        await ended(realtime, pipe.run_id)
        body = (await AsgiClient(realtime, token=SECRET).get("/v1/metrics")).body
    assert pipe.run_id.encode() not in body


async def test_the_first_chunk_of_a_run_is_timed_from_its_trigger() -> None:
    clock = FakeClock()
    realtime = make_realtime(metrics=True, clock=clock)

    @realtime.task("chat")
    async def chat() -> None:
        clock.seconds += 3
        await realtime.append("first")
        clock.seconds += 40
        await realtime.append("second")
        await realtime.append("of another stream", "other")

    async with realtime:
        await ended(realtime, await realtime.trigger(chat))
        found = await scrape(realtime)
    assert (found["first_chunk_seconds_count", ("chat",)], found["first_chunk_seconds_sum", ("chat",)]) == (1, 3)


async def test_input_is_not_a_first_chunk() -> None:
    realtime = make_realtime(metrics=True)
    async with realtime, realtime.open_run("chat") as run:
        await realtime.send_input(run, "answer", "yes")
        assert ("first_chunk_seconds_count", ("chat",)) not in await scrape(realtime)


# Chunks


async def test_chunks_and_bytes_are_counted_in_and_out() -> None:
    realtime = make_realtime(metrics=True)
    async with realtime, realtime.open_run("chat") as run:
        path = f"/v1/streams/{run.id}/default"
        async with AsgiClient(realtime, token=SECRET).stream(path) as response:
            await realtime.append("one")
            await response.read_events()
            await realtime.pipe(words()).wait_until_complete()
            while (await response.read_events())[-1].id != "3":
                pass
            found = await scrape(realtime)
            assert found["received_chunks_total", ()] == 4
            assert found["received_bytes_total", ()] == len('"one""a""b""c"')
            assert found["sent_chunks_total", ()] == 4
            sent = found["sent_bytes_total", ("stream",)]
            assert sent >= len('id: 0\ndata: "one"\n\n')
            assert {kind: found["subscriptions", (kind,)] for kind in KINDS} == dict.fromkeys(KINDS, 0) | {"stream": 1}
            await realtime.append("two")
            await response.read_events()
            assert (await scrape(realtime))["sent_bytes_total", ("stream",)] == sent + len('id: 4\ndata: "two"\n\n')
        await until(lambda: not any(getattr(one, "kind", "") for one in realtime.subscribers))
        found = await scrape(realtime)
        assert (found["sent_chunks_total", ()], found["subscriptions", ("stream",)]) == (5, 0)


async def test_writers_that_are_gone_still_count() -> None:
    realtime = make_realtime(metrics=True)
    async with realtime:
        for _ in range(3):
            await ended(realtime, (await _piped(realtime)))
        gc.collect()
        found = await scrape(realtime)
        assert (found["received_chunks_total", ()], found["received_bytes_total", ()]) == (9, 27)
        assert await scrape(realtime) == found


async def _piped(realtime: Realtime) -> str:
    pipe = realtime.pipe(words())
    await pipe.wait_until_complete()
    return pipe.run_id


async def test_chunks_that_a_reader_missed_were_not_sent() -> None:
    realtime = make_realtime(metrics=True, retention=Retention(stream_bytes=300))
    async with realtime, realtime.open_run("chat") as run:
        for number in range(20):
            await realtime.append("x" * 80 + str(number))
        async with AsgiClient(realtime, token=SECRET).stream(f"/v1/streams/{run.id}/default") as response:
            events = await response.read_events()
            while events[-1].id != "19":
                events += await response.read_events()
            chunks = [event for event in events if event.event == "message"]
            assert 0 < len(chunks) < 20
            assert (await scrape(realtime))["sent_chunks_total", ()] == len(chunks)


async def test_chunks_over_http_are_counted() -> None:
    realtime = make_realtime(metrics=True)
    async with realtime, realtime.open_run("chat") as run:
        response = await AsgiClient(realtime, token=SECRET).post(f"/v1/streams/{run.id}/self/log/append", body=b"hi")
        assert response.status_code == 200
        found = await scrape(realtime)
    assert (found["received_chunks_total", ()], found["received_bytes_total", ()]) == (1, 4)
    assert found["append_seconds_count", ()] == 1


# Readers and requests


async def test_feeds_and_polls_are_counted_by_kind() -> None:
    realtime = make_realtime(metrics=True)
    async with realtime, realtime.open_run("chat") as run:
        client = AsgiClient(realtime, token=SECRET)
        async with client.stream(f"/v1/runs/{run.id}") as feed, client.stream("/v1/health") as probe:
            await feed.read_events()
            await probe.read_events()
            found = await scrape(realtime)
            assert (found["subscriptions", ("feed",)], found["subscriptions", ("probe",)]) == (1, 1)
            assert found["sent_bytes_total", ("feed",)] > 0


async def test_rejections_are_counted_by_reason() -> None:
    realtime = make_realtime(metrics=True, limits=Limits(subscribers_per_run=1))
    async with realtime, realtime.open_run("chat") as run:
        client, path = AsgiClient(realtime), f"/v1/streams/{run.id}/default"
        public = realtime.create_public_token(scopes={"read": {"runs": ["run_other"]}})
        assert (await client.get(path)).status_code == 401
        assert (await client.get(path, token=public)).status_code == 403
        async with client.stream(path, token=SECRET):
            assert (await client.get(path, token=SECRET)).status_code == 429
        found = await scrape(realtime)
    reasons = {labels[0]: value for (name, labels), value in found.items() if name == "rejections_total"}
    assert reasons == {"invalid_token": 1, "forbidden": 1, "limit_exceeded": 1}


async def test_an_event_source_with_an_expired_token_is_a_rejection() -> None:
    clock = FakeClock()
    realtime = make_realtime(metrics=True, clock=clock)
    async with realtime:
        token = realtime.create_public_token(scopes={"read": {"runs": ["run_1"]}}, expires_in="1m")
        clock.seconds += 61
        headers = {"accept": "text/event-stream"}
        response = await AsgiClient(realtime).get(f"/v1/streams/run_1/default?access_token={token}", headers=headers)
        assert response.status_code == 200
        assert (await scrape(realtime))["rejections_total", ("token_expired",)] == 1


async def test_stalled_readers_are_counted() -> None:
    metrics = Metrics()
    host = FakeHost(timeouts=Timeouts(send=30))
    host.reporter = metrics
    await host.create()
    async with AsgiClient(host).stream("/v1/streams/run_1/default", headers=host.headers()):
        await anyio.wait_all_tasks_blocked()  # the preamble is being sent, and the client does not read it
        host.tick()
        host.tick(30)
        host.tick(30)
    assert values(metrics.expose("")[0].decode())["stalled_readers_total", ()] == 1


# The broker


async def test_calls_that_fail_are_broker_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = MemoryBroker()
    realtime = make_realtime(metrics=True, broker=broker)
    commit, failures = broker.commit, [BrokerUnavailable("away"), BrokerUnavailable("away")]

    async def failing(*args: Any, **options: Any) -> int:
        if failures:
            raise failures.pop()
        return await commit(*args, **options)

    monkeypatch.setattr(broker, "commit", failing)
    async with realtime:
        async with realtime.open_run("chat"):
            pass
        assert (await scrape(realtime))["broker_errors_total", ()] == 2


@pytest.mark.redis
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_appends_to_redis_are_timed(redis_url: str) -> None:
    broker = RedisBroker(redis_url, prefix="metrics-appends")
    realtime = make_realtime(metrics=True, broker=broker)
    async with realtime:
        await ended(realtime, await _piped(realtime))
        found = await scrape(realtime)
    assert found["received_chunks_total", ()] == 3
    assert found["append_seconds_count", ()] >= 1
    assert found["first_chunk_seconds_count", ("pipe",)] == 1


# The endpoint


async def test_metrics_are_off_by_default() -> None:
    realtime = make_realtime()
    assert realtime.metrics is None
    response = await AsgiClient(realtime).get("/v1/metrics")
    assert (response.status_code, response.json()["code"]) == (404, "not_found")


async def test_only_the_secret_key_reads_them() -> None:
    realtime = make_realtime(metrics=True)
    async with realtime:
        client = AsgiClient(realtime)
        assert (await client.get("/v1/metrics")).status_code == 401
        public = realtime.create_public_token(scopes=["read:runs"])
        denied = await client.get("/v1/metrics", token=public)
        assert (denied.status_code, denied.json()["code"]) == (403, "forbidden")
        allowed = await client.get("/v1/metrics", token=SECRET)
        assert allowed.headers["content-type"].startswith("text/plain")
        assert "no-store" in allowed.headers["cache-control"]
        in_query = await client.get(f"/v1/metrics?access_token={SECRET}")
        assert in_query.status_code == 401


async def test_a_scraper_can_ask_for_openmetrics() -> None:
    realtime = make_realtime(metrics=True)
    headers = {"accept": "application/openmetrics-text; version=1.0.0"}
    response = await AsgiClient(realtime, token=SECRET).get("/v1/metrics", headers=headers)
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.body.endswith(b"# EOF\n")


async def test_they_can_be_in_the_registry_of_the_host() -> None:
    registry = CollectorRegistry()
    realtime = make_realtime(metrics=registry)
    async with realtime:
        await ended(realtime, await _piped(realtime))
        await until(lambda: registry.get_sample_value("asgi_realtime_received_chunks_total") == 3)
    labels = {"task": "pipe", "status": "COMPLETED"}
    assert registry.get_sample_value("asgi_realtime_runs_total", labels) == 1
    with pytest.raises(InvalidConfiguration, match="a registry of its own"):
        make_realtime(metrics=registry)


async def test_the_gauges_are_zero_after_the_stop() -> None:
    registry = CollectorRegistry()
    realtime = make_realtime(metrics=registry, timeouts=Timeouts(tick=60, drain=0.02, cancel=1.0))  # no tick

    @realtime.task("chat")
    async def chat() -> None:
        await anyio.sleep_forever()

    executing, streams = ("asgi_realtime_runs_executing", {"task": "chat"}), {"kind": "stream"}
    async with anyio.create_task_group() as group:
        async with realtime:
            run = await realtime.trigger(chat)
            path = f"/v1/streams/{run.id}/default"
            group.start_soon(
                partial(AsgiClient(realtime, token=SECRET).get, path, headers={"accept": "text/event-stream"})
            )
            await until(lambda: run.id in realtime.engine.executions and realtime.subscribers)
            assert realtime.metrics is not None
            realtime.metrics.sample()
            assert registry.get_sample_value(*executing) == 1
            assert registry.get_sample_value("asgi_realtime_subscriptions", streams) == 1
        assert registry.get_sample_value(*executing) == 0
        assert registry.get_sample_value("asgi_realtime_subscriptions", streams) == 0


@pytest.mark.parametrize("wrong", [None, "yes", 1, object()])
def test_other_values_are_rejected(wrong: Any) -> None:
    with pytest.raises(InvalidConfiguration, match="allowed are True, False and a CollectorRegistry"):
        make_realtime(metrics=wrong)


def test_without_the_package_the_error_names_the_extra() -> None:
    script = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from asgi_realtime import Realtime\n"
        "Realtime(secret_key='x' * 32)\n"
        "Realtime(secret_key='x' * 32, metrics=True)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "InvalidConfiguration: metrics need prometheus-client" in done.stderr
    assert "pip install 'asgi_realtime[metrics]'" in done.stderr


def test_promtool_accepts_the_documented_scrape(tmp_path: Path) -> None:
    config = tmp_path / "prometheus.yml"
    config.write_text(blocks("prometheus")["scrape"].text)
    command = [promtool_binary(), "check", "config", "--syntax-only", str(config)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


async def test_promtool_accepts_the_output() -> None:
    realtime = make_realtime(metrics=True)
    async with realtime:
        await ended(realtime, await _piped(realtime))
        body = (await AsgiClient(realtime, token=SECRET).get("/v1/metrics")).body
    done = await anyio.run_process([promtool_binary(), "check", "metrics"], input=body, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# The documents


ROOT = Path(__file__).parent.parent


def kinds_of_metrics() -> dict[str, str]:
    """The type of each metric by its name."""
    metrics = Metrics().registry.collect()
    return {f"{metric.name}_total" if metric.type == "counter" else metric.name: metric.type for metric in metrics}


def test_the_page_lists_each_metric() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    rows = dict(re.findall(r"^\| `(asgi_realtime_\w+)` \| (\w+) \|", page, flags=re.MULTILINE))
    assert rows == kinds_of_metrics()


def test_the_dashboard_uses_metrics_that_exist_and_uses_all_of_them() -> None:
    text = (ROOT / "docs" / "grafana-dashboard.json").read_text()
    dashboard = json.loads(text)
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    used = {name for query in queries for name in re.findall(r"asgi_realtime_\w+", query)}
    assert used == {f"{name}_bucket" if kind == "histogram" else name for name, kind in kinds_of_metrics().items()}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
