from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_realtime.core.event_stream import Event, EventParser

STREAM = (
    "\ufeff: hello\n"
    "retry: 1000\n\n"
    "id: 1\ndata: a\n\n"
    "event: end\ndata: über\ndata:  two\ndata\n\n"
    "id\ndata:x:y\n\n"
    "data: never ended"
)
EVENTS = [
    Event("message", "a", "1"),
    Event("end", "über\n two\n", "1"),
    Event("message", "x:y", ""),
]


def parse(*parts: bytes) -> tuple[list[Event], EventParser]:
    parser = EventParser()
    return [event for part in parts for event in parser.feed(part)], parser


def encoded(line_end: str) -> bytes:
    return STREAM.replace("\n", line_end).encode()


@pytest.mark.parametrize("line_end", ["\n", "\r", "\r\n"], ids=["lf", "cr", "crlf"])
def test_a_stream_split_anywhere_parses_the_same(line_end: str) -> None:
    data = encoded(line_end)
    cuts = [[data[:at], data[at:]] for at in range(len(data) + 1)]
    byte_by_byte = [data[at : at + 1] for at in range(len(data))]
    for parts in [[data], byte_by_byte, *cuts]:
        events, parser = parse(*parts)
        assert events == EVENTS
        assert parser.comments == ["hello"]
        assert parser.retry == 1000
        assert parser.last_event_id == ""


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, len(encoded("\r\n")))))
def test_a_stream_in_any_number_of_parts_parses_the_same(cuts: list[int]) -> None:
    data = encoded("\r\n")
    edges = [0, *sorted(cuts), len(data)]
    assert parse(*(data[start:end] for start, end in zip(edges, edges[1:], strict=False)))[0] == EVENTS


def test_line_ends_can_be_mixed() -> None:
    assert parse(b"data: a\rdata: b\ndata: c\r\n\n")[0] == [Event("message", "a\nb\nc")]


def test_an_empty_part_between_cr_and_lf_keeps_the_crlf() -> None:
    assert parse(b"data: a\r", b"", b"\ndata: b\r", b"\n\r", b"\n")[0] == [Event("message", "a\nb")]


@pytest.mark.parametrize(
    ("data", "events"),
    [
        (b"data\n\ndata\ndata\n\ndata:", [Event("message", ""), Event("message", "\n")]),
        (b"data:test\n\ndata: test\n\n", [Event("message", "test")] * 2),
        (b"event: lonely\n\ndata: x\n\n", [Event("message", "x")]),
        (b"event:\ndata: x\n\n", [Event("message", "x")]),
        (b"event: a\nevent: b\ndata: x\n\n", [Event("b", "x")]),
        (b"id: 1\ndata: x\n\ndata: y\n\n", [Event("message", "x", "1"), Event("message", "y", "1")]),
        (b"id: 1\n\ndata: y\n\n", [Event("message", "y", "1")]),
        (b"id: 1\nid: 2\0\ndata: x\n\n", [Event("message", "x", "1")]),
        (b"retry: 5\ndata: x\n\ndata: y\n\n", [Event("message", "x", None, 5), Event("message", "y")]),
        (b"retry: -5\nretry: 1.5\nretry:\ndata: x\n\n", [Event("message", "x")]),
        ("retry: ٣\ndata: x\n\n".encode(), [Event("message", "x")]),
        (b"unknown: 1\nDATA: 2\n data: 3\n\n", []),
        (b"data: \xff\n\n", [Event("message", "\ufffd")]),
        (b"\xef\xbb\xbfdata: x\n\n\xef\xbb\xbfdata: y\n\n", [Event("message", "x")]),
        (b"data: x", []),
    ],
)
def test_fields_are_parsed_as_the_standard_says(data: bytes, events: list[Event]) -> None:
    assert parse(data)[0] == events


def test_the_data_of_an_event_can_be_decoded() -> None:
    (event,), _ = parse(b'data: {"a":\ndata: 1}\n\n')
    assert event.json() == {"a": 1}
    with pytest.raises(ValueError):
        Event("message", "text").json()


def test_an_id_takes_effect_at_the_end_of_its_event() -> None:
    parser = EventParser()
    parser.feed(b"id: 1\n")
    assert parser.last_event_id is None
    parser.feed(b"\n")
    assert parser.last_event_id == "1"


def test_a_long_line_can_arrive_in_many_parts() -> None:
    parser = EventParser()
    parser.feed(b"data: ")
    for _ in range(10_000):
        assert parser.feed(b"x" * 100) == []
    assert parser.feed(b"\n\n") == [Event("message", "x" * 1_000_000)]
