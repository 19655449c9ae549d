"""The protocol without a connection: what would take too long over a real one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from asgi_realtime.client.backoff import Backoff
from asgi_realtime.client.errors import ServerUnreachable, error_from_response
from asgi_realtime.client.protocol import ChunksProtocol, Raised, RunsProtocol
from asgi_realtime.core.errors import ExpiredToken, LimitExceeded
from asgi_realtime.core.run_json import run_json
from asgi_realtime.core.runs import Status, StoredRecord

HEARTBEAT = b": heartbeat\n"
CONNECTED = b"retry: 1000\n: connected\n"
EXPIRED = b'event: end\ndata: {"reason":"token_expired"}\n\n'


class Clock:
    """Moves only when a test sets `now`."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make_protocol(clock: Clock, *, give_up_s: float | None = 60.0, renewable: bool = True) -> ChunksProtocol[Any]:
    backoff = Backoff(give_up_s, clock, lambda: 1.0)
    protocol: ChunksProtocol[Any] = ChunksProtocol("/path", backoff, "default", 0, lambda item: item)
    protocol.renewable = renewable
    return protocol


def connect(protocol: Any) -> None:
    protocol.headers("token")
    assert protocol.accept(200, {"content-type": "text/event-stream; charset=utf-8"})
    assert protocol.receive(CONNECTED)


def pauses(
    protocol: ChunksProtocol[Any], clock: Clock, *, lasting: float = 0.0, received: bytes = b"", silent: bool
) -> list[float]:
    """The pauses after five lost connections in a row."""
    found = []
    for _ in range(5):
        connect(protocol)
        clock.now += lasting
        if received:
            assert protocol.receive(received)
        protocol.lose("reset", silent=silent)
        found.append(protocol.pause_s)
        clock.now += protocol.pause_s
    return found


def test_a_connection_without_events_is_not_progress(clock: Clock) -> None:
    assert pauses(make_protocol(clock), clock, silent=False) == [1, 2, 4, 8, 16]


def test_a_heartbeat_is_progress(clock: Clock) -> None:
    assert pauses(make_protocol(clock), clock, received=HEARTBEAT, silent=False) == [1] * 5


def test_a_connection_that_lasted_is_progress(clock: Clock) -> None:
    """A proxy that cuts connections after ten silent seconds must not make the client give up on the server."""
    assert pauses(make_protocol(clock), clock, lasting=10, silent=False) == [1] * 5


def test_the_client_gives_up_on_a_server_that_hangs(clock: Clock) -> None:
    protocol = make_protocol(clock)
    assert pauses(protocol, clock, lasting=45, silent=True)[:2] == [1, 0]
    raised = protocol.ready[0]
    assert isinstance(raised, Raised)
    assert isinstance(raised.error, ServerUnreachable)


def test_the_client_gives_up_on_a_server_that_only_asks_to_reconnect(clock: Clock) -> None:
    protocol = make_protocol(clock)
    for _ in range(20):
        connect(protocol)
        assert not protocol.receive(b'event: reconnect\nretry: 10000\ndata: {"retry":10000}\n\n')
        clock.now += protocol.pause_s
        if protocol.ready:
            break
    else:
        pytest.fail("the client never gives up")


def test_the_client_does_not_give_up_on_a_server_that_ends_streams_by_age(clock: Clock) -> None:
    """With a short `Timeouts.stream_age` a quiet stream ends before its first heartbeat."""
    protocol = make_protocol(clock)
    for _ in range(20):
        connect(protocol)
        clock.now += 15
        assert not protocol.receive(b'event: reconnect\nretry: 1000\ndata: {"retry":1000}\n\n')
        assert protocol.pause_s == 1
        clock.now += protocol.pause_s
    assert not protocol.ready


def test_the_client_gives_up_in_time_on_a_server_that_never_responds(clock: Clock) -> None:
    """It waited for twice `silence_timeout`, long after `give_up_after` had passed."""
    protocol = make_protocol(clock, give_up_s=10)
    protocol.headers("token")
    clock.now += 45
    protocol.lose("nothing was received", silent=True)
    (raised,) = protocol.ready
    assert isinstance(raised, Raised)
    assert isinstance(raised.error, ServerUnreachable)


def test_the_last_attempt_is_at_the_end_of_give_up_after(clock: Clock) -> None:
    protocol = make_protocol(clock, give_up_s=10)
    found = []
    while not protocol.ready:
        protocol.headers("token")
        protocol.refuse(503, {"retry-after": "4"}, b"")
        found.append(protocol.pause_s)
        clock.now += protocol.pause_s
    assert found == [4, 4, 2, 0]


def test_a_connection_with_progress_restarts_give_up_after(clock: Clock) -> None:
    protocol = make_protocol(clock, give_up_s=10)
    connect(protocol)
    assert protocol.receive(HEARTBEAT)
    clock.now += 1000
    protocol.lose("reset")
    assert not protocol.ready
    assert protocol.pause_s == 1


def test_give_up_after_does_not_count_while_the_reader_is_away(clock: Clock) -> None:
    protocol = make_protocol(clock, give_up_s=10)
    protocol.headers("token")
    protocol.leave()
    clock.now += 1000
    protocol.headers("token")
    protocol.lose("reset")
    assert not protocol.ready


def test_without_give_up_after_the_client_retries_forever(clock: Clock) -> None:
    protocol = make_protocol(clock, give_up_s=None)
    for _ in range(5000):
        protocol.headers("token")
        protocol.lose("reset")
        assert 0 < protocol.pause_s <= 30
        clock.now += protocol.pause_s
    assert not protocol.ready


def test_an_interrupted_pause_continues(clock: Clock) -> None:
    """A reader with a timeout shorter than the pause restarted it each time, and never reconnected."""
    protocol = make_protocol(clock)
    for _ in range(3):
        protocol.headers("token")
        protocol.lose("reset")
    assert protocol.pause_s == 4
    clock.now += 1.5
    assert protocol.pause_s == 2.5
    clock.now += 3
    assert protocol.pause_s == 0


def test_pauses_grow_while_tokens_expire_at_once(clock: Clock) -> None:
    """A token function can return a cached token that is about to expire. That is neither a busy loop nor an error."""
    protocol = make_protocol(clock)
    found = []
    while not protocol.ready:
        connect(protocol)
        clock.now += 2
        assert not protocol.receive(EXPIRED)
        assert protocol.refused_token == "token"
        found.append(protocol.pause_s)
        clock.now += protocol.pause_s
    assert found == [0, 1, 2, 4, 8, 16, 15, 0]
    (raised,) = protocol.ready
    assert isinstance(raised, Raised)
    assert isinstance(raised.error, ExpiredToken)


def test_short_lived_tokens_of_a_quiet_stream_are_renewed_again_and_again(clock: Clock) -> None:
    protocol = make_protocol(clock)
    for _ in range(20):
        connect(protocol)
        clock.now += 60
        assert not protocol.receive(EXPIRED)
        assert protocol.pause_s == 0
    assert not protocol.ready


def test_events_after_the_end_are_ignored(clock: Clock) -> None:
    protocol = make_protocol(clock)
    connect(protocol)
    assert not protocol.receive(b'event: end\ndata: {"reason":"complete"}\n\nid: 5\ndata: 5\n\n')
    assert protocol.over
    assert not protocol.ready


def test_events_of_later_versions_are_ignored(clock: Clock) -> None:
    chunks, runs = make_protocol(clock), RunsProtocol("/path", Backoff(None, clock, lambda: 1.0))
    for protocol in (chunks, runs):
        connect(protocol)
        assert protocol.receive(b"event: invented\nid: 7\ndata: x\n\n")
        assert (list(protocol.ready), protocol.last_event_id) == ([], "7")


def record(run_id: str, **changes: Any) -> StoredRecord:
    fixed: dict[str, Any] = {"task": "chat", "status": Status.QUEUED, "created_at_ms": 0, "updated_at_ms": 0}
    return StoredRecord(id=run_id, **{**fixed, **changes})


def run_event(state: StoredRecord, id: str | None = None) -> bytes:
    line = b"" if id is None else f"id: {id}\n".encode()
    return b"event: run\n%bdata: %b\n\n" % (line, run_json(state))


def test_a_repeated_state_is_yielded_once(clock: Clock) -> None:
    """The snapshot after a lost cursor contains all runs again."""
    protocol = RunsProtocol("/path", Backoff(None, clock, lambda: 1.0))
    first, second = record("run_1"), record("run_2")
    changed = record("run_2", status=Status.EXECUTING, updated_at_ms=5)
    connect(protocol)
    protocol.receive(run_event(first) + run_event(second) + b"event: ready\nid: a.1\ndata: {}\n\n")
    assert protocol.last_event_id == "a.1"
    protocol.lose("reset")
    connect(protocol)
    assert protocol.last_event_id == "a.1"
    protocol.receive(run_event(first) + run_event(changed) + b"event: ready\nid: b.1\ndata: {}\n\n")
    protocol.receive(run_event(changed, "b.2"))
    states = [item for item in protocol.ready if not isinstance(item, Raised)]
    assert [(state.id, state.status) for state in states] == [
        ("run_1", "QUEUED"),
        ("run_2", "QUEUED"),
        ("run_2", "EXECUTING"),
    ]
    assert protocol.last_event_id == "b.2"


def test_the_number_of_remembered_runs_is_limited(clock: Clock) -> None:
    protocol = RunsProtocol("/path", Backoff(None, clock, lambda: 1.0))
    connect(protocol)
    protocol.receive(b"".join(run_event(record(f"run_{number}")) for number in range(10_001)))
    protocol.ready.clear()
    protocol.receive(run_event(record("run_10000")) + run_event(record("run_0")))
    assert [item.id for item in protocol.ready if not isinstance(item, Raised)] == ["run_0"]


def test_a_state_with_hidden_fields_can_be_read(clock: Clock) -> None:
    protocol = RunsProtocol("/path", Backoff(None, clock, lambda: 1.0))
    connect(protocol)
    hidden = ("payload", "output", "metadata", "tags", "realtimeStreams", "durationMs", "error", "ttl")
    protocol.receive(b"event: run\ndata: %b\n\n" % run_json(record("run_1", tags=("a",)), skip=hidden))
    (state,) = (item for item in protocol.ready if not isinstance(item, Raised))
    assert (state.tags, state.metadata, state.streams, state.payload) == ((), {}, (), None)


def test_a_limit_error_keeps_its_status() -> None:
    error = error_from_response(
        422, {}, json.dumps({"error": "tag is 300 characters, limit 128", "code": "limit_exceeded"}).encode()
    )
    assert type(error) is LimitExceeded
    assert error.status == 422


def test_a_closed_subscription_ignores_what_its_connection_still_reports(clock: Clock) -> None:
    """Another task can close it between two steps of its reader."""
    protocol = make_protocol(clock)
    protocol.headers("token")
    protocol.close()
    assert protocol.accept(200, {"content-type": "text/event-stream"})
    assert protocol.receive(CONNECTED)
    protocol.lose("reset")
    assert protocol.over
    assert not protocol.ready


def test_a_connection_cannot_be_accepted_before_it_is_requested(clock: Clock) -> None:
    with pytest.raises(AssertionError, match="WAITING cannot become Phase.CONNECTED"):
        make_protocol(clock).accept(200, {"content-type": "text/event-stream"})
