"""How much memory each party of the memory broker holds, and which ended runs make room for new ones.

Each run and claim belongs to a party: the owner of the public token that made it, or the host. The owners together hold
at most `Retention.total_bytes` less the host's share. When there is no room, ended runs are removed, oldest first.
Unfinished runs lose nothing.

* The host displaces its own ended runs, then those of the owners that hold the most.
* An owner displaces ended runs of the party that holds the most, if that party holds at least as much as this owner;
  otherwise its own. Of the host counts what exceeds its share. So an owner never displaces a smaller one.

If that does not free enough, only the caller is refused.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable

from asgi_realtime.brokers.due_times import DueTimes
from asgi_realtime.core.config import Retention
from asgi_realtime.core.errors import LimitExceeded
from asgi_realtime.loop.logger import logger

_SPARE = 16
"""Making room frees a sixteenth of the total more than necessary, so that it is rarely necessary."""

_RETRY_S = 10.0
"""What a refused owner is advised to wait. Runs can end at any time."""

_HINT = "raise Retention.total_bytes, lower Retention.after_end, or cancel unfinished runs"


class Party:
    """The host, or an owner."""

    __slots__ = ("ended", "name", "size")

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.size = 0
        self.ended = DueTimes()  # its runs that have ended


class Space:
    """Counts bytes by party. `remove` removes a run; it must call `change` and `forget`."""

    def __init__(self, retention: Retention, remove: Callable[[str], None]) -> None:
        self.total = retention.total_bytes
        self.owners_total = self.total - round(self.total * retention.host_share)
        self.size = 0
        self.host = Party(None)
        self._remove = remove
        self._spare = self.total // _SPARE
        self._owners: dict[str, Party] = {}  # those that hold anything
        self._evictable: dict[Party, None] = {}  # the owners that have ended runs
        self._refused: dict[bool, int] = {}  # to the host (True) and to owners: the bytes that did not fit

    @property
    def owners_size(self) -> int:
        """What all owners hold together."""
        return self.size - self.host.size

    def party(self, owner: str | None) -> Party:
        """The party of an owner; None is the host."""
        return self.host if owner is None else self._owners.get(owner) or Party(owner)

    def change(self, party: Party, grown: int) -> None:
        """Count what a party holds now in addition, or less."""
        party.size += grown
        self.size += grown
        if party.name is not None:
            if not party.size:
                self._owners.pop(party.name, None)
            elif party.size == grown:
                self._owners[party.name] = party

    def ended(self, party: Party, run_id: str, at_ms: int) -> None:
        """A run has ended, so it can be removed."""
        party.ended.set(run_id, at_ms)
        self._refused.clear()
        if party is not self.host:
            self._evictable[party] = None

    def forget(self, party: Party, run_id: str) -> None:
        """A run has been removed."""
        party.ended.set(run_id, None)
        if not len(party.ended):
            self._evictable.pop(party, None)

    def fits(self, party: Party, grown: int = 0) -> bool:
        """Whether a party can hold that much more without making room."""
        size = self.size + grown
        return size <= self.total and (party is self.host or size - self.host.size <= self.owners_total)

    def admit(self, party: Party, grown: int) -> None:
        """Make room for that much more. Raises `LimitExceeded`."""
        if grown > 0 and not self.make_room(party, grown):
            self._refuse(party, grown)

    def make_room(self, party: Party, grown: int = 0, *, keep: str | None = None) -> bool:
        """Remove ended runs, except `keep`, until the party can hold that much more. Returns whether it can."""
        if not self.fits(party, grown):
            enough = self.total - self._spare - grown
            if party is self.host:
                self._displace([party], party, keep, lambda: self.size <= enough)
            elif self.owners_size + grown > self.owners_total:
                owners_enough = self.owners_total - self._spare - grown
                self._displace(self._evictable, party, keep, lambda: self.owners_size <= owners_enough)
            if self.size + grown > self.total:
                self._displace([self.host, *self._evictable], party, keep, lambda: self.size <= enough)
        return self.fits(party, grown)

    def _displace(self, parties: Iterable[Party], by: Party, keep: str | None, is_enough: Callable[[], bool]) -> None:
        """Remove the oldest ended run of the party that holds the most, again and again. `by` loses first if equal."""
        heap = [(-self._weight(one), one is not by, number, one) for number, one in enumerate(parties)]
        heapq.heapify(heap)
        while heap and not is_enough():
            _, is_other, number, victim = heap[0]
            if by is not self.host and self._weight(victim) < by.size:
                return
            oldest = next((run_id for run_id in victim.ended.due(math.inf, 2) if run_id != keep), None)
            if oldest is None:
                heapq.heappop(heap)
            else:
                self._remove(oldest)
                heapq.heapreplace(heap, (-self._weight(victim), is_other, number, victim))

    def _weight(self, party: Party) -> int:
        return self.size - self.owners_size - (self.total - self.owners_total) if party is self.host else party.size

    def _refuse(self, party: Party, grown: int) -> None:
        """Raises `LimitExceeded`."""
        is_host = party is self.host
        if is_host and not self.warnings:
            logger.warning("the memory broker is full and refuses data of the host; %s", _HINT)
        self._refused[is_host] = grown
        if is_host or self.owners_size + grown <= self.owners_total:
            held = f"the broker holds {self.size} bytes, limit {self.total} (Retention.total_bytes)"
        else:
            held = (
                f"the runs and claims of public tokens hold {self.owners_size} bytes,"
                f" limit {self.owners_total} (Retention.total_bytes less host_share)"
            )
        message = f"{held}; {grown} more do not fit: {_HINT}"
        if is_host:
            raise LimitExceeded(message, status=503)
        raise LimitExceeded(message, status=429, retry_after_s=_RETRY_S)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is refused now."""
        refused = [
            "the host" if is_host else "public tokens"
            for is_host, grown in self._refused.items()
            if not self.fits(self.host if is_host else Party(""), grown)
        ]
        return tuple(f"the memory broker is full and refuses data of {whose}; {_HINT}" for whose in refused)
