"""Look up the run or batch of a subscription, waiting briefly if it does not exist yet.

A browser often has a token before its run has reached the broker of this process. If the token names the run by its id,
the request waits for it. Otherwise it gets 404 at once, so timing reveals nothing.
"""

from __future__ import annotations

from asgi_realtime.asgi.auth import authorize, run_resources
from asgi_realtime.asgi.open_request import held
from asgi_realtime.asgi.request import Request
from asgi_realtime.core.errors import RunNotFound, ServerShutdown, shown
from asgi_realtime.core.runs import RunRecord, batch_topic, run_topic
from asgi_realtime.core.scopes import named_ids


async def find_run(request: Request, run_id: str) -> RunRecord:
    """The record of a run that the token can read. Raises `RunNotFound`, `ScopeDenied`, `ServerShutdown`.

    Waits up to `timeouts.find` for a run that the token names.
    """
    runs = request.host.runs
    try:
        record = await runs.get(run_id)
    except RunNotFound:
        if request.is_from_elsewhere or run_id not in named_ids(request.claims.scopes, "read", "runs"):
            raise
        await _appears(request, run_topic(run_id))
        record = await runs.get(run_id)
    authorize(request.claims, "read", run_resources(record))
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
