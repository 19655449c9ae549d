"""The official client in Node reads streams from any position, across disconnects, with the right indexes and times."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import pytest

from tests.e2e.conftest import Relay, both_brokers
from tests.e2e.node import Program, running
from tests.e2e.site import STREAM_BYTES, Line, Site

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("node_ready")]

CHUNKS: list[Any] = [
    "text",
    "",
    'quote " and\nnew line',
    "\u2028 Zürich \U0001f600",
    0,
    -1.5,
    True,
    False,
    None,
    [],
    {},
]
CHUNKS += [{}, {"nested": [{"a": None}], "data": "data: x", "id": "id: 1"}, [["a"], 2], "[1, 2]", "null", '{"a": 1}']


def chunks_in(lines: list[Line]) -> list[Any]:
    return [line["chunk"] for line in lines if "chunk" in line]


def read_all(site: Site, run: str, **given: Any) -> list[Line]:
    with running("read", site, run=run, **given) as reader:
        return reader.rest()


def test_every_chunk_arrives_once_in_order_and_unchanged(site: Site) -> None:
    run = site.open()
    run.append(*CHUNKS[:5])
    with ExitStack() as stack:
        readers = [
            stack.enter_context(running("read", site, run=run.id, key="default", by=by, token=run.token))
            for by in ("read", "fetchStream", "parts")
        ]
        seen = [[reader.until("chunk") for _ in range(5)] for reader in readers]
        for chunk in CHUNKS[5:]:
            run.append(chunk)
            for chunks, reader in zip(seen, readers, strict=True):
                chunks.append(reader.until("chunk"))  # while the stream is open
        run.end()
        assert [reader.rest() for reader in readers] == [[{"end": len(CHUNKS)}]] * 3
    assert seen == [CHUNKS] * 3
    assert len(site.requests(f"/streams/{run.id}/")) == 3


def test_a_long_stream_arrives_complete(site: Site) -> None:
    run = site.open()
    expected = list(range(3000))
    with running("read", site, run=run.id, token=run.token) as reader:
        site.until_asked(f"/streams/{run.id}/default")
        for start in range(0, 3000, 500):
            run.append(*expected[start : start + 500])
        run.end()
        assert chunks_in(reader.rest()) == expected
    assert chunks_in(read_all(site, run.id)) == expected


def test_a_reader_waits_for_a_stream_that_does_not_exist_yet(site: Site) -> None:
    run = site.open()
    with running("read", site, run=run.id, key="later", token=run.token) as reader:
        site.until_asked(f"/streams/{run.id}/later")
        run.append("other", stream="other")
        run.append("here", stream="later")
        assert reader.next("chunk") == "here"
        run.end()
        assert reader.rest() == [{"end": 1}]


def test_a_stream_of_a_run_that_has_ended_ends_immediately(site: Site) -> None:
    run = site.open()
    run.append("a", "b", "c")
    run.end(error="bad")
    assert read_all(site, run.id, token=run.token) == [{"chunk": "a"}, {"chunk": "b"}, {"chunk": "c"}, {"end": 3}]
    assert read_all(site, run.id, key="never-written", token=run.token) == [{"end": 0}]


@both_brokers
def test_reading_starts_at_an_index(site: Site) -> None:
    run = site.open()
    run.append(*range(6))
    with running("read", site, run=run.id, token=run.token, options={"startIndex": 4}) as reader:
        assert [reader.next("chunk") for _ in range(2)] == [4, 5]
        with running("read", site, run=run.id, token=run.token, options={"startIndex": 8}) as ahead:
            site.until_asked(f"/streams/{run.id}/", times=2)
            run.append(6, 7, 8)
            assert [reader.next("chunk") for _ in range(3)] == [6, 7, 8]
            assert ahead.next("chunk") == 8
            run.end()
            assert (reader.rest(), ahead.rest()) == ([{"end": 5}], [{"end": 1}])


@both_brokers
def test_reading_past_the_end_is_an_error(site: Site) -> None:
    run = site.open()
    run.append(0, 1, 2)
    run.end()
    assert read_all(site, run.id, token=run.token, options={"startIndex": 3}) == [{"end": 0}]
    for number, index in enumerate((4, 1000), 2):
        (line,) = read_all(site, run.id, token=run.token, options={"startIndex": index})
        assert line["error"]["status"] == 409
        assert len(site.requests(f"/streams/{run.id}/")) == number


def test_reading_from_the_latest_skips_earlier_chunks(site: Site) -> None:
    run = site.open()
    run.append("old", "older")
    with running("read", site, run=run.id, token=run.token, options={"from": "latest"}) as reader:
        site.until(lambda: [seen for seen in site.requests(f"/streams/{run.id}/") if seen["status"] == 200], "it reads")
        run.append("new")
        assert reader.next("chunk") == "new"
        run.end()
        assert reader.rest() == [{"end": 1}]
    assert read_all(site, run.id, options={"from": "latest"}) == [{"end": 0}]
    assert chunks_in(read_all(site, run.id, options={"from": "beginning"})) == ["old", "older", "new"]


def test_reading_from_the_latest_resumes_there_after_a_disconnect(site: Site) -> None:
    run = site.open()
    run.append("old")
    with Relay(site.port) as relay:
        base_url = f"{relay.url}/realtime"
        with running("read", site, baseURL=base_url, run=run.id, token=run.token, options={"from": "latest"}) as reader:
            site.until(
                lambda: [seen for seen in site.requests(f"/streams/{run.id}/") if seen["status"] == 200], "it reads"
            )
            run.append("a")
            assert reader.next("chunk") == "a"
            relay.cut()
            run.append("b")
            assert reader.next("chunk") == "b"
            run.end()
            assert reader.rest() == [{"end": 2}]


def test_parts_have_their_index_and_the_time_of_their_append(site: Site) -> None:
    run = site.open()
    times = [time.time() * 1000]
    for number in range(3):
        run.append(number)
        times.append(time.time() * 1000)
    run.end()
    parts = [line["part"] for line in read_all(site, run.id, key="default", by="parts") if "part" in line]
    assert [part["id"] for part in parts] == ["0", "1", "2"]
    for part, before, after in zip(parts, times, times[1:], strict=False):
        assert before - 1 <= part["timestamp"] <= after + 1


@both_brokers
def test_a_cut_connection_loses_and_doubles_nothing(site: Site) -> None:
    run = site.open()
    with (
        Relay(site.port) as relay,
        running("read", site, baseURL=f"{relay.url}/realtime", run=run.id, token=run.token) as reader,
    ):
        seen = []
        for start in range(0, 40, 10):
            run.append(*range(start, start + 5))
            seen += [reader.next("chunk") for _ in range(5)]
            relay.cut()
            run.append(*range(start + 5, start + 10))  # while the client is disconnected, or after it is back
            seen += [reader.next("chunk") for _ in range(5)]
        run.end()
        assert reader.rest() == [{"end": 40}]
    assert seen == list(range(40))
    resumed = [seen["last_event_id"] for seen in site.requests(f"/streams/{run.id}/")]
    assert resumed == [None, "4", "14", "24", "34"]


def test_a_cut_in_the_middle_of_many_chunks_loses_and_doubles_nothing(site: Site) -> None:
    run = site.open()
    run.append(*range(2000))
    with (
        Relay(site.port) as relay,
        running("read", site, baseURL=f"{relay.url}/realtime", run=run.id, token=run.token) as reader,
    ):
        seen = []
        for _ in range(4):
            seen.append(reader.next("chunk"))
            relay.cut()  # wherever it is by now
            run.append(*range(2000 + 100 * len(seen), 2100 + 100 * len(seen)))
        run.end()
        seen += chunks_in(reader.rest())
    assert seen == [*range(2000), *range(2100, 2500)]


def test_a_disconnect_before_the_first_chunk_restarts_the_stream(site: Site) -> None:
    run = site.open()
    with (
        Relay(site.port) as relay,
        running("read", site, baseURL=f"{relay.url}/realtime", run=run.id, token=run.token) as reader,
    ):
        site.until_asked(f"/streams/{run.id}/")
        relay.cut()
        run.append("a")
        run.end()
        assert reader.rest() == [{"chunk": "a"}, {"end": 1}]


def test_the_timeout_of_the_client_ends_the_reading(site: Site) -> None:
    run = site.open()
    run.append("a", "b")
    with (
        running("read", site, run=run.id, options={"timeoutInSeconds": 1}) as reader,
        running("read", site, run=run.id, options={"timeoutInSeconds": 1, "startIndex": 9}) as ahead,
    ):
        assert reader.rest() == [{"chunk": "a"}, {"chunk": "b"}, {"end": 2}]
        assert ahead.rest() == [{"end": 0}]
    run.end()
    assert len(site.requests(f"/streams/{run.id}/")) == 2


def test_an_invalid_timeout_is_rejected(site: Site) -> None:
    run = site.open()
    for seconds in (601, -1, 0.5):
        (line,) = read_all(site, run.id, options={"timeoutInSeconds": seconds})
        assert line["error"]["status"] == 400
        assert "600" in line["error"]["message"] or "subscribe" in line["error"]["message"]


def overflown(site: Site) -> tuple[Any, int, list[str]]:
    """A run with a stream larger than its retention, the number of its chunks, and the chunks."""
    run = site.open()
    chunks = [f"{number:04d}" + "x" * 1000 for number in range(3 * STREAM_BYTES // 1000)]
    run.append(*chunks)
    return run, len(chunks), chunks


def test_an_expired_resume_position_is_an_error(site: Site) -> None:
    run, count, chunks = overflown(site)
    (line,) = read_all(site, run.id, token=run.token, options={"startIndex": 1})
    assert line["error"]["status"] == 410
    with running("read", site, run=run.id, token=run.token, options={"startIndex": count - 3}) as reader:
        assert [reader.next("chunk") for _ in range(3)] == chunks[-3:]
        run.end()
        assert reader.rest() == [{"end": 3}]


def test_leaving_a_stream_closes_its_request(site: Site) -> None:
    run = site.open()
    run.append("a")

    def nothing_open() -> bool:
        return not any(seen["open"] for seen in site.requests(f"/streams/{run.id}/"))

    with running("read", site, run=run.id, token=run.token, breakAfter=1) as reader:
        assert reader.rest() == [{"chunk": "a"}, {"end": 1}]
        site.until(nothing_open, "nothing is open")
    with running("read", site, run=run.id, token=run.token) as reader:
        assert reader.next("chunk") == "a"
        reader.send("abort")
        assert_ended_by_abort(reader)
        site.until(nothing_open, "nothing is open")
    run.end()


def assert_ended_by_abort(reader: Program) -> None:
    (line,) = reader.rest()
    assert line == {"end": 1} or line["error"]["name"] == "AbortError"
