"""What a late reader of a chat costs: `python -m benchmarks replay`.

The answer has `TOKENS` tokens of 5 bytes, stored as message parts. For each protocol: the bytes of its replay, and the
CPU time of the server; without joining, that is one frame for each token, for comparison. Then the CPU time of resuming
at the end, which has to read what is before, and of one live token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from asgi_realtime.asgi.framing import NATIVE, Framing
from asgi_realtime.asgi.protocol_streams import PROTOCOLS, ConvertedFraming
from asgi_realtime.brokers.live_log import LiveLog
from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.log import Log
from asgi_realtime.core.runs import Status, StoredRecord

TOKENS = 10_000
TOKEN = "word "
REPEAT = 5
"""How often each is timed. The fastest counts, because the machine can be busy."""

_RECORD = StoredRecord(id="run_1", task="chat", status=Status.EXECUTING, created_at_ms=0, updated_at_ms=0)


@dataclass(frozen=True, slots=True)
class Row:
    protocol: str
    single_bytes: int
    joined_bytes: int
    single_ms: float
    joined_ms: float
    resume_ms: float
    live_us: float


def make_live(tokens: int = TOKENS) -> LiveLog:
    live = LiveLog(Log())
    live.log.append([encode_value({"type": "text-start", "id": "1"})], 0)
    live.log.append([encode_value({"type": "text-delta", "id": "1", "delta": TOKEN}) for _ in range(tokens)], 0)
    return live


def framing_of(protocol: str) -> Framing:
    conversion = PROTOCOLS[protocol]
    return NATIVE if conversion is None else ConvertedFraming(conversion.of(_RECORD))


def replay(live: LiveLog, protocol: str) -> int:
    """The bytes that a late reader gets, in as few bodies as there are."""
    framing, after, size = framing_of(protocol), -1, 0
    live.leave()  # nothing is shared with an earlier reader
    live.enter()
    while (piece := framing.take(live, after)) is not None:
        size, after = size + len(piece[0]), piece[1]
    return size


def replay_singly(live: LiveLog, protocol: str) -> int:
    """The same with one frame for each token, as live readers get them."""
    framing, size = framing_of(protocol), 0
    for entry in live.entries(-1, TOKENS + 1):
        size += len(framing.encode([entry]))
    return size


def resume(live: LiveLog, protocol: str) -> None:
    conversion = PROTOCOLS[protocol]
    if conversion is not None:
        made: Any = conversion.of(_RECORD)
        made.scan(made.beginning, live.entries(-1, TOKENS + 1))


def timed(call: Callable[[], object]) -> float:
    """The fastest of several, in milliseconds of CPU time."""
    found = []
    for _ in range(REPEAT):
        begin = time.process_time()
        call()
        found.append(time.process_time() - begin)
    return min(found) * 1000


def live_us(protocol: str) -> float:
    """CPU time per token of a reader that is at the end: without the append and the send."""
    data = encode_value({"type": "text-delta", "id": "1", "delta": TOKEN})

    def read() -> None:
        live, framing = make_live(0), framing_of(protocol)
        live.enter()
        framing.take(live, -1)
        for seq in range(TOKENS):
            live.log.push(data, 0)
            framing.take(live, seq)

    def append_only() -> None:
        live = make_live(0)
        for _ in range(TOKENS):
            live.log.push(data, 0)

    return (timed(read) - timed(append_only)) * 1000 / TOKENS


def measure(protocol: str) -> Row:
    live = make_live()
    live.enter()
    return Row(
        protocol,
        replay_singly(live, protocol),
        replay(live, protocol),
        timed(lambda: replay_singly(live, protocol)),
        timed(lambda: replay(live, protocol)),
        timed(lambda: resume(live, protocol)),
        live_us(protocol),
    )


def render(rows: list[Row]) -> str:
    lines = [
        "| protocol | replay by token | joined replay | resume at the end | one live token |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        single, joined = f"{row.single_bytes / 1024:.0f} KiB", f"{row.joined_bytes / 1024:.0f} KiB"
        times = f"{row.resume_ms:.1f} ms | {row.live_us:.1f} µs"
        lines.append(
            f"| `{row.protocol}` | {single}, {row.single_ms:.1f} ms | {joined}, {row.joined_ms:.1f} ms | {times} |"
        )
    return "\n".join(lines)


def main() -> int:
    print(render([measure(protocol) for protocol in PROTOCOLS]))
    return 0
