from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_realtime.asgi.trigger_dev.ndjson import LineSplitter
from asgi_realtime.core.errors import LimitExceeded

BODY = b'{"a":1}\n\n"two"\r\n  \n[3]\t\n\r\n"last"'
LINES = [b'{"a":1}', b'"two"', b"[3]", b'"last"']


def split(*parts: bytes, max_bytes: int = 100) -> list[bytes]:
    splitter = LineSplitter(max_bytes)
    return [line for part in parts for line in splitter.feed(part)] + list(splitter.rest())


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n"])
def test_a_body_can_be_split_anywhere(end: bytes) -> None:
    body = BODY + end
    for first in range(len(body) + 1):
        for second in range(first, len(body) + 1):
            assert split(body[:first], body[first:second], body[second:]) == LINES
    assert split(*(body[place : place + 1] for place in range(len(body)))) == LINES


def test_a_byte_order_mark_is_ignored() -> None:
    assert split(b"\xef", b"\xbb\xbf1\n2") == [b"1", b"2"]


@given(st.lists(st.binary(max_size=20).map(lambda line: b"<" + line.replace(b"\n", b"") + b">")), st.data())
def test_lines_survive_any_split(lines: list[bytes], data: st.DataObject) -> None:
    body = b"\n".join(lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)))))
    assert split(*(body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True))) == lines


def test_a_line_is_yielded_when_its_end_arrives() -> None:
    splitter = LineSplitter(100)
    assert list(splitter.feed(b"1\n2")) == [b"1"]
    assert list(splitter.feed(b"")) == []
    assert list(splitter.feed(b"3\n")) == [b"23"]
    assert list(splitter.rest()) == []


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_the_length_limit_is_exact(end: bytes) -> None:
    body = b"x" * 10 + end
    for place in range(len(body) + 1):
        assert split(body[:place], body[place:], max_bytes=10) == [b"x" * 10]
        with pytest.raises(LimitExceeded, match="limit 9") as caught:
            split(body[:place], body[place:], max_bytes=9)
        assert caught.value.status == 413


def test_a_line_that_is_too_long_raises_early_but_after_earlier_lines() -> None:
    splitter = LineSplitter(10)
    seen: list[bytes] = []
    with pytest.raises(LimitExceeded):
        for line in splitter.feed(b"1\n2\n" + b"x" * 11):
            seen.append(line)  # noqa: PERF402
    assert seen == [b"1", b"2"]
    assert list(splitter.feed(b"x" * 10)) == [], "the rejected line is not kept"
    with pytest.raises(LimitExceeded):
        list(splitter.feed(b"x"))


def test_blank_lines_are_skipped_wherever_the_body_is_split() -> None:
    data = b"\n\r\n \t\n1\n\n  2 \r\n" + b"\n" * 1000 + b"3"
    for size in (1, 2, 3, 7, len(data)):
        splitter = LineSplitter(10)
        parts = [data[start : start + size] for start in range(0, len(data), size)]
        assert [*(line for part in parts for line in splitter.feed(part)), *splitter.rest()] == [b"1", b"2", b"3"]
