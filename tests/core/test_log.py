"""The log: seqs, ends, producers, slicing and trimming, the latter two against a naive model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_realtime.core.errors import ProducerGap, RestoreOutOfOrder, StreamClosed, StreamLost
from asgi_realtime.core.log import COMPACT_AFTER, End, Entry, Log, Position, Producer
from asgi_realtime.core.sse import chunk_frame

COMPLETE = End("complete")


def filled(count: int) -> Log:
    log = Log()
    log.append([b"%d" % number for number in range(count)], 1)
    return log


def test_a_new_log_is_empty() -> None:
    log = Log()
    assert (log.first, log.next, log.size, log.end) == (0, 0, 0, None)
    assert log.frames(-1, 100) == []
    assert log.entries(-1, 100) == []
    assert log.trim(1) == 0


def test_seqs_are_consecutive_from_zero() -> None:
    log = Log()
    assert log.append([b"1"], 10) == Position(0, 1)
    assert log.append([b"2", b"3"], 20) == Position(2, 3)
    assert log.append([], 30) == Position(2, 3)
    assert log.entries(-1, 10) == [Entry(0, b"1", 10), Entry(1, b"2", 20), Entry(2, b"3", 20)]


def test_an_ended_log_accepts_nothing() -> None:
    log = filled(2)
    log.close(COMPLETE)
    log.close(End("failed"))
    assert log.end == COMPLETE
    with pytest.raises(StreamClosed, match="complete"):
        log.append([b"3"], 1)
    assert log.append([], 1) == Position(1, 2)
    assert log.next == 2


def test_an_item_that_cannot_be_framed_does_not_change_the_log() -> None:
    """Frames used to be built during the append, so a failure left seqs without entries."""
    log = filled(1)
    with pytest.raises(TypeError):
        log.append([b"good", "no bytes"], 1)  # type: ignore[list-item]
    assert log.append([b"2"], 1) == Position(1, 2)
    assert [entry.data for entry in log.entries(-1, 10)] == [b"0", b"2"]
    assert log.size == sum(map(len, log.frames(-1, 1000)))


def test_items_that_a_producer_has_stored_are_skipped() -> None:
    log = Log()
    assert log.append([b"a", b"b"], 1, producer=Producer("p", 0)) == Position(1, 2)
    log.append([b"x"], 1)
    assert log.append([b"a", b"b"], 2, producer=Producer("p", 0)) == Position(1, 3)
    assert log.append([b"b", b"c"], 2, producer=Producer("p", 1)) == Position(3, 4)
    assert log.append([], 2, producer=Producer("new", 0)) == Position(-1, 4)
    assert [entry.data for entry in log.entries(-1, 10)] == [b"a", b"b", b"x", b"c"]
    assert log.unseen([b"c", b"d"], Producer("p", 2)) == [b"d"]
    assert log.unseen([b"e"], Producer("new", 0)) == [b"e"]


def test_a_gap_in_the_count_of_a_producer_is_rejected() -> None:
    log = Log()
    log.append([b"a"], 1, producer=Producer("p", 0))
    with pytest.raises(ProducerGap, match="starts at item 2, expected 1") as refusal:
        log.append([b"c"], 1, producer=Producer("p", 2))
    assert refusal.value.expected == 1
    assert log.next == 1


def test_a_retry_on_an_ended_log_succeeds_and_a_new_item_does_not() -> None:
    log = Log()
    log.append([b"a"], 1, producer=Producer("p", 0))
    log.close(COMPLETE)
    assert log.append([b"a"], 2, producer=Producer("p", 0)) == Position(0, 1)
    with pytest.raises(StreamClosed):
        log.append([b"a", b"b"], 2, producer=Producer("p", 0))
    assert log.unseen([b"b"], Producer("p", 1)) == [b"b"]


def test_a_lost_item_is_restored_at_its_seq_only() -> None:
    log = filled(3)
    with pytest.raises(StreamLost, match="entry 1 was lost, and other entries were appended up to 2"):
        log.append([b"1"], 1, at=1)
    with pytest.raises(RestoreOutOfOrder, match="entry 5 was lost; entries 3 to 4 must be restored before it"):
        log.append([b"5"], 1, at=5)
    assert log.append([b"3"], 1, at=3) == Position(3, 4)


def test_stored_items_are_skipped_when_others_are_restored() -> None:
    log = Log()
    log.append([b"0", b"1"], 1, producer=Producer("p", 0))
    assert log.append([b"1", b"2"], 1, producer=Producer("p", 1), at=1) == Position(2, 3)
    assert [entry.data for entry in log.entries(-1, 10)] == [b"0", b"1", b"2"]


def test_an_end_can_hide_its_error() -> None:
    assert End("failed", "a message").without_error() == End("failed")


def test_frames_are_limited_by_size_but_never_to_none() -> None:
    log = filled(5)
    frame = len(chunk_frame(0, b"0"))
    assert log.frames(-1, frame * 2) == [chunk_frame(0, b"0"), chunk_frame(1, b"1")]
    assert log.frames(-1, frame * 2 - 1) == [chunk_frame(0, b"0")]
    assert log.frames(2, 1) == [chunk_frame(3, b"3")]
    assert log.frames(4, 1000) == []
    assert log.frames(99, 1000) == []


def test_trimming_keeps_the_last_entry_and_the_next_seq() -> None:
    log = filled(5)
    log.append([b"x" * 100], 1, producer=Producer("p", 0))
    freed = log.trim(1)
    assert freed == 5 * len(chunk_frame(0, b"0"))
    assert (log.first, log.next) == (5, 6)
    assert log.trim(1) == 0
    assert log.append([b"x" * 100], 1, producer=Producer("p", 0)) == Position(5, 6)
    assert log.append([b"7"], 1) == Position(6, 7)


def test_trimming_removes_as_few_entries_as_possible() -> None:
    log = filled(5)
    frame = len(chunk_frame(0, b"0"))
    assert log.trim(frame * 5) == 0
    assert log.trim(frame * 5 - 1) == frame
    assert (log.first, log.size) == (1, frame * 4)
    assert log.trim(frame * 2) == frame * 2
    assert log.first == 3


@pytest.mark.parametrize("count", [COMPACT_AFTER - 1, COMPACT_AFTER, COMPACT_AFTER + 1, COMPACT_AFTER * 3])
def test_a_long_log_frees_trimmed_slots(count: int) -> None:
    log = filled(count)
    kept = [chunk_frame(count - 1, b"%d" % (count - 1))]
    log.trim(1)
    assert log.frames(-1, 10_000) == kept
    assert log.entries(-1, 10) == [Entry(count - 1, b"%d" % (count - 1), 1)]
    assert len(log._frames) <= COMPACT_AFTER + 2
    assert log.append([b"more"], 2) == Position(count, count + 1)
    assert log.frames(count - 1, 10_000) == [chunk_frame(count, b"more")]
    assert log.size == len(kept[0]) + len(chunk_frame(count, b"more"))


class NaiveLog:
    """The semantics of the log, without its optimizations."""

    def __init__(self) -> None:
        self.frames: dict[int, bytes] = {}
        self.next = self.size = 0

    def append(self, items: list[bytes]) -> None:
        for item in items:
            self.frames[self.next] = chunk_frame(self.next, item)
            self.size += len(self.frames[self.next])
            self.next += 1

    def trim(self, max_bytes: int) -> None:
        while self.size > max_bytes and len(self.frames) > 1:
            self.size -= len(self.frames.pop(next(iter(self.frames))))

    def after(self, cursor: int) -> list[bytes]:
        return [frame for seq, frame in self.frames.items() if seq > cursor]


ITEMS = st.lists(st.integers(0, 60).map(lambda size: b"x" * size), max_size=30)
MANY = [b""] * (COMPACT_AFTER + 200)
STEPS = st.lists(st.one_of(ITEMS, st.integers(0, 1500)), max_size=40)


@settings(deadline=None, max_examples=60)
@given(steps=STEPS, cursors=st.lists(st.integers(-200, 400), max_size=8), limit=st.integers(1, 900))
def test_a_log_behaves_like_a_naive_one(steps: list[list[bytes] | int], cursors: list[int], limit: int) -> None:
    """A step appends items, or trims to a number of bytes."""
    log, naive = Log(), NaiveLog()
    log.append(MANY, 0)  # gives the next trims something to compact
    naive.append(MANY)
    log.trim(3000)
    naive.trim(3000)
    for step in steps:
        if isinstance(step, int):
            before = log.size
            freed = log.trim(step)
            naive.trim(step)
            assert freed == before - log.size
        else:
            log.append(step, 0)
            naive.append(step)
        assert (log.first, log.next, log.size) == (next(iter(naive.frames)), naive.next, naive.size)
    for cursor in (-1, log.next - 1, *(len(MANY) + cursor for cursor in cursors)):
        expected = naive.after(cursor)
        assert log.frames(cursor, 10**9) == expected
        some = log.frames(cursor, limit)
        assert some == expected[: len(some)]
        assert len(some) == min(1, len(expected)) or sum(map(len, some)) <= limit
        assert len(some) == len(expected) or sum(map(len, expected[: len(some) + 1])) > limit
        entries = log.entries(cursor, limit)
        assert [chunk_frame(entry.seq, entry.data) for entry in entries] == expected[:limit]


def test_a_copy_can_continue_at_another_seq() -> None:
    log = filled(3)
    log.restart(10)
    assert (log.first, log.next, log.size) == (10, 10, 0)
    assert log.append([b"10"], 1) == Position(10, 11)
    assert [entry.seq for entry in log.entries(5, 10)] == [10]
