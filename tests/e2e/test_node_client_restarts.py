"""The official client in Node across a shutdown and a restart of the server.

With the memory broker all data is lost: the client notices and continues with the new state. With Redis nothing is
lost, and another process keeps executing the run.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from tests.e2e.node import running
from tests.e2e.site import Site, serving, starting

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("node_ready")]


@pytest.fixture(scope="module")
def memory_site() -> Iterator[Site]:
    with serving("memory") as site:
        yield site


@pytest.fixture
def lone(memory_site: Site) -> Site:
    """One process that keeps its data in memory."""
    memory_site.ensure_running()
    return memory_site


@pytest.fixture(scope="module")
def redis_sites(redis_url: str) -> Iterator[tuple[Site, Site]]:
    front = Site(redis_url)
    back = Site(redis_url, prefix=front.prefix)
    with starting(front, back):
        yield front, back


@pytest.fixture
def pair(redis_sites: tuple[Site, Site]) -> tuple[Site, Site]:
    """Two processes on one Redis: one that serves the clients and restarts, and one that keeps executing runs."""
    for site in redis_sites:
        site.ensure_running()
    return redis_sites


def test_a_stream_in_memory_ends_with_an_error_after_a_crash(lone: Site) -> None:
    run = lone.open()
    run.append("a", "b")
    with running("read", lone, run=run.id, token=run.token) as reader:
        assert [reader.next("chunk") for _ in range(2)] == ["a", "b"]
        lone.crash()
        lone.start()
        (line,) = reader.rest()  # an "end" would mean that the stream is complete
        assert line["error"]["status"] == 404
        (asked,) = lone.requests(f"/streams/{run.id}/")
        assert (asked["last_event_id"], asked["status"]) == ("1", 404)


def test_a_list_in_memory_continues_with_the_new_runs(lone: Site) -> None:
    tag = f"user:{secrets.token_hex(4)}"
    before = lone.open(tags=[tag])
    with running("subscribe", lone, feed="tags", tags=tag, token=lone.token(f"read:tags:{tag}")) as feed:
        assert feed.next("run")["id"] == before.id
        before.update(metadata={"a": 1})
        feed.until("run", lambda run: run["metadata"] == {"a": 1})
        lone.until_asked("/v1/runs", query="live=true", open=True)
        lone.stop()
        lone.start()
        after = lone.open(tags=[tag])
        assert feed.until("run", lambda run: run["id"] != before.id)["id"] == after.id
        after.end(output="done")
        assert feed.until("run", lambda run: "finishedAt" in run)["output"] == "done"
        statuses = [seen["status"] for seen in lone.requests("/v1/runs") if not seen["open"]]
        assert statuses.count(409) == 1 and set(statuses) == {200, 409}


def test_an_empty_list_in_memory_continues(lone: Site) -> None:
    tag = f"user:{secrets.token_hex(4)}"
    with running("subscribe", lone, feed="tags", tags=tag, token=lone.token(f"read:tags:{tag}")) as feed:
        lone.until_asked("/v1/runs", query="live=true", open=True)
        lone.restart()
        run = lone.open(tags=[tag])
        assert feed.next("run")["id"] == run.id
        run.end(output="done")
        assert feed.until("run", lambda run: "finishedAt" in run)["output"] == "done"


def test_a_run_in_memory_is_lost_and_not_polled_forever(lone: Site) -> None:
    run = lone.open()
    with running("subscribe", lone, feed="run", run=run.id, token=run.token) as feed:
        feed.next("run")
        lone.until_asked(f"/runs/{run.id}", query="live=true", open=True)
        lone.restart()
        lone.until_asked(f"/runs/{run.id}")
        lone.until(lambda: lone.requests(f"/runs/{run.id}")[-1]["status"] == 404, "the feed gets 404")
        other = lone.open()
        with running("read", lone, run=other.id, token=other.token) as reader:  # long enough for another poll
            other.end()
            reader.rest()
        assert [seen["status"] for seen in lone.requests(f"/runs/{run.id}")] in ([404], [409, 404])


def test_a_stream_on_redis_continues_after_a_crash(pair: tuple[Site, Site]) -> None:
    front, back = pair
    run = back.open()
    run.append(*range(5))
    with running("read", front, run=run.id, token=run.token) as reader:
        assert [reader.next("chunk") for _ in range(5)] == list(range(5))
        front.crash()
        run.append(*range(5, 10))  # while there is no server
        front.start()
        assert [reader.next("chunk") for _ in range(5)] == list(range(5, 10))
        run.append(10)
        assert reader.next("chunk") == 10
        run.end()
        assert reader.rest() == [{"end": 11}]
        assert [seen["last_event_id"] for seen in front.requests(f"/streams/{run.id}/")] == ["4"]


def test_a_run_on_redis_is_followed_over_a_restart(pair: tuple[Site, Site]) -> None:
    front, back = pair
    run = back.open(metadata={"step": 0})
    with running("subscribe", front, feed="run", run=run.id, token=run.token) as feed:
        assert feed.next("run")["metadata"] == {"step": 0}
        front.until_asked(f"/runs/{run.id}", query="live=true", open=True)
        front.stop()
        run.update(metadata={"step": 1})
        front.start()
        assert feed.next("run")["metadata"] == {"step": 1}
        run.end(output="done")
        *_, last, _ = feed.rest()
        assert last["run"]["output"] == "done"
        assert {seen["status"] for seen in front.requests(f"/runs/{run.id}")} == {200}


def test_a_list_on_redis_is_followed_over_a_restart(pair: tuple[Site, Site]) -> None:
    front, back = pair
    tag = f"user:{secrets.token_hex(4)}"
    runs = [back.open(tags=[tag]) for _ in range(3)]
    with running("subscribe", front, feed="tags", tags=tag, token=front.token(f"read:tags:{tag}")) as feed:
        assert {feed.next("run")["id"] for _ in runs} == {run.id for run in runs}
        front.until_asked("/v1/runs", query="live=true", open=True)
        front.stop()
        runs[0].end(output="while it was away")
        late = back.open(name="late", tags=[tag])
        front.start()
        shown = [feed.next("run") for _ in range(2)]
        assert {run["id"]: run.get("output") for run in shown} == {runs[0].id: "while it was away", late.id: None}
        assert all(seen["status"] in (200, None) for seen in front.requests("/v1/runs"))
        assert not front.requests("/v1/runs", query="offset=-1")  # it resumes and does not start over


def test_a_batch_on_redis_is_followed_over_a_restart(pair: tuple[Site, Site]) -> None:
    front, back = pair
    batch = back.post("batch_trigger", items=[["steps", {"count": 1}], ["steps", {"count": 1}]])
    with running("subscribe", front, feed="batch", batch=batch["id"], token=batch["publicAccessToken"]) as feed:
        feed.until("run", lambda run: run["metadata"] == {"step": 0})
        front.restart()
        for run_id in batch["runs"]:
            back.send(run_id, "next", "go")
        for _ in batch["runs"]:
            assert feed.until("run", lambda run: "finishedAt" in run)["output"] == {"received": ["go"]}


def test_streams_and_run_on_redis_are_followed_together_over_a_restart(pair: tuple[Site, Site]) -> None:
    front, back = pair
    run = back.open()
    run.append("a", "b")
    with running("subscribe", front, feed="run", run=run.id, token=run.token, withStreams=True) as feed:
        assert [feed.until("chunk") for _ in range(2)] == ["a", "b"]
        front.restart()
        run.append("c")
        assert feed.until("chunk") == "c"
        run.append("d")
        run.end(output="done")
        assert feed.until("chunk") == "d"


def test_a_pipe_continues_after_a_restart(pair: tuple[Site, Site]) -> None:
    front, back = pair
    run = back.open()
    with (
        running("pipe", front, run=run.id, key="out") as pipe,
        running("read", back, run=run.id, key="out", token=run.token) as reader,
    ):
        pipe.send(list(range(5)))
        seen = [reader.next("chunk") for _ in range(5)]
        front.stop()
        pipe.send(list(range(5, 10)))
        front.start()
        pipe.send(None)
        seen += [reader.next("chunk") for _ in range(5)]
        assert pipe.until("complete")
        run.end()
        assert reader.rest() == [{"end": 10}]
    assert seen == list(range(10))
