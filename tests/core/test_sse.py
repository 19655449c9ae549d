from __future__ import annotations

from collections.abc import Callable

import pytest

from asgi_realtime.core.errors import UsageError
from asgi_realtime.core.sse import HEARTBEAT, chunk_frame, comment_line, control_frame, frame_data, retry_line
from asgi_realtime.testing import Event, EventParser


def test_a_chunk_is_an_id_and_one_line_of_data() -> None:
    assert chunk_frame(0, b'"hi"') == b'id: 0\ndata: "hi"\n\n'


@pytest.mark.parametrize("seq", [0, 9, 10, 2**53])
@pytest.mark.parametrize("data", [b"1", b'{"a":"data: x"}', b'"' + b"x" * 5000 + b'"'])
def test_frame_data_returns_the_data_of_a_frame(seq: int, data: bytes) -> None:
    frame = chunk_frame(seq, data)
    assert frame_data(frame) == data
    assert EventParser().feed(frame) == [Event("message", data.decode(), str(seq))]


def test_a_control_event_has_a_name() -> None:
    frame = control_frame("end", b'{"reason":"complete"}', id="41")
    assert frame == b'event: end\nid: 41\ndata: {"reason":"complete"}\n\n'


def test_a_control_event_can_set_the_reconnection_time() -> None:
    frame = control_frame("reconnect", b"{}", retry_ms=250)
    assert frame == b"event: reconnect\nretry: 250\ndata: {}\n\n"
    assert EventParser().feed(frame) == [Event("reconnect", "{}", None, 250)]


@pytest.mark.parametrize("data", [None, b""])
def test_an_event_without_data_is_dispatched(data: bytes | None) -> None:
    assert EventParser().feed(control_frame("ready", data)) == [Event("ready", "")]


def test_retry_and_comments_dispatch_no_event() -> None:
    """They ended with an empty line, at which httpx-sse and fetch-event-source dispatch an empty message."""
    assert retry_line(1000) == b"retry: 1000\n"
    assert comment_line("é") == b": \xc3\xa9\n"
    assert HEARTBEAT == b": heartbeat\n"
    parser = EventParser()
    assert parser.feed(retry_line(1000) + comment_line("é") + HEARTBEAT) == []
    assert parser.comments == ["é", "heartbeat"]
    assert parser.retry == 1000


@pytest.mark.parametrize("bad", ["\r", "\n", "\0", "a\nb"])
@pytest.mark.parametrize(
    "make",
    [
        lambda bad: control_frame(bad, b"1"),
        lambda bad: control_frame("end", b"1", id=bad),
        lambda bad: comment_line(bad),
    ],
    ids=["event", "id", "comment"],
)
def test_line_breaks_and_nul_are_rejected(make: Callable[[str], bytes], bad: str) -> None:
    with pytest.raises(UsageError, match="CR, LF or NUL"):
        make(bad)


@pytest.mark.parametrize("data", [b"1\n2", b"1\r"])
def test_data_with_line_breaks_is_rejected(data: bytes) -> None:
    with pytest.raises(UsageError, match="one line of JSON"):
        control_frame("run", data)


def test_an_event_needs_a_name_and_retry_cannot_be_negative() -> None:
    with pytest.raises(UsageError, match="event is empty"):
        control_frame("", b"1")
    with pytest.raises(UsageError, match="retry_ms is -1"):
        retry_line(-1)


def test_a_lone_surrogate_does_not_break_a_frame() -> None:
    assert comment_line("\ud800") == b": ?\n"


def test_unicode_line_breaks_in_data_are_escaped() -> None:
    assert control_frame("run", '{"a":"\u2028ü"}'.encode()) == 'event: run\ndata: {"a":"\\u2028ü"}\n\n'.encode()
