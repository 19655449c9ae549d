"""Finding what a subscription asks for, also a moment before it is there.

A token that names a run is often in the browser before the run is in the broker of this process. So a run that the
token names one by one is waited for; for all others 404 comes at once, or the answer would take as long as it tells.
"""

from __future__ import annotations

from functools import partial

from asgi_realtime.asgi.host import Host, Receive
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.subscription import Leaving, until_disconnect
from asgi_realtime.brokers.following import following
from asgi_realtime.core.errors import RunNotFound, shown
from asgi_realtime.core.runs import RunRecord, batch_topic, run_topic
from asgi_realtime.core.scopes import names
from asgi_realtime.loop.guards import make_guard
from asgi_realtime.loop.waiting import make_waiter
from asgi_realtime.tokens import Claims


class _Wait:
    """A waiting request, as the ticker and the shutdown see it."""

    __slots__ = ("_since", "_wait_s", "over", "waiter")

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._since: float | None = None  # when the ticker saw this first
        self.over = False
        self.waiter = make_waiter()

    def tick(self, now: float, steady: float) -> None:
        if self._since is None:
            self._since = steady
        elif steady - self._since >= self._wait_s:
            self.shut_down()

    def shut_down(self) -> None:
        self.over = True
        self.waiter.wake()


async def find_run(request: Request, claims: Claims, run_id: str, *, events: bool) -> RunRecord:
    """The record, waited for up to `timeouts.find` if the token names the run. Raises `RunNotFound`, `Leaving`.

    `events`: whether the client reads events, also those that a shutdown has.
    """
    runs = request.host.runs
    try:
        return await runs.get(run_id)
    except RunNotFound:
        if request.is_from_elsewhere or run_id not in names(claims.scopes, "read", "runs"):
            raise
    await _appeared(request, claims, run_topic(run_id), events=events)
    return await runs.get(run_id)


async def find_batch(request: Request, claims: Claims, batch_id: str, *, events: bool) -> bool:
    """Whether it is known that no more runs come to the batch. One of which nothing is kept but its runs has a run, or
    has one soon. Raises `RunNotFound`, `Leaving`."""
    closed = await request.host.tasks.batches.closed(batch_id)
    if closed is not None:
        return closed
    if not await _appeared(request, claims, batch_topic(batch_id), events=events):
        raise RunNotFound(f"no batch {shown(batch_id)}: it never was, or it is past its retention")
    return False


async def _appeared(request: Request, claims: Claims, topic: str, *, events: bool) -> bool:
    """Wait until the topic has a run. False if there is none in time or the client is gone.

    Raises `Leaving` if the host shuts down: it may be there soon, so 404, after which no EventSource comes back, would
    be wrong.
    """
    host, token_id = request.host, "" if claims.secret else claims.token_id
    wait = _Wait(host.timeouts.find)
    request.subscription_limits.acquire("", token_id)
    host.subscribers.add(wait)
    try:
        found = await _wait_for(host, topic, wait, request.receive)
    finally:
        host.subscribers.discard(wait)
        request.subscription_limits.release("", token_id)
    if not found and host.closing:
        raise Leaving(host, events=events)
    return found


async def _wait_for(host: Host, topic: str, wait: _Wait, receive: Receive) -> bool:
    found = False
    async with (
        following(host.broker, topic, waiter=wait.waiter) as follower,
        make_guard(partial(until_disconnect, receive)),
    ):
        while not found and not wait.over and not host.closing:
            found = bool((await follower.changes(None, limit=1)).items)
            if not found:
                await follower.wait()
    return found
