from __future__ import annotations

import json
from collections.abc import Collection, Sequence

import anyio
import pytest

from asgi_realtime.asgi import feed_events
from asgi_realtime.brokers.memory import MemoryBroker, _MemoryTopic
from asgi_realtime.core.config import Cors, Limits, Timeouts
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.core.metadata import Set
from asgi_realtime.core.run_changes import MetadataChanged, RunChange, Started, TagsAdded
from asgi_realtime.core.run_json import run_json
from asgi_realtime.core.runs import BatchMember, Status, StoredRecord
from asgi_realtime.core.topics import Cursor
from asgi_realtime.testing import AsgiClient
from tests.asgi.fake_host import FakeHost
from tests.asgi.official_sdk import on_one_loop
from tests.asgi.reading import kinds, runs, statuses, tag_snapshot
from tests.inprocess import GUARD_S

pytestmark = pytest.mark.anyio

RUN = "/v1/runs/run_1"
TAGS = "/v1/runs"
BATCH = "/v1/batches/batch_1"
BATCH_SCOPE = "read:batch:batch_1"


def progress(value: float) -> RunChange:
    return MetadataChanged((Set("progress", value),))


# One run


async def test_a_run_feed_on_the_wire(host: FakeHost) -> None:
    await host.create()
    async with AsgiClient(host).stream(RUN, headers=host.feed_headers()) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert (await response.chunk()).startswith(b"retry: 1000\n: ")
        snapshot = await response.chunk()
        await host.finish(output={"text": "hi"})
        rest = await response.read()
    run, ready, tail = snapshot.split(b"\n\n")
    assert tail == b""
    assert run.startswith(b'event: run\ndata: {"id":"run_1","status":"EXECUTING"')
    epoch = ready.splitlines()[1].removeprefix(b"id: ").rpartition(b".")[0]
    assert ready == b'event: ready\nid: %b.2\ndata: {"count":1}' % epoch
    run, end, tail = rest.split(b"\n\n")
    assert run.startswith(b'event: run\nid: %b.3\ndata: {"id":"run_1","status":"COMPLETED"' % epoch)
    assert b'"output":{"text":"hi"}' in run
    assert end == b'event: end\nid: %b.3\ndata: {"reason":"complete"}' % epoch


async def test_each_change_is_sent_with_its_id(host: FakeHost) -> None:
    await host.create(executing=False)
    async with AsgiClient(host).stream(RUN, headers=host.feed_headers()) as response:
        snapshot = await response.read_until("ready")
        assert [event.id for event in snapshot] == [None, snapshot[-1].id]
        await host.change("run_1", progress(0.5))
        (event,) = await response.read_events()
        assert json.loads(event.data)["metadata"] == {"progress": 0.5}
        assert event.id is not None
        cursor = Cursor.parse(event.id)
        ready = Cursor.parse(snapshot[-1].id or "")
        assert cursor is not None and ready is not None
        assert (cursor.epoch, cursor.position) == (ready.epoch, ready.position + 1)


async def test_the_feed_of_an_ended_run_sends_its_state_and_ends(host: FakeHost) -> None:
    await host.create()
    await host.finish(status=Status.FAILED, error="no luck")
    async with AsgiClient(host).stream(RUN, headers=host.feed_headers()) as response:
        events = await response.read_all_events()
    assert kinds(events) == ["run", "ready", "end"]
    assert json.loads(events[-1].data) == {"reason": "failed", "error": "no luck"}


async def test_resuming_after_the_end_is_204(host: FakeHost) -> None:
    await host.create()
    await host.finish()
    async with AsgiClient(host).stream(RUN, headers=host.feed_headers()) as response:
        await response.read_all_events()
        last = response.last_event_id
    assert last
    again = await AsgiClient(host).get(RUN, headers=host.feed_headers(last_event_id=last))
    assert again.status_code == 204
    again = await AsgiClient(host).get(RUN, headers=host.feed_headers(), query={"last_event_id": last})
    assert again.status_code == 204


async def test_a_resumed_feed_sends_only_changes_and_no_ready(host: FakeHost) -> None:
    await host.create()
    async with AsgiClient(host).stream(RUN, headers=host.feed_headers()) as response:
        await response.read_until("ready")
        last = response.last_event_id or ""
    await host.change("run_1", progress(0.1))
    await host.finish()
    async with AsgiClient(host).stream(RUN, headers=host.feed_headers(last_event_id=last)) as response:
        events = await response.read_all_events()
    assert kinds(events) == ["run", "end"]
    assert statuses(events) == ["COMPLETED"]


async def test_a_resumed_feed_without_changes_waits(host: FakeHost) -> None:
    await host.create()
    async with AsgiClient(host).stream(RUN, headers=host.feed_headers()) as response:
        await response.read_until("ready")
        last = response.last_event_id or ""
    async with AsgiClient(host).stream(RUN, headers=host.feed_headers(last_event_id=last)) as response:
        await response.chunk()
        await anyio.wait_all_tasks_blocked()
        await host.finish()
        assert kinds(await response.read_all_events()) == ["run", "end"]


@on_one_loop
@pytest.mark.parametrize("last", ["foreign.1", "nonsense", "12", ".", "x.y", "e" * 500 + ".3"])
async def test_a_foreign_or_malformed_id_gives_a_new_snapshot(host: FakeHost, last: str) -> None:
    await host.create()
    async with AsgiClient(host).stream(RUN, headers=host.feed_headers(last_event_id=last)) as response:
        assert response.status_code == 200
        assert kinds(await response.read_until("ready")) == ["run", "ready"]


async def test_an_id_beyond_the_topics_position_gives_a_new_snapshot(host: FakeHost) -> None:
    await host.create()
    async with AsgiClient(host).stream(RUN, headers=host.feed_headers()) as response:
        ready = (await response.read_until("ready"))[-1].id or ""
    beyond = ready.rpartition(".")[0] + ".999"
    async with AsgiClient(host).stream(RUN, headers=host.feed_headers(last_event_id=beyond)) as response:
        assert kinds(await response.read_until("ready")) == ["run", "ready"]


async def test_a_slow_subscriber_gets_the_newest_state(host: FakeHost) -> None:
    await host.create()
    async with AsgiClient(host).stream(RUN, headers=host.feed_headers()) as response:
        await response.read_until("ready")
        await host.change("run_1", progress(0.1))
        await anyio.wait_all_tasks_blocked()  # the change is being sent
        for step in range(2, 10):
            await host.change("run_1", progress(step / 10))
        await host.finish()
        events = await response.read_all_events()
    assert [json.loads(event.data)["metadata"]["progress"] for event in events[:-1]] == [0.1, 0.9]
    assert statuses(events) == ["EXECUTING", "COMPLETED"]


async def test_the_feed_of_a_removed_run_ends(host: FakeHost) -> None:
    """If a run was evicted while a page followed it, the page waited forever."""
    await host.create()
    async with AsgiClient(host).stream(RUN, headers=host.feed_headers()) as response:
        await response.read_until("ready")
        await host.finish()
        await host.broker.remove("run_1")
        await anyio.wait_all_tasks_blocked()
        host.tick()
        host.tick(15)  # at the latest, because a removal also wakes the followers
        with anyio.fail_after(GUARD_S):
            assert await response.read_all_events() == []
        assert response.ended


async def test_an_idle_feed_loads_no_record(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each heartbeat loaded the whole record, with payload and output."""
    await host.create()
    loaded: list[str] = []
    load = host.broker.load

    async def counting(run_ids: Sequence[str]) -> list[StoredRecord | None]:
        loaded.extend(run_ids)
        return await load(run_ids)

    monkeypatch.setattr(host.broker, "load", counting)
    async with AsgiClient(host).stream(RUN, headers=host.feed_headers()) as response:
        await response.read_until("ready")
        loaded.clear()
        for _ in range(3):
            await anyio.wait_all_tasks_blocked()
            host.tick()
            host.tick(15)
            assert await response.chunk() == b": heartbeat\n"
        assert loaded == []
        commit = await host.prepare_change("run_1", progress(0.5))
        loaded.clear()
        await commit()
        await response.read_until("run")
        assert loaded == ["run_1"]


# Columns


async def test_columns_that_the_token_hides_are_left_out(host: FakeHost) -> None:
    await host.create(payload={"secret": 1}, tags=["a"])
    await host.change("run_1", progress(1))
    token = host.token(skip_columns=["payload", "metadata", "runTags"])
    headers = {"accept": "text/event-stream", "authorization": f"Bearer {token}"}
    async with AsgiClient(host).stream(RUN, headers=headers, query={"skipColumns": "error"}) as response:
        (run, _) = await response.read_until("ready")
        assert b"secret" not in run.data.encode()
        assert "metadata" not in json.loads(run.data)
        assert json.loads(run.data)["tags"] == []
    async with AsgiClient(host).stream(RUN, headers=host.feed_headers()) as response:
        (run, _) = await response.read_until("ready")
        assert json.loads(run.data)["payload"] == {"secret": 1}


async def test_columns_are_left_out_on_request(host: FakeHost) -> None:
    await host.create(payload=1)
    query = {"skipColumns": "payload,output"}
    async with AsgiClient(host).stream(RUN, headers=host.feed_headers(), query=query) as response:
        (run, _) = await response.read_until("ready")
    assert "payload" not in json.loads(run.data)


async def test_the_end_does_not_reveal_a_hidden_error(host: FakeHost) -> None:
    await host.create()
    await host.finish(status=Status.FAILED, error="the secret reason")
    headers = {"accept": "text/event-stream", "authorization": f"Bearer {host.token(skip_columns=['error'])}"}
    async with AsgiClient(host).stream(RUN, headers=headers) as response:
        body = await response.read()
    assert b"secret" not in body and b'data: {"reason":"failed"}' in body


async def test_a_version_of_a_run_is_encoded_once(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []

    def counting(record: StoredRecord, skip: Collection[str]) -> bytes:
        encoded.append(record.id)
        return run_json(record, skip=skip)

    monkeypatch.setattr(feed_events, "run_json", counting)
    await host.create()
    headers = host.feed_headers()
    for _ in range(3):
        async with AsgiClient(host).stream(RUN, headers=headers) as response:
            await response.read_until("ready")
    assert encoded == ["run_1"]
    await host.finish()
    async with AsgiClient(host).stream(RUN, headers=headers) as response:
        await response.read_all_events()
    assert encoded == ["run_1", "run_1"]


# Tags


async def test_a_tag_feed_has_the_runs_with_all_of_the_tags(host: FakeHost) -> None:
    await host.create("run_1", tags=["b", "a"])
    await host.create("run_2", tags=["a"])
    await host.create("run_3", tags=["b"])
    await host.create("run_4", tags=["a", "b", "c"])
    assert runs(await tag_snapshot(host, "b,a")) == ["run_1", "run_4"]
    assert runs(await tag_snapshot(host, "a")) == ["run_1", "run_2", "run_4"]
    assert kinds(await tag_snapshot(host, "nothing")) == ["ready"]


async def test_a_tag_feed_sends_new_and_changed_runs_with_all_of_its_tags(host: FakeHost) -> None:
    query = {"tags": "a,b"}
    async with AsgiClient(host).stream(TAGS, headers=host.feed_headers("read:tags"), query=query) as response:
        (ready,) = await response.read_until("ready")
        assert json.loads(ready.data) == {"count": 0}
        await host.create("run_1", tags=["a"])
        await host.create("run_2", tags=["a", "b"], executing=False)
        events = await response.read_events()
        assert runs(events) == ["run_2"]
        await host.change("run_1", TagsAdded(("b",)))  # now it has both tags
        assert runs(await response.read_events()) == ["run_1"]
        await host.finish("run_1")
        assert statuses(await response.read_events()) == ["COMPLETED"]
        await anyio.wait_all_tasks_blocked()
        assert not response.ended  # a tag feed never ends


async def test_a_tag_feed_resumes(host: FakeHost) -> None:
    await host.create("run_1", tags=["a"])
    await host.create("run_2", tags=["a"])
    last = (await tag_snapshot(host, "a"))[-1].id or ""
    await host.finish("run_1")
    await host.create("run_3", tags=["a"])
    headers = host.feed_headers("read:tags:a", last_event_id=last)
    async with AsgiClient(host).stream(TAGS, headers=headers, query={"tags": "a"}) as response:
        events = await response.read_events()
    assert runs(events) == ["run_1", "run_3"]
    assert [event.id is not None for event in events] == [True, True]


async def test_a_tag_feed_resumes_from_every_position(host: FakeHost) -> None:
    headers = host.feed_headers("read:tags:a")
    query = {"tags": "a"}
    ids: list[str] = []
    async with AsgiClient(host).stream(TAGS, headers=headers, query=query) as response:
        ids.append((await response.read_until("ready"))[-1].id or "")
        for number in range(5):
            await host.create(f"run_{number}", tags=["a"], executing=False)
            ids.append((await response.read_events())[-1].id or "")
    for seen, last in enumerate(ids[:-1]):
        more = {**headers, "last-event-id": last}
        async with AsgiClient(host).stream(TAGS, headers=more, query=query) as response:
            assert runs(await response.read_events()) == [f"run_{number}" for number in range(seen, 5)]


async def test_a_trimmed_position_gives_a_new_snapshot() -> None:
    host = FakeHost(limits=Limits(topic_runs=3))
    await host.create("run_0", tags=["a"], executing=False)
    last = (await tag_snapshot(host, "a"))[-1].id or ""
    for number in range(1, 6):
        await host.create(f"run_{number}", tags=["a"], executing=False)
    headers = host.feed_headers("read:runs", last_event_id=last)
    async with AsgiClient(host).stream(TAGS, headers=headers, query={"tags": "a"}) as response:
        events = await response.read_until("ready")
    assert runs(events) == ["run_3", "run_4", "run_5"]


async def test_a_subscriber_overtaken_by_trimming_gets_a_new_snapshot() -> None:
    host = FakeHost(limits=Limits(topic_runs=3))
    headers = host.feed_headers("read:runs")
    async with AsgiClient(host).stream(TAGS, headers=headers, query={"tags": "a"}) as response:
        await response.read_until("ready")
        await host.create("run_0", tags=["a"], executing=False)
        await anyio.wait_all_tasks_blocked()
        for number in range(1, 6):
            await host.create(f"run_{number}", tags=["a"], executing=False)
        events = await response.read_until("ready")
    assert runs(events) == ["run_0", "run_3", "run_4", "run_5"]


async def test_a_snapshot_has_only_the_newest_runs() -> None:
    host = FakeHost(limits=Limits(feed_runs=3))
    for number in range(10):
        await host.create(f"run_{number}", tags=["a", "even" if number % 2 == 0 else "odd"], executing=False)
    events = await tag_snapshot(host, "a")
    assert runs(events) == ["run_7", "run_8", "run_9"]
    assert json.loads(events[-1].data) == {"count": 3}
    assert runs(await tag_snapshot(host, "a,even")) == ["run_4", "run_6", "run_8"]


@pytest.mark.slow
async def test_a_large_snapshot_is_complete_and_split_into_bodies_of_bounded_size(host: FakeHost) -> None:
    for number in range(1200):
        await host.create(f"run_{number}", tags=["a"], executing=False, payload="x" * 300)
    headers = host.feed_headers("read:runs")
    async with AsgiClient(host).stream(TAGS, headers=headers, query={"tags": "a"}) as response:
        bodies = [await response.chunk()]
        while b"event: ready" not in bodies[-1]:
            bodies.append(await response.chunk())
    assert max(map(len, bodies)) <= 64 * 1024
    assert b"".join(bodies).count(b"event: run\n") == 1000


# Batches


async def test_a_batch_feed_ends_when_all_runs_have_ended(host: FakeHost) -> None:
    await host.create_batch()
    await host.finish("run_0")
    async with AsgiClient(host).stream(BATCH, headers=host.feed_headers(BATCH_SCOPE)) as response:
        assert set(runs(await response.read_until("ready"))) == {"run_0", "run_1", "run_2"}
        await host.finish("run_1", Status.CANCELED)
        assert statuses(await response.read_events()) == ["CANCELED"]
        await anyio.wait_all_tasks_blocked()
        assert not response.ended
        await host.finish("run_2")
        events = await response.read_all_events()
    assert kinds(events) == ["run", "end"]
    assert json.loads(events[-1].data) == {"reason": "complete"}


async def test_the_feed_of_an_incomplete_batch_does_not_end(host: FakeHost) -> None:
    await host.create("run_0", batch=BatchMember("batch_1", 0, 2))
    await host.finish("run_0")
    async with AsgiClient(host).stream(BATCH, headers=host.feed_headers(BATCH_SCOPE)) as response:
        await response.read_until("ready")
        await anyio.wait_all_tasks_blocked()
        assert not response.ended
        await host.create("run_1", batch=BatchMember("batch_1", 1, 2), executing=False)
        assert runs(await response.read_events()) == ["run_1"]
        await host.change("run_1", Started("me"))
        await response.read_events()
        await host.finish("run_1")
        assert kinds(await response.read_all_events()) == ["run", "end"]


@pytest.mark.parametrize("missed", [0, 1, 2, 3])
async def test_a_resumed_batch_feed_sends_missed_changes_and_ends(host: FakeHost, missed: int) -> None:
    await host.create_batch()
    async with AsgiClient(host).stream(BATCH, headers=host.feed_headers(BATCH_SCOPE)) as response:
        await response.read_until("ready")
        for index in range(3 - missed):
            await host.finish(f"run_{index}")
            await response.read_events()
        last = response.last_event_id or ""
    for index in range(3 - missed, 3):
        await host.finish(f"run_{index}")
    headers = host.feed_headers(BATCH_SCOPE, last_event_id=last)
    async with AsgiClient(host).stream(BATCH, headers=headers) as response:
        if not missed:
            assert response.status_code == 204
            return
        events = await response.read_all_events()
    assert runs(events) == [f"run_{index}" for index in range(3 - missed, 3)]
    assert events[-1].event == "end"


async def test_a_batch_feed_ends_even_if_the_snapshot_omits_runs() -> None:
    host = FakeHost(limits=Limits(feed_runs=2))
    await host.create_batch(5)
    for index in range(5):
        await host.finish(f"run_{index}")
    async with AsgiClient(host).stream(BATCH, headers=host.feed_headers(BATCH_SCOPE)) as response:
        events = await response.read_all_events()
    assert kinds(events) == ["run", "run", "ready", "end"]


async def test_a_batch_feed_does_not_wait_for_expired_runs(host: FakeHost) -> None:
    """If the first runs of a long batch had expired, the feed waited for them forever."""
    await host.create_batch(2)
    await host.finish("run_0")
    await host.broker.remove("run_0")
    async with AsgiClient(host).stream(BATCH, headers=host.feed_headers(BATCH_SCOPE)) as response:
        await response.read_until("ready")
        await host.finish("run_1")
        with anyio.fail_after(GUARD_S):
            assert kinds(await response.read_all_events()) == ["run", "end"]


# Heartbeats, expiry and shutdown


async def test_a_feed_has_heartbeats_and_ends_with_its_token() -> None:
    host = FakeHost(timeouts=Timeouts(heartbeat=15), cors=Cors())
    await host.create()
    headers = {"accept": "text/event-stream", "authorization": f"Bearer {host.token(expires_in_s=60)}"}
    async with AsgiClient(host).stream(RUN, headers=headers) as response:
        await response.read_until("ready")
        last = response.last_event_id
        await anyio.wait_all_tasks_blocked()
        host.tick()
        host.tick(15)
        assert await response.chunk() == b": heartbeat\n"
        host.tick(60)
        (end,) = await response.read_all_events()
        assert response.last_event_id == last
    assert (end.event, json.loads(end.data)) == ("end", {"reason": "token_expired"})


async def test_a_shutdown_during_the_send_of_a_heartbeat_ends_the_feed() -> None:
    """The subscription waited for the next heartbeat, and the server could not exit."""
    host = FakeHost(timeouts=Timeouts(heartbeat=15))
    await host.create()
    async with AsgiClient(host).stream(RUN, headers=host.feed_headers()) as response:
        await response.read_until("ready")
        await anyio.wait_all_tasks_blocked()
        host.tick()
        host.tick(15)
        await anyio.wait_all_tasks_blocked()  # the heartbeat is being sent
        host.begin_shutdown()
        assert await response.chunk() == b": heartbeat\n"
        with anyio.fail_after(GUARD_S):
            (event,) = await response.read_all_events()
    assert event.event == "reconnect"


async def test_a_feed_ends_with_reconnect_at_shutdown(host: FakeHost) -> None:
    await host.create()
    async with AsgiClient(host).stream(RUN, headers=host.feed_headers()) as response:
        await response.read_until("ready")
        await anyio.wait_all_tasks_blocked()
        host.begin_shutdown()
        (event,) = await response.read_all_events()
        assert response.ended
    assert event.event == "reconnect"


async def test_a_feed_during_the_shutdown_ends_at_once(host: FakeHost) -> None:
    await host.create()
    host.begin_shutdown()
    async with AsgiClient(host).stream(RUN, headers=host.feed_headers()) as response:
        assert kinds(await response.read_all_events()) == ["reconnect"]


async def test_a_large_snapshot_does_not_delay_the_shutdown(host: FakeHost) -> None:
    for number in range(20):
        await host.create(f"run_{number}", tags=["a"], executing=False, payload="x" * 40_000)
    headers = host.feed_headers("read:runs")
    async with AsgiClient(host).stream(TAGS, headers=headers, query={"tags": "a"}) as response:
        await response.read_until("run")
        host.begin_shutdown()
        events = await response.read_all_events()
    assert len(events) < 5
    assert events[-1].event == "reconnect"
    assert response.last_event_id is None  # the snapshot was incomplete, so the client gets a new one


async def test_a_feed_whose_topic_can_no_longer_be_followed_ends(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waited forever for a topic that never woke it again."""
    await host.create()
    async with AsgiClient(host).stream(RUN, headers=host.feed_headers()) as response:
        await response.read_until("ready")

        async def fail(*args: object, **kwargs: object) -> None:
            raise BrokerUnavailable("unreadable")

        monkeypatch.setattr(_MemoryTopic, "changes", fail)
        assert isinstance(host.broker, MemoryBroker)
        topic = host.broker._topics["run:run_1"]
        topic.failure = BrokerUnavailable("unreadable")
        topic.waiting.wake()
        with anyio.fail_after(GUARD_S):
            assert await response.read() == b"", "without `end`, so the client resumes"


async def test_a_stalled_feed_is_disconnected() -> None:
    host = FakeHost(timeouts=Timeouts(send=30))
    await host.create()
    async with AsgiClient(host).stream(RUN, headers=host.feed_headers()):
        await anyio.wait_all_tasks_blocked()
        host.tick()
        host.tick(30)
        await anyio.wait_all_tasks_blocked()
        assert not host.subscribers


async def test_a_feed_counts_as_a_subscription() -> None:
    host = FakeHost(limits=Limits(subscribers=1))
    await host.create()
    async with AsgiClient(host).stream(RUN, headers=host.feed_headers()):
        response = await AsgiClient(host).get(RUN, headers=host.feed_headers())
        assert response.status_code == 429


async def test_a_disconnect_releases_everything(host: FakeHost) -> None:
    await host.create(tags=["a"])
    await anyio.wait_all_tasks_blocked()
    before = len(anyio.get_running_tasks())
    for _ in range(20):
        headers = host.feed_headers("read:runs")
        async with AsgiClient(host).stream(TAGS, headers=headers, query={"tags": "a"}) as response:
            await response.read_until("ready")
    await anyio.wait_all_tasks_blocked()
    async with host.broker.follow("tag:a") as topic:
        assert len(topic.waiting) == 0
    assert not host.subscribers
    assert host.app.subscription_limits.open == 0
    assert len(anyio.get_running_tasks()) == before
