"""What a subscription makes of what it hears, without a connection: what takes too long to happen in a real one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from asgi_realtime.client.attempts import Attempts
from asgi_realtime.client.errors import ServerUnreachable, refusal
from asgi_realtime.client.following import ChunksFollowing, Raised, RunsFollowing
from asgi_realtime.core.errors import ExpiredToken, LimitExceeded
from asgi_realtime.core.run_json import run_json
from asgi_realtime.core.runs import RunRecord, Status

HEARTBEAT = b": heartbeat\n\n"
CONNECTED = b"retry: 1000\n\n: connected\n\n"
EXPIRED = b'event: end\ndata: {"reason":"token_expired"}\n\n'


class Clock:
    """Stands still."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def following(clock: Clock, *, give_up_s: float | None = 60.0, renewable: bool = True) -> ChunksFollowing:
    attempts = Attempts(give_up_s, clock, lambda: 1.0)
    return ChunksFollowing("/path", attempts, renewable=renewable, stream="default", start_index=0)


def connect(reader: Any) -> None:
    reader.headers("token")
    assert reader.takes(200, {"content-type": "text/event-stream; charset=utf-8"})
    assert reader.received(CONNECTED)


def pauses(
    reader: ChunksFollowing, clock: Clock, *, lasting: float = 0.0, heard: bytes = b"", silent: bool
) -> list[float]:
    """Of five connections in a row that are lost."""
    found = []
    for _ in range(5):
        connect(reader)
        clock.now += lasting
        if heard:
            assert reader.received(heard)
        reader.lost("gone", silent=silent)
        found.append(reader.pause_s)
        clock.now += reader.pause_s
    return found


def test_a_connection_that_brings_nothing_is_no_progress(clock: Clock) -> None:
    assert pauses(following(clock), clock, silent=False) == [1, 2, 4, 8, 16]


def test_a_heartbeat_is_progress(clock: Clock) -> None:
    assert pauses(following(clock), clock, heard=HEARTBEAT, silent=False) == [1] * 5


def test_a_connection_that_lasted_is_progress(clock: Clock) -> None:
    """A proxy that cuts what is silent for ten seconds is no reason to give up on the server behind it."""
    assert pauses(following(clock), clock, lasting=10, silent=False) == [1] * 5


def test_a_server_that_hangs_is_given_up(clock: Clock) -> None:
    reader = following(clock)
    assert pauses(reader, clock, lasting=45, silent=True)[:2] == [1, 0]
    raised = reader.ready[0]
    assert isinstance(raised, Raised)
    assert isinstance(raised.error, ServerUnreachable)


def test_a_server_that_only_asks_to_come_back_is_given_up(clock: Clock) -> None:
    reader = following(clock)
    for _ in range(20):
        connect(reader)
        assert not reader.received(b'event: reconnect\nretry: 10000\ndata: {"retry":10000}\n\n')
        clock.now += reader.pause_s
        if reader.ready:
            break
    else:
        pytest.fail("it is asked for ever")


def test_a_server_that_ends_each_stream_by_its_age_is_not_given_up(clock: Clock) -> None:
    """`Timeouts.stream_age` may be so short that a quiet stream has no heartbeat before it is ended."""
    reader = following(clock)
    for _ in range(20):
        connect(reader)
        clock.now += 15
        assert not reader.received(b'event: reconnect\nretry: 1000\ndata: {"retry":1000}\n\n')
        assert reader.pause_s == 1
        clock.now += reader.pause_s
    assert not reader.ready


def test_a_server_that_takes_requests_and_never_answers_is_given_up_in_time(clock: Clock) -> None:
    """It was asked for twice `silence_timeout`, though `give_up_after` was long over."""
    reader = following(clock, give_up_s=10)
    reader.headers("token")
    clock.now += 45
    reader.lost("nothing was heard", silent=True)
    (raised,) = reader.ready
    assert isinstance(raised, Raised)
    assert isinstance(raised.error, ServerUnreachable)


def test_the_last_try_is_at_the_end_of_the_time(clock: Clock) -> None:
    reader = following(clock, give_up_s=10)
    found = []
    while not reader.ready:
        reader.headers("token")
        reader.answered(503, {"retry-after": "4"}, b"")
        found.append(reader.pause_s)
        clock.now += reader.pause_s
    assert found == [4, 4, 2, 0]


def test_a_connection_that_was_of_use_begins_the_time_anew(clock: Clock) -> None:
    reader = following(clock, give_up_s=10)
    connect(reader)
    assert reader.received(HEARTBEAT)
    clock.now += 1000
    reader.lost("gone")
    assert not reader.ready
    assert reader.pause_s == 1


def test_the_time_does_not_run_while_nobody_reads(clock: Clock) -> None:
    reader = following(clock, give_up_s=10)
    reader.headers("token")
    reader.left()
    clock.now += 1000
    reader.headers("token")
    reader.lost("gone")
    assert not reader.ready


def test_who_never_gives_up_goes_on(clock: Clock) -> None:
    reader = following(clock, give_up_s=None)
    for _ in range(5000):
        reader.lost("gone")
        assert 0 < reader.pause_s <= 30
        clock.now += reader.pause_s
    assert not reader.ready


def test_of_a_pause_that_was_disturbed_the_rest_is_left(clock: Clock) -> None:
    """Who asks with a time-out shorter than the pause began it anew each time, and never came back."""
    reader = following(clock)
    for _ in range(3):
        reader.lost("gone")
    assert reader.pause_s == 4
    clock.now += 1.5
    assert reader.pause_s == 2.5
    clock.now += 3
    assert reader.pause_s == 0


def test_tokens_that_expire_at_once_are_replaced_with_pauses(clock: Clock) -> None:
    """A function may give what it has kept, with little time left, to a quiet stream: no loop, and no error at once."""
    reader = following(clock)
    found = []
    while not reader.ready:
        connect(reader)
        clock.now += 2
        assert not reader.received(EXPIRED)
        assert reader.refused_token == "token"
        found.append(reader.pause_s)
        clock.now += reader.pause_s
    assert found == [0, 1, 2, 4, 8, 16, 15, 0]
    (raised,) = reader.ready
    assert isinstance(raised, Raised)
    assert isinstance(raised.error, ExpiredToken)


def test_short_tokens_of_a_quiet_stream_are_replaced_again_and_again(clock: Clock) -> None:
    reader = following(clock)
    for _ in range(20):
        connect(reader)
        clock.now += 60
        assert not reader.received(EXPIRED)
        assert reader.pause_s == 0
    assert not reader.ready


def test_what_comes_after_the_end_is_not_read(clock: Clock) -> None:
    reader = following(clock)
    connect(reader)
    assert not reader.received(b'event: end\ndata: {"reason":"complete"}\n\nid: 5\ndata: 5\n\n')
    assert reader.over
    assert not reader.ready


def test_events_of_later_versions_are_passed_over(clock: Clock) -> None:
    chunks, runs = following(clock), RunsFollowing("/path", Attempts(None, clock, lambda: 1.0), renewable=False)
    for reader in (chunks, runs):
        connect(reader)
        assert reader.received(b"event: invented\nid: 7\ndata: x\n\n")
        assert (list(reader.ready), reader.last_event_id) == ([], "7")


def record(run_id: str, **changes: Any) -> RunRecord:
    fixed: dict[str, Any] = {"task": "chat", "status": Status.QUEUED, "created_at_ms": 0, "updated_at_ms": 0}
    return RunRecord(id=run_id, **{**fixed, **changes})


def run_event(state: RunRecord, id: str | None = None) -> bytes:
    line = b"" if id is None else f"id: {id}\n".encode()
    return b"event: run\n%bdata: %b\n\n" % (line, run_json(state))


def test_a_state_that_comes_twice_is_told_once(clock: Clock) -> None:
    """The snapshot after a lost position has all runs again."""
    reader = RunsFollowing("/path", Attempts(None, clock, lambda: 1.0), renewable=False)
    first, second = record("run_1"), record("run_2")
    changed = record("run_2", status=Status.EXECUTING, updated_at_ms=5)
    connect(reader)
    reader.received(run_event(first) + run_event(second) + b"event: ready\nid: a.1\ndata: {}\n\n")
    assert reader.last_event_id == "a.1"
    connect(reader)
    assert reader.last_event_id == "a.1"
    reader.received(run_event(first) + run_event(changed) + b"event: ready\nid: b.1\ndata: {}\n\n")
    reader.received(run_event(changed, "b.2"))
    states = [item for item in reader.ready if not isinstance(item, Raised)]
    assert [(state.id, state.status) for state in states] == [
        ("run_1", "QUEUED"),
        ("run_2", "QUEUED"),
        ("run_2", "EXECUTING"),
    ]
    assert reader.last_event_id == "b.2"


def test_what_is_remembered_of_runs_has_a_limit(clock: Clock) -> None:
    reader = RunsFollowing("/path", Attempts(None, clock, lambda: 1.0), renewable=False)
    connect(reader)
    reader.received(b"".join(run_event(record(f"run_{number}")) for number in range(10_001)))
    reader.ready.clear()
    reader.received(run_event(record("run_10000")) + run_event(record("run_0")))
    assert [item.id for item in reader.ready if not isinstance(item, Raised)] == ["run_0"]


def test_a_run_of_which_the_token_shows_little_can_be_read(clock: Clock) -> None:
    reader = RunsFollowing("/path", Attempts(None, clock, lambda: 1.0), renewable=False)
    connect(reader)
    hidden = ("payload", "output", "metadata", "tags", "realtimeStreams", "durationMs", "error", "ttl")
    reader.received(b"event: run\ndata: %b\n\n" % run_json(record("run_1", tags=("a",)), skip=hidden))
    (state,) = (item for item in reader.ready if not isinstance(item, Raised))
    assert (state.tags, state.metadata, state.streams, state.payload) == ((), {}, (), None)


def test_a_limit_keeps_its_status() -> None:
    error = refusal(422, json.dumps({"error": "tag is 300 characters, limit 128", "code": "limit_exceeded"}).encode())
    assert type(error) is LimitExceeded
    assert error.status == 422
