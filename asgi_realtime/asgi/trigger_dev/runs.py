"""The endpoints that answer once: retrieve and cancel a run, health."""

from __future__ import annotations

import logging
from typing import Any

from starlette.responses import Response

from asgi_realtime.asgi.answers import error_answer, json_answer, json_bytes_answer
from asgi_realtime.asgi.auth import authorise, run_resources
from asgi_realtime.asgi.health import Probe
from asgi_realtime.asgi.request import Request
from asgi_realtime.core.errors import BrokerUnavailable, RunNotFound
from asgi_realtime.core.run_json import run_json
from asgi_realtime.core.scopes import names

logger = logging.getLogger("asgi_realtime")


async def retrieve_run(request: Request, run_id: str) -> Response:
    claims = request.authenticate()
    try:
        record = await request.host.runs.get(run_id)
    except RunNotFound as exc:
        if request.is_from_elsewhere:
            raise
        answer = error_answer(exc)
        if run_id in names(claims.scopes, "read", "runs"):  # it may be on its way to the broker: the client asks again
            answer.headers["x-should-retry"] = "true"
        return answer
    authorise(claims, "read", run_resources(record))
    return json_bytes_answer(run_json(record, skip=claims.skip_columns))


async def cancel_run(request: Request, run_id: str) -> Response:
    claims = request.authenticate()
    record = await request.host.runs.get(run_id)
    authorise(claims, "write", [("runs", record.id)])
    await request.host.cancel(run_id)
    return json_answer({"id": run_id})


async def health(request: Request) -> Response | Probe:
    """Whether this process takes requests, for load balancers; or a `Probe`. Needs no token and tells no data."""
    if request.method == "GET" and request.accepts_event_stream:
        await request.host.ensure_started()
        return Probe(request)
    broker = "unavailable"
    try:
        await request.host.ensure_started()
        await request.host.broker.ping()
        broker = "ok"
    except BrokerUnavailable:
        pass  # expected of a broker that is away
    except Exception:
        logger.warning("the broker cannot be used", exc_info=True)
    status = "closing" if request.host.closing else broker
    told: dict[str, Any] = {"status": status, "broker": broker}
    if request.host.broker.warnings:
        told["warnings"] = request.host.broker.warnings
    return json_answer(told, 200 if status == "ok" else 503)
