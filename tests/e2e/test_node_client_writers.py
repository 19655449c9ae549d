"""The official client in Node writes: streams, as its worker does, and inputs of a run, in both directions."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.conftest import Relay, both_brokers
from tests.e2e.node import running
from tests.e2e.site import Site

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("node_ready")]

CHUNKS: list[Any] = [
    "text",
    'quote " and\nnew line',
    "\u2028 Zürich \U0001f600",
    0,
    None,
    [],
    {"nested": [{"a": 1}]},
    "",
]


def read_all(site: Site, run: str, key: str) -> list[Any]:
    with running("read", site, run=run, key=key) as reader:
        *chunks, end = reader.rest()
    assert end == {"end": len(chunks)}
    return [line["chunk"] for line in chunks]


@both_brokers
def test_a_pipe_writes_each_chunk_of_its_source(site: Site) -> None:
    run = site.open()
    with (
        running("pipe", site, run=run.id, key="out") as pipe,
        running("read", site, run=run.id, key="out", token=run.token) as reader,
    ):
        for chunk in CHUNKS:
            pipe.send([chunk])
            assert pipe.next("local") == chunk
            assert reader.next("chunk") == chunk  # while the request of the writer is open
        pipe.send(None)
        assert pipe.rest() == [{"complete": True}]
        run.append("of the host", stream="out")  # a writer that ends does not end the stream
        assert reader.next("chunk") == "of the host"
        run.end()
        assert reader.rest() == [{"end": len(CHUNKS) + 1}]
    assert [seen["method"] for seen in site.requests(f"/streams/{run.id}/self/out")] == ["PUT", "POST"]


def test_a_cut_in_the_middle_of_a_pipe_loses_and_doubles_nothing(site: Site) -> None:
    """One writer waits for its source when the connection breaks, another is sending many chunks."""
    run = site.open()
    many = [f"{number} " + "x" * 500 for number in range(100)]
    with (
        Relay(site.port) as relay,
        running("pipe", site, baseURL=f"{relay.url}/realtime", run=run.id, key="slow") as slow,
        running("pipe", site, baseURL=f"{relay.url}/realtime", run=run.id, key="fast") as fast,
        running("read", site, run=run.id, key="slow", token=run.token) as slow_reader,
        running("read", site, run=run.id, key="fast", token=run.token) as fast_reader,
    ):
        slow.send(list(range(5)))
        seen_slow = [slow_reader.next("chunk") for _ in range(5)]
        fast.send(many)
        seen_fast = [fast_reader.next("chunk")]
        relay.cut()  # between lines or inside one
        slow.send(list(range(5, 10)))
        slow.send(None)
        fast.send(None)
        seen_slow += [slow_reader.next("chunk") for _ in range(5)]
        seen_fast += [fast_reader.next("chunk") for _ in many[1:]]
        assert slow.until("complete") and fast.until("complete")
        run.end()
        assert slow_reader.rest() + fast_reader.rest() == [{"end": 10}, {"end": 100}]
    assert (seen_slow, seen_fast) == (list(range(10)), many)
    methods = [seen["method"] for seen in site.requests(f"/streams/{run.id}/self/slow")]
    assert methods == ["PUT", "POST", "HEAD", "POST"]


def test_two_writers_of_a_stream_do_not_hide_each_other(site: Site) -> None:
    run = site.open()
    with (
        running("pipe", site, run=run.id, key="out") as one,
        running("pipe", site, run=run.id, key="out") as other,
    ):
        for number in range(5):
            one.send([f"one {number}"])
            other.send([f"other {number}"])
        for pipe in (one, other):
            pipe.send(None)
            assert pipe.until("complete")
    run.end()
    found = read_all(site, run.id, "out")
    for name in ("one", "other"):
        assert [chunk for chunk in found if chunk.startswith(f"{name} ")] == [f"{name} {number}" for number in range(5)]
    assert len(found) == 10


def test_writers_merges_and_appends_arrive(site: Site) -> None:
    run = site.open()
    texts = ["plain", '{"like": "json"}', "", "line\nbreak"]
    with running("write", site, run=run.id, texts=texts) as writer:
        assert writer.rest() == [{"written": True}]
    with running("subscribe", site, feed="run", run=run.id, token=run.token, breakAfter=1) as feed:
        assert sorted(feed.next("run")["realtimeStreams"]) == ["appended", "defined", "written"]
    run.end()
    assert read_all(site, run.id, "written") == [{"number": 1}, "two", 3, [4, None]]
    assert read_all(site, run.id, "defined") == [{"first": True}, "second"]
    assert read_all(site, run.id, "appended") == texts


def test_a_run_that_has_ended_rejects_chunks(site: Site) -> None:
    run = site.open()
    run.end()
    with running("pipe", site, run=run.id, key="out") as pipe:
        pipe.send(["late"])
        pipe.send(None)
        assert pipe.until("error")["status"] == 400
    assert read_all(site, run.id, "out") == []


@pytest.mark.parametrize("program", ["pipe", "write"])
def test_a_public_token_does_not_write(site: Site, program: str) -> None:
    run = site.open()
    with running(program, site, run=run.id, key="out", texts=[], token=run.token) as writer:
        writer.send(None)
        assert writer.until("error")["status"] == 403
    run.end()
    assert read_all(site, run.id, "out") == []


@both_brokers
def test_an_input_reaches_the_task(site: Site) -> None:
    data = [{"approved": True}, "text", None]
    run = site.trigger("steps", {"count": 3})
    with running("send", site, run=run.id, input="next", data=data, token=run.token) as sender:
        assert sender.rest() == [{"sent": None}] * 3
    with running("subscribe", site, feed="run", run=run.id, token=run.token) as feed:
        *_, last, _ = feed.rest()
    assert last["run"]["output"] == {"received": data}


def test_an_input_reaches_a_worker_in_node(site: Site) -> None:
    run = site.open()
    with running("receive", site, run=run.id, input="approval") as worker:
        site.until_asked(f"/streams/{run.id}/input/approval")
        data = [{"approved": True}, "text", {"a": [1, None]}, "enough"]
        with running("send", site, run=run.id, input="approval", data=data, token=run.token) as sender:
            assert sender.rest() == [{"sent": None}] * 4
        first, *others = worker.rest()
    assert (first, others) == ({"first": data[0]}, [{"data": other} for other in data[1:]])
    run.end()


def test_a_worker_in_node_resumes_after_a_disconnect(site: Site) -> None:
    run = site.open()
    with (
        Relay(site.port) as relay,
        running("receive", site, baseURL=f"{relay.url}/realtime", run=run.id, input="approval") as worker,
    ):
        site.send(run.id, "approval", 1)
        assert worker.next("first") == 1
        site.send(run.id, "approval", 2)
        assert worker.next("data") == 2
        relay.cut()
        for data in (3, "enough"):
            site.send(run.id, "approval", data)
        assert worker.rest() == [{"data": 3}, {"data": "enough"}]
    run.end()


def test_invalid_inputs_are_rejected(site: Site) -> None:
    run, other = site.open(), site.open()
    with running("send", site, run=run.id, input="next", data=["x"], token=other.token) as sender:
        assert [line["error"]["status"] for line in sender.rest()] == [403]
    run.end()
    with running("send", site, run=run.id, input="next", data=["x"], token=run.token) as sender:
        assert [line["error"]["status"] for line in sender.rest()] == [400]
    with running("send", site, run="run_unknown", input="next", data=["x"]) as sender:
        assert [line["error"]["status"] for line in sender.rest()] == [404]
