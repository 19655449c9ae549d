"""The load client detects every error of a server, however the bytes are split."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.chunks import make_chunk, make_text, parse_events, parse_text
from benchmarks.client import Subscriber, Transcript, Verdict, verify

_HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
_PREAMBLE = b"retry: 1000\n: hello\n\n"
_END = b'event: end\ndata: {"reason": "complete"}\n\n'


def _frame(seq: int) -> bytes:
    return f'id: {seq}\ndata: "{make_chunk(seq, 1000 + seq)}"\n\n'.encode()


def _body(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


def _subscriber(transcript: Transcript) -> Subscriber:
    return Subscriber("/", "token", transcript)


def _feed(subscriber: Subscriber, data: bytes, *, step: int = 1 << 20) -> Subscriber:
    for at in range(0, len(data), step):
        subscriber.data_received(data[at : at + step])
    return subscriber


@pytest.mark.parametrize("step", [1, 7, 100, 113, 1 << 20])
@pytest.mark.asyncio
async def test_a_correct_body_is_accepted_however_it_is_split(step: int) -> None:
    data = _HEAD + _body(_PREAMBLE + _frame(0), *map(_frame, range(1, 20)), _END) + b"0\r\n\r\n"
    transcript = Transcript()
    readers = [_feed(_subscriber(transcript), data, step=size) for size in (step, step, 1 << 20, 3)]

    assert not verify(readers, 20)
    assert all(reader.own is None and reader.ended and reader.received() == 20 for reader in readers)


@pytest.mark.asyncio
async def test_the_preamble_need_not_end_with_an_empty_line() -> None:
    data = _HEAD + _body(b"retry: 1000\n: connected\n", _frame(0), _frame(1), _END) + b"0\r\n\r\n"
    for step in (1, 7, 1 << 20):
        assert not verify([_feed(_subscriber(Transcript()), data, step=step)], 2)


@pytest.mark.asyncio
async def test_bodies_can_hold_several_frames() -> None:
    transcript = Transcript()
    single = _feed(_subscriber(transcript), _HEAD + _body(*map(_frame, range(6))))
    joined = _feed(_subscriber(transcript), _HEAD + _body(_frame(0) + _frame(1) + _frame(2), _frame(3) + _frame(4)))
    joined.data_received(_body(_frame(5)))

    assert single.position == joined.position
    assert not verify([single, joined], 6)


@pytest.mark.asyncio
async def test_heartbeats_are_ignored() -> None:
    transcript = Transcript()
    first = _feed(_subscriber(transcript), _HEAD + _body(_frame(0), b": ping 1\n\n", _frame(1)))
    second = _feed(_subscriber(transcript), _HEAD + _body(_frame(0), _frame(1), b": ping 2\r\n\r\n"))

    assert first.own is None
    assert second.own is None
    assert not verify([first, second], 2)


@pytest.mark.asyncio
async def test_a_heartbeat_inside_a_body_is_allowed() -> None:
    transcript = Transcript()
    plain = _feed(_subscriber(transcript), _HEAD + _body(_frame(0), _frame(1)))
    joined = _feed(_subscriber(transcript), _HEAD + _body(_frame(0) + b": ping\n\n" + _frame(1)))

    assert joined.own is not None
    assert joined.received() == 2
    assert not verify([plain, joined], 2)


@pytest.mark.parametrize(
    ("frames", "verdict"),
    [
        ([0, 1, 3], Verdict(missing=1)),
        ([0, 1, 2], Verdict(missing=1)),
        ([1, 2, 3], Verdict(missing=1)),
        ([0, 1, 1, 2, 3], Verdict(duplicated=1)),
        ([0, 1, 2, 3, 3], Verdict(duplicated=1)),
        ([0, 2, 1, 3], Verdict(damaged=1)),
        ([0, 1, 2, 3, 4], Verdict(damaged=1)),
        ([], Verdict(missing=4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_first", [True, False], ids=["leads", "follows"])
@pytest.mark.asyncio
async def test_one_incorrect_subscriber_is_found(frames: list[int], verdict: Verdict, is_first: bool) -> None:
    transcript = Transcript()
    right = _HEAD + _body(*map(_frame, range(4)))
    wrong = _HEAD + _body(*map(_frame, frames))
    bodies = [wrong, right, right] if is_first else [right, right, wrong]
    readers = [_feed(_subscriber(transcript), body) for body in bodies]

    assert verify(readers, 4) == verdict


@pytest.mark.parametrize(
    "damage",
    [
        lambda frame: frame.replace(b"x", b"y", 1),
        lambda frame: frame.replace(b"id: 1", b"id: 2"),
        lambda frame: frame[:-1],
        lambda frame: frame + b"event: surprise\ndata: 1\n\n",
    ],
    ids=["byte changed", "other id", "cut", "something else"],
)
@pytest.mark.asyncio
async def test_damage_is_detected(damage: Callable[[bytes], bytes]) -> None:
    transcript = Transcript()
    readers = [
        _feed(_subscriber(transcript), _HEAD + _body(_frame(0), middle, _frame(2)))
        for middle in (_frame(1), _frame(1), damage(_frame(1)))
    ]

    verdict = verify(readers, 3)
    assert verdict.damaged > 0


@pytest.mark.asyncio
async def test_a_resumed_subscriber_continues_after_its_last_chunk() -> None:
    first = _feed(_subscriber(Transcript()), _HEAD + _body(_PREAMBLE + _frame(0), _frame(1)))
    later = first.resumed()
    _feed(later, _HEAD + _body(_PREAMBLE + _frame(2), _frame(3)))

    assert later.last_event_id == 1
    assert later.received() == 4
    assert not verify([later], 4)


@pytest.mark.asyncio
async def test_a_chunk_repeated_after_a_resume_is_duplicated() -> None:
    first = _feed(_subscriber(Transcript()), _HEAD + _body(_frame(0), _frame(1)))
    later = _feed(first.resumed(), _HEAD + _body(_frame(1), _frame(2)))

    assert verify([later], 3).duplicated == 1


@pytest.mark.asyncio
async def test_a_subscriber_cut_within_a_chunk_cannot_resume() -> None:
    first = _feed(_subscriber(Transcript()), _HEAD + _body(_frame(0), _frame(1)[:20]))

    with pytest.raises(RuntimeError, match="within a chunk"):
        first.resumed()


@pytest.mark.asyncio
async def test_a_status_other_than_200_is_an_error() -> None:
    subscriber = _feed(_subscriber(Transcript()), b"HTTP/1.1 403 Forbidden\r\ntransfer-encoding: chunked\r\n\r\n")

    with pytest.raises(ConnectionError, match="403"):
        await subscriber.opened


def test_carriage_returns_are_allowed() -> None:
    events, foreign = parse_events(_frame(0).replace(b"\n", b"\r\n") + _frame(1))

    assert [event.seq for event in events] == [0, 1]
    assert foreign == 0


def test_a_stored_text_has_its_number_or_is_damaged() -> None:
    data = f'"{make_text(12, 20)}"'.encode()

    assert len(data) == 20
    assert parse_text(data, 20) == 12
    assert parse_text(data, 21) is None
    assert parse_text(data.replace(b"x", b"y", 1), 20) is None
