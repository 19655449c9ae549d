"""The clients against the library's own server: uvicorn in another process, over real sockets.

What the protocol module decides is the same for each kind of client, and `test_against_a_script` runs it with all of
them. So a test here uses one kind, unless it is about connections.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import pytest

from asgi_realtime import (
    ExpiredToken,
    InvalidToken,
    Realtime,
    RunCanceled,
    RunFailed,
    RunNotFound,
    ScopeDenied,
    Status,
    StreamGap,
)
from asgi_realtime.client import RealtimeClient, RunState, ServerUnreachable, SyncRealtimeClient
from tests.client.reading import FakeTime, read
from tests.e2e.conftest import Relay
from tests.e2e.site import GUARD_S, SECRET, STREAM_BYTES, Opened, Site, serving, starting

pytestmark = [pytest.mark.slow, pytest.mark.server]


@pytest.fixture
def run(site: Site) -> Opened:
    return site.open(tags=[f"user:{secrets.token_hex(4)}"])


@pytest.fixture
def relay(site: Site) -> Iterator[Relay]:
    with Relay(site.port) as running:
        yield running


def mounted(relay: Relay) -> str:
    return f"{relay.url}/realtime"


# Streams


def test_a_stream_arrives_once_across_many_cuts(kind: str, site: Site, run: Opened, relay: Relay) -> None:
    cuts, step = 10, 20
    run.append(*range(step))

    def cut(chunk: int) -> None:
        if chunk % step == step // 2 and chunk < cuts * step:  # the next chunks are sent, received or still unwritten
            run.append(*range(chunk + step // 2, chunk + step // 2 + step))
            relay.cut()
        if chunk == cuts * step:
            run.end()

    outcome = read(
        kind,
        mounted(relay),
        run.token,
        lambda client: client.read(run.id),
        on_item=cut,
        fake_time=FakeTime(),
    )
    assert (outcome.items, outcome.errors) == (list(range(cuts * step + step)), [])
    positions = [request["last_event_id"] for request in site.requests(f"/streams/{run.id}/")]
    assert len(positions) > cuts // 4  # a cut while the client still reads buffered chunks hits nothing


def test_chunks_arrive_while_the_run_executes(site: Site, run: Opened) -> None:
    """Each chunk is appended only after the client has read the previous one."""
    run.append(0)

    def follow(chunk: int) -> None:
        run.append(chunk + 1) if chunk < 5 else run.end()

    outcome = read("sync", site.base_url, run.token, lambda client: client.read(run.id), on_item=follow)
    assert outcome.items == list(range(6))


def test_a_sync_client_reads_in_threads(site: Site) -> None:
    runs = [site.open() for _ in range(4)]
    got: dict[str, list[Any]] = {run.id: [] for run in runs}
    with SyncRealtimeClient(site.base_url, lambda: site.token("read:runs")) as client:

        def follow(run_id: str) -> None:
            got[run_id].extend(client.read(run_id))

        threads = [threading.Thread(target=follow, args=[run.id]) for run in runs]
        for thread in threads:
            thread.start()
        for number, run in enumerate(runs):
            run.append(*range(number))
            run.end()
        for thread in threads:
            thread.join(GUARD_S)
    assert [got[run.id] for run in runs] == [list(range(number)) for number in range(4)]


def test_a_failure_is_raised_after_the_last_chunk(site: Site, run: Opened) -> None:
    run.append("last")
    run.end(error="no luck")
    outcome = read("sync", site.base_url, run.token, lambda client: client.read(run.id))
    assert outcome.items == ["last"]
    assert type(outcome.error) is RunFailed
    assert str(outcome.error) == "the run ended failed: no luck"


def test_a_canceled_run_has_its_own_error(site: Site) -> None:
    run = site.trigger("endless")
    headers = {"authorization": f"Bearer {SECRET}"}
    site.http.post(f"{site.base_url}/api/v2/runs/{run.id}/cancel", headers=headers).raise_for_status()
    outcome = read("sync", site.base_url, run.token, lambda client: client.read(run.id))
    assert type(outcome.error) is RunCanceled


def test_expired_chunks_are_a_gap(site: Site, run: Opened) -> None:
    size, count = 1000, 2 * STREAM_BYTES // 1000
    for number in range(count):
        run.append(f"{number:04d}" + "x" * size)
    run.end()
    outcome = read("sync", site.base_url, run.token, lambda client: client.read_indexed(run.id), retries=1)
    (gap,) = outcome.errors
    assert isinstance(gap, StreamGap)
    assert (gap.requested, gap.first) == (0, outcome.items[0].index)
    assert [item.index for item in outcome.items] == list(range(gap.first, count))


@pytest.mark.parametrize(("start", "rest"), [(1, ["b", "c"]), (3, [])])
def test_reading_starts_at_an_index(site: Site, run: Opened, start: int, rest: list[str]) -> None:
    run.append("a", "b", "c")
    run.end()
    outcome = read("sync", site.base_url, run.token, lambda client: client.read(run.id, start_index=start))
    assert (outcome.items, outcome.errors) == (rest, [])
    outcome = read("sync", site.base_url, run.token, lambda client: client.read(run.id, start_index=9))
    assert (outcome.items, type(outcome.error)) == ([], RunFailed), "chunks that were there were lost"


# Runs


def test_a_run_is_followed_to_its_end(kind: str, site: Site, run: Opened, relay: Relay) -> None:
    seen: list[RunState] = []

    def continue_run(state: RunState) -> None:
        seen.append(state)
        if len(seen) == 1:
            relay.cut()
            run.update(metadata={"progress": 0.5})
        elif not state.is_completed:
            run.end(output={"pages": 3})

    outcome = read(
        kind,
        mounted(relay),
        run.token,
        lambda client: client.subscribe_to_run(run.id),
        on_item=continue_run,
        fake_time=FakeTime(),
    )
    assert outcome.errors == []
    states = [(state.status, state.metadata) for state in outcome.items]
    assert states == [
        (Status.EXECUTING, {}),
        (Status.EXECUTING, {"progress": 0.5}),
        (Status.COMPLETED, {"progress": 0.5}),
    ]
    last = outcome.items[-1]
    assert (last.id, last.task, last.output, last.error) == (run.id, "opened", {"pages": 3}, None)
    assert last.is_success and last.finished_at >= last.created_at


def test_a_failed_run_ends_its_feed_with_its_error(site: Site, run: Opened) -> None:
    run.end(error="no luck")
    (state,) = read("sync", site.base_url, run.token, lambda client: client.subscribe_to_run(run.id)).items
    assert (state.status, state.is_failed, state.error.message) == (Status.FAILED, True, "no luck")


def test_a_feed_of_tags_resumes_after_a_cut(kind: str, site: Site, run: Opened, relay: Relay) -> None:
    tag = f"list:{secrets.token_hex(4)}"
    runs = [site.open(tags=[tag, "other"]) for _ in range(3)]
    seen: list[RunState] = []

    def continue_run(state: RunState) -> None:
        seen.append(state)
        if len(seen) == 3:
            relay.cut()
            runs[1].end(output="done")

    outcome = read(
        kind,
        mounted(relay),
        site.token(f"read:tags:{tag}"),
        lambda client: client.subscribe_to_runs_with_tag([tag, "other"], created_within="1h"),
        on_item=continue_run,
        take=4,
        fake_time=FakeTime(),
    )
    assert [state.id for state in outcome.items] == [*(run.id for run in runs), runs[1].id]
    assert outcome.items[-1].output == "done"
    assert set(outcome.items[-1].tags) == {tag, "other"}


def test_a_batch_is_followed_until_all_its_runs_are_over(site: Site) -> None:
    batch = site.post("batch_trigger", items=[["echo", 1], ["echo", 2], ["unlucky", None]])
    outcome = read(
        "sync",
        site.base_url,
        batch["publicAccessToken"],
        lambda client: client.subscribe_to_batch(batch["id"]),
    )
    assert outcome.errors == []
    last = {state.id: state for state in outcome.items}
    assert [last[run_id].status for run_id in batch["runs"]] == ["COMPLETED", "COMPLETED", "FAILED"]
    assert [last[run_id].output for run_id in batch["runs"]] == [1, 2, None]
    assert {state.batch_id for state in outcome.items} == {batch["id"]}


@pytest.mark.anyio
async def test_get_run_returns_the_current_state(site: Site, run: Opened) -> None:
    async with RealtimeClient(site.base_url, run.token) as client:
        state = await client.get_run(run.id)
    with SyncRealtimeClient(site.base_url, run.token) as sync_client:
        assert sync_client.get_run(run.id) == state
    assert (state.id, state.status, state.is_executing) == (run.id, Status.EXECUTING, True)


# Refusals and tokens


def test_unknown_runs_and_batches_are_not_found(site: Site) -> None:
    token = site.token("read:runs")
    for call in (
        lambda client: client.read("run_unknown"),
        lambda client: client.subscribe_to_run("run_unknown"),
        lambda client: client.subscribe_to_batch("batch_unknown"),
    ):
        outcome = read("sync", site.base_url, token, call)
        assert isinstance(outcome.error, RunNotFound)


def test_each_bad_token_has_its_error(site: Site, run: Opened) -> None:
    hour_ago = Realtime(secret_key=SECRET, clock=lambda: time.time() - 3600)
    scopes = [f"read:runs:{run.id}"]
    tokens = {
        Realtime(secret_key="another key, of 32 bytes or more").create_public_token(scopes=scopes): InvalidToken,
        hour_ago.create_public_token(scopes=scopes): ExpiredToken,
        site.token("read:runs:run_of_another"): ScopeDenied,
    }
    for token, error in tokens.items():
        outcome = read("sync", site.base_url, token, lambda client: client.read(run.id))
        assert type(outcome.error) is error
        assert token not in str(outcome.error)


def test_a_token_that_expires_while_reading_is_renewed() -> None:
    with serving("memory") as site:
        run = site.open()
        run.append(0)
        spans = iter(("10m", "3h"))
        tokens: list[str] = []

        def token() -> str:
            tokens.append(site.token(f"read:runs:{run.id}", expires_in=next(spans)))
            return tokens[-1]

        def continue_run(chunk: int) -> None:
            if chunk == 0:
                site.move_clock(3600)
                site.until(lambda: len(tokens) == 2 or not site.requests("/streams/")[0]["open"], "the token expires")
                run.append(1)
                run.end()

        outcome = read("sync", site.base_url, token, lambda client: client.read(run.id), on_item=continue_run)
        assert (outcome.items, outcome.errors) == ([0, 1], [])
        assert len(tokens) == 2


# Servers that stop


def test_a_crash_without_redis_loses_the_run() -> None:
    def crash(chunk: object) -> None:
        site.crash()
        site.start()

    with serving("memory") as site:
        run = site.open()
        run.append("a")
        outcome = read(
            "sync",
            site.base_url,
            run.token,
            lambda client: client.read(run.id),
            on_item=crash,
            fake_time=FakeTime(),
        )
    assert outcome.items == ["a"]
    assert isinstance(outcome.error, RunNotFound)  # not an end, which would mean that the stream is complete


@pytest.mark.redis
@pytest.mark.parametrize(("kind", "leave"), [("sync", Site.crash), ("trio", Site.stop)])
def test_with_redis_a_restart_loses_nothing(kind: str, redis_url: str, leave: Any) -> None:
    front = Site(redis_url)
    back = Site(redis_url, prefix=front.prefix)
    with starting(front, back):
        run = back.open()
        run.append(*range(3))

        def continue_run(chunk: int) -> None:
            if chunk == 1:
                leave(front)
                run.append(3, 4)
                front.start()
                run.end()

        outcome = read(
            kind,
            front.base_url,
            run.token,
            lambda client: client.read(run.id),
            on_item=continue_run,
            fake_time=FakeTime(),
            give_up_after=None,
        )
    assert (outcome.items, outcome.errors) == (list(range(5)), [])


def test_the_client_gives_up_on_a_server_that_does_not_return() -> None:
    with serving("memory") as site:
        run = site.open()
        run.append("a")
        outcome = read(
            "sync",
            site.base_url,
            run.token,
            lambda client: client.read(run.id),
            on_item=lambda chunk: site.crash(),
            fake_time=FakeTime(),
        )
    assert outcome.items == ["a"]
    assert type(outcome.error) is ServerUnreachable
    assert isinstance(outcome.error.__cause__, httpx.ConnectError)


# Leaving


def wait_until_disconnected(site: Site, run: Opened) -> None:
    site.until(lambda: not any(request["open"] for request in site.requests(run.id)), "all readers disconnect")


def test_leaving_early_disconnects_from_the_server(kind: str, site: Site, run: Opened) -> None:
    run.append(*range(3))
    for call in (lambda client: client.read(run.id), lambda client: client.subscribe_to_run(run.id)):
        outcome = read(kind, site.base_url, run.token, call, take=1)
        assert len(outcome.items) == 1
        wait_until_disconnected(site, run)


@pytest.mark.anyio
async def test_a_cancellation_disconnects_from_the_server(site: Site, run: Opened) -> None:
    async with RealtimeClient(site.base_url, run.token) as client:
        states, chunks = client.subscribe_to_run(run.id), client.read(run.id)
        async with anyio.create_task_group() as group:

            async def follow(subscription: Any) -> None:
                async for _ in subscription:
                    pass

            group.start_soon(follow, states)
            group.start_soon(follow, chunks)
            await anyio.to_thread.run_sync(lambda: site.until_asked(run.id, times=2, open=True))
            group.cancel_scope.cancel()
        await anyio.to_thread.run_sync(wait_until_disconnected, site, run)
