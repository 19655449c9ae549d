from __future__ import annotations

from asgi_realtime.asgi.trigger_dev.batch_streams import BATCHES
from asgi_realtime.brokers.live_log import LiveLog
from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.log import Entry, Log


def test_readers_at_the_same_cursor_share_a_body() -> None:
    live = LiveLog(Log())
    live.log.append([encode_value("x")], 1)
    body = BATCHES.take(live, -1)
    assert body is not None and BATCHES.take(live, -1) is body
    native = live.take(-1)
    assert native is not None and native[0] == b'id: 0\ndata: "x"\n\n'
    live.log.append([encode_value("y")], 2)
    again = BATCHES.take(live, -1)
    assert again is not None and again[1] == 1
    assert BATCHES.take(live, 1) is None


def test_a_body_has_as_many_chunks_as_a_native_one() -> None:
    live = LiveLog(Log())
    live.log.append([encode_value("x" * 1000) for _ in range(200)], 1)
    cursor, found = -1, 0
    while (piece := BATCHES.take(live, cursor)) is not None:
        native = live.take(cursor)
        assert native is not None and native[1] == piece[1]
        cursor, found = piece[1], found + 1
    assert cursor == 199 and found > 1


def test_entries_read_from_the_broker_are_encoded_alike() -> None:
    live = LiveLog(Log())
    live.log.append([encode_value("x"), encode_value("y")], 5)
    piece = BATCHES.take(live, -1)
    assert piece is not None
    assert BATCHES.encode([Entry(0, b'"x"', 5), Entry(1, b'"y"', 5)]) == piece[0]
