"""Look up the run or batch of a subscription, waiting if it does not exist yet.

A browser often has a token before its run has reached the broker of this process, or before the job that creates the
run has left its queue. If the token names the run by its id, the request waits for it. If that takes longer than
`timeouts.find`, an `EventSource` is made to reconnect, because it would never do so after a 404. This ends
`timeouts.appear` after the token was created, because the run can also have expired. Without its id in the token the
request gets 404 at once, so timing reveals nothing.
"""

from __future__ import annotations

from asgi_realtime.asgi.auth import authorize, run_resources
from asgi_realtime.asgi.open_request import held
from asgi_realtime.asgi.request import Request
from asgi_realtime.core.errors import RunNotFound, ServerShutdown, shown
from asgi_realtime.core.runs import StoredRecord, batch_topic, run_topic
from asgi_realtime.core.scopes import named_ids


class RunAwaited(RunNotFound):
    """The run does not exist, and can still appear."""


async def find_run(request: Request, run_id: str, *, stream: str | None = None) -> StoredRecord:
    """The record of a run that the token can read, or of which it can read this stream.

    Raises `RunNotFound`, `ScopeDenied`, `ServerShutdown`. Waits up to `timeouts.find` for a run that the token names,
    and raises `RunAwaited` if it can still appear then.
    """
    runs, timeouts = request.host.runs, request.host.timeouts
    try:
        record = await runs.get(run_id)
    except RunNotFound:
        if request.is_from_elsewhere or run_id not in named_ids(request.claims.scopes, "read", "runs"):
            raise
        await _appears(request, run_topic(run_id))
        try:
            record = await runs.get(run_id)
        except RunNotFound as exc:
            if request.host.clock() < request.claims.issued_at + timeouts.appear:
                raise RunAwaited(*exc.args) from None
            raise
    resources = run_resources(record)
    if stream is not None:
        resources.append(("streams", f"{run_id}:{stream}"))
    authorize(request.claims, "read", resources)
    return record


async def find_batch(request: Request, batch_id: str) -> bool:
    """Whether the batch is known to get no more runs. Raises `RunNotFound`, `ServerShutdown`.

    Nothing but its runs can be known of a batch, so this waits up to `timeouts.find` for the first of them.
    """
    closed = await request.host.tasks.batches.closed(batch_id)
    if closed is not None:
        return closed
    if not await _appears(request, batch_topic(batch_id)):
        raise RunNotFound(f"no batch {shown(batch_id)}: it does not exist or has expired (Retention.after_end)")
    return False


async def _appears(request: Request, topic: str) -> bool:
    """Wait until the topic has a run. False if none appears in time or the client disconnects.

    Raises `ServerShutdown` rather than returning False during a shutdown, because the run can appear soon after. An
    EventSource would not reconnect after a 404.
    """
    if request.host.closing:
        raise ServerShutdown()
    async with held(request, topic, request.host.timeouts.find) as (follower, deadline):
        while not deadline.is_over:
            if (await follower.changes(None, limit=1)).items:
                return True
            await follower.wait()
    return False
