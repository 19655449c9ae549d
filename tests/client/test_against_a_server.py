"""The clients with the library's own server: uvicorn in a process of its own, over real sockets."""

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
from tests.e2e.site import SECRET, STREAM_BYTES, TEST_S, Opened, Site, serving, starting

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(TEST_S)]


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


def test_a_stream_that_is_cut_again_and_again_arrives_once(kind: str, site: Site, run: Opened, relay: Relay) -> None:
    cuts, step = 10, 20
    run.append(*range(step))

    def disturb(chunk: int) -> None:
        if chunk % step == step // 2 and chunk < cuts * step:  # what follows is on its way, or here, or nowhere yet
            run.append(*range(chunk + step // 2, chunk + step // 2 + step))
            relay.cut()
        if chunk == cuts * step:
            run.end()

    told = read(
        kind,
        mounted(relay),
        run.token,
        lambda client: client.read(run.id),
        on_item=disturb,
        fake_time=FakeTime(),
    )
    assert (told.items, told.errors) == (list(range(cuts * step + step)), [])
    positions = [asked["last_event_id"] for asked in site.requests(f"/streams/{run.id}/")]
    assert len(positions) > cuts // 4  # a cut while what an earlier one left is still read hits nothing


def test_chunks_arrive_while_the_run_goes_on(site: Site, run: Opened) -> None:
    """Each is appended after the one before it was read."""
    run.append(0)

    def follow(chunk: int) -> None:
        run.append(chunk + 1) if chunk < 5 else run.end()

    told = read("sync", site.base_url, run.token, lambda client: client.read(run.id), on_item=follow)
    assert told.items == list(range(6))


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
            thread.join(TEST_S)
    assert [got[run.id] for run in runs] == [list(range(number)) for number in range(4)]


def test_how_a_run_ended_is_raised_after_its_last_chunk(kind: str, site: Site, run: Opened) -> None:
    run.append("last")
    run.end(error="no luck")
    told = read(kind, site.base_url, run.token, lambda client: client.read(run.id))
    assert told.items == ["last"]
    assert type(told.error) is RunFailed
    assert str(told.error) == "the run ended failed: no luck"


def test_a_canceled_run_is_told_apart(kind: str, site: Site) -> None:
    run = site.trigger("endless")
    headers = {"authorization": f"Bearer {SECRET}"}
    site.http.post(f"{site.base_url}/api/v2/runs/{run.id}/cancel", headers=headers).raise_for_status()
    told = read(kind, site.base_url, run.token, lambda client: client.read(run.id))
    assert type(told.error) is RunCanceled


def test_chunks_past_their_retention_are_a_gap(kind: str, site: Site, run: Opened) -> None:
    size, count = 1000, 2 * STREAM_BYTES // 1000
    for number in range(count):
        run.append(f"{number:04d}" + "x" * size)
    run.end()
    told = read(kind, site.base_url, run.token, lambda client: client.read_indexed(run.id), retries=1)
    (gap,) = told.errors
    assert isinstance(gap, StreamGap)
    assert (gap.requested, gap.first) == (0, told.items[0].index)
    assert [item.index for item in told.items] == list(range(gap.first, count))


@pytest.mark.parametrize(("start", "rest"), [(1, ["b", "c"]), (3, []), (9, [])])
def test_reading_goes_on_from_an_index(kind: str, site: Site, run: Opened, start: int, rest: list[str]) -> None:
    run.append("a", "b", "c")
    run.end()
    told = read(kind, site.base_url, run.token, lambda client: client.read(run.id, start_index=start))
    assert (told.items, told.errors) == (rest, [])


# Runs


def test_a_run_is_followed_to_its_end(kind: str, site: Site, run: Opened, relay: Relay) -> None:
    seen: list[RunState] = []

    def go_on(state: RunState) -> None:
        seen.append(state)
        if len(seen) == 1:
            relay.cut()
            run.update(metadata={"progress": 0.5})
        elif not state.is_completed:
            run.end(output={"pages": 3})

    told = read(
        kind,
        mounted(relay),
        run.token,
        lambda client: client.subscribe_to_run(run.id),
        on_item=go_on,
        fake_time=FakeTime(),
    )
    assert told.errors == []
    states = [(state.status, state.metadata) for state in told.items]
    assert states == [
        (Status.EXECUTING, {}),
        (Status.EXECUTING, {"progress": 0.5}),
        (Status.COMPLETED, {"progress": 0.5}),
    ]
    last = told.items[-1]
    assert (last.id, last.task, last.output, last.error) == (run.id, "opened", {"pages": 3}, None)
    assert last.is_success and last.finished_at >= last.created_at


def test_a_failed_run_ends_its_feed_with_its_error(kind: str, site: Site, run: Opened) -> None:
    run.end(error="no luck")
    (state,) = read(kind, site.base_url, run.token, lambda client: client.subscribe_to_run(run.id)).items
    assert (state.status, state.is_failed, state.error.message) == (Status.FAILED, True, "no luck")


def test_a_list_goes_on_across_a_cut(kind: str, site: Site, run: Opened, relay: Relay) -> None:
    tag = f"list:{secrets.token_hex(4)}"
    runs = [site.open(tags=[tag, "other"]) for _ in range(3)]
    seen: list[RunState] = []

    def go_on(state: RunState) -> None:
        seen.append(state)
        if len(seen) == 3:
            relay.cut()
            runs[1].end(output="news")

    told = read(
        kind,
        mounted(relay),
        site.token(f"read:tags:{tag}"),
        lambda client: client.subscribe_to_runs_with_tag([tag, "other"], created_within="1h"),
        on_item=go_on,
        take=4,
        fake_time=FakeTime(),
    )
    assert [state.id for state in told.items] == [*(run.id for run in runs), runs[1].id]
    assert told.items[-1].output == "news"
    assert set(told.items[-1].tags) == {tag, "other"}


def test_a_batch_is_followed_until_all_its_runs_are_over(kind: str, site: Site) -> None:
    batch = site.post("batch_trigger", items=[["echo", 1], ["echo", 2], ["unlucky", None]])
    told = read(
        kind,
        site.base_url,
        batch["publicAccessToken"],
        lambda client: client.subscribe_to_batch(batch["id"]),
    )
    assert told.errors == []
    last = {state.id: state for state in told.items}
    assert [last[run_id].status for run_id in batch["runs"]] == ["COMPLETED", "COMPLETED", "FAILED"]
    assert [last[run_id].output for run_id in batch["runs"]] == [1, 2, None]
    assert {state.batch_id for state in told.items} == {batch["id"]}


@pytest.mark.anyio
async def test_the_state_of_a_run(site: Site, run: Opened) -> None:
    async with RealtimeClient(site.base_url, run.token) as client:
        state = await client.get_run(run.id)
    with SyncRealtimeClient(site.base_url, run.token) as sync_client:
        assert sync_client.get_run(run.id) == state
    assert (state.id, state.status, state.is_executing) == (run.id, Status.EXECUTING, True)


# Refusals and tokens


def test_what_is_not_there_is_not_found(kind: str, site: Site) -> None:
    token = site.token("read:runs")
    for call in (
        lambda client: client.read("run_gone"),
        lambda client: client.subscribe_to_run("run_gone"),
        lambda client: client.subscribe_to_batch("batch_gone"),
    ):
        told = read(kind, site.base_url, token, call)
        assert isinstance(told.error, RunNotFound)


def test_tokens_that_are_not_good_enough(kind: str, site: Site, run: Opened) -> None:
    hour_ago = Realtime(secret_key=SECRET, clock=lambda: time.time() - 3600)
    scopes = [f"read:runs:{run.id}"]
    tokens = {
        Realtime(secret_key="another key, of 32 bytes or more").create_public_token(scopes=scopes): InvalidToken,
        hour_ago.create_public_token(scopes=scopes): ExpiredToken,
        site.token("read:runs:run_of_another"): ScopeDenied,
    }
    for token, error in tokens.items():
        told = read(kind, site.base_url, token, lambda client: client.read(run.id))
        assert type(told.error) is error
        assert token not in str(told.error)


def test_a_token_that_expires_meanwhile_is_replaced(kind: str) -> None:
    with serving("memory") as site:
        run = site.open()
        run.append(0)
        spans = iter(("10m", "3h"))
        given: list[str] = []

        def token() -> str:
            given.append(site.token(f"read:runs:{run.id}", expires_in=next(spans)))
            return given[-1]

        def go_on(chunk: int) -> None:
            if chunk == 0:
                site.post("set_ahead", seconds=3600)
                site.until(lambda: len(given) == 2 or not site.requests("/streams/")[0]["open"], "the token expires")
                run.append(1)
                run.end()

        told = read(kind, site.base_url, token, lambda client: client.read(run.id), on_item=go_on)
        assert (told.items, told.errors) == ([0, 1], [])
        assert len(given) == 2


# Servers that go


def test_a_restart_of_a_server_in_memory_loses_its_runs(kind: str) -> None:
    with serving("memory") as site:
        run = site.open()
        run.append("a")
        told = read(
            kind, site.base_url, run.token, lambda client: client.read(run.id), on_item=lambda chunk: site.restart()
        )
    assert told.items == ["a"]
    assert isinstance(told.error, RunNotFound)  # and no end: that would say that this was all


@pytest.mark.redis
@pytest.mark.parametrize("leave", [Site.stop, Site.crash])
def test_with_redis_nothing_is_lost_by_a_restart(kind: str, redis_url: str, leave: Any) -> None:
    front = Site(redis_url)
    back = Site(redis_url, prefix=front.prefix)
    with starting(front, back):
        run = back.open()
        run.append(*range(3))

        def go_on(chunk: int) -> None:
            if chunk == 1:
                leave(front)
                run.append(3, 4)
                front.start()
                run.end()

        told = read(
            kind,
            front.base_url,
            run.token,
            lambda client: client.read(run.id),
            on_item=go_on,
            fake_time=FakeTime(),
            give_up_after=None,
        )
    assert (told.items, told.errors) == (list(range(5)), [])


def test_a_server_that_does_not_come_back_is_given_up(kind: str) -> None:
    with serving("memory") as site:
        run = site.open()
        run.append("a")
        told = read(
            kind,
            site.base_url,
            run.token,
            lambda client: client.read(run.id),
            on_item=lambda chunk: site.stop(),
            fake_time=FakeTime(),
        )
    assert told.items == ["a"]
    assert type(told.error) is ServerUnreachable
    assert isinstance(told.error.__cause__, httpx.ConnectError)


# Leaving


def nobody_reads(site: Site, run: Opened) -> None:
    site.until(lambda: not any(asked["open"] for asked in site.requests(run.id)), "nobody reads any more")


def test_who_leaves_early_is_forgotten_by_the_server(kind: str, site: Site, run: Opened) -> None:
    run.append(*range(3))
    for call in (lambda client: client.read(run.id), lambda client: client.subscribe_to_run(run.id)):
        told = read(kind, site.base_url, run.token, call, take=1)
        assert len(told.items) == 1
        nobody_reads(site, run)


@pytest.mark.anyio
async def test_who_is_cancelled_is_forgotten_by_the_server(site: Site, run: Opened) -> None:
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
        await anyio.to_thread.run_sync(nobody_reads, site, run)
