"""Where the loop of a subscription is, and what the ticker and the shutdown ask of it.

**Phases.** The phase is where the loop is suspended. OPENING: it awaits the broker before the head is sent, and an
exception becomes the HTTP response. Later exceptions end the body instead. SENDING: it awaits `send()`. WAITING: it is
parked until the source or an alert wakes it. ASKING: it awaits the broker for something this process does not hold.
CLOSED: it has returned. The loop has no clock. When the ticker finds SENDING or WAITING it changes the phase to
STILL_SENDING or STILL_WAITING and notes the time, and the loop's next step overwrites that. So if a later tick finds
one of these, the loop has not moved since `_since`: a send has stalled, or a heartbeat is due. `TRANSITIONS` lists
every step. The loop stores its phase for every chunk and so does not consult the table; the tests check every store.

**Alerts.** The ticker and the shutdown never send anything. They set `_alert` and wake the loop, which checks it in
every iteration, also while there is more to send, so that a reader that never catches up ends too. Only the task of the
loop calls `send()`, so frames cannot interleave. An alert replaces only a less urgent one.
"""

from __future__ import annotations

from enum import Enum, IntEnum, auto


class Phase(Enum):
    """Where the loop of a subscription is suspended."""

    OPENING = auto()
    SENDING = auto()
    STILL_SENDING = auto()
    WAITING = auto()
    STILL_WAITING = auto()
    ASKING = auto()
    CLOSED = auto()


OPENING, SENDING, WAITING, ASKING, CLOSED = Phase.OPENING, Phase.SENDING, Phase.WAITING, Phase.ASKING, Phase.CLOSED
STILL_SENDING, STILL_WAITING = Phase.STILL_SENDING, Phase.STILL_WAITING

_NEXT = frozenset({SENDING, WAITING, ASKING, CLOSED})
TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    OPENING: frozenset({SENDING, CLOSED}),
    SENDING: _NEXT | {STILL_SENDING},
    STILL_SENDING: _NEXT,
    WAITING: _NEXT | {STILL_WAITING},
    STILL_WAITING: _NEXT,
    ASKING: _NEXT,
    CLOSED: frozenset(),
}


class Alert(IntEnum):
    """What the ticker and the shutdown ask of the loop, in ascending urgency. All but the first two end the body."""

    HEARTBEAT = auto()
    SILENT = auto()
    """The stream was silent for as long as the client wants to wait. Set by a subclass only."""
    TOO_OLD = auto()
    SHUTDOWN = auto()
    EXPIRED = auto()
