"""Retrieving and canceling a run."""

from __future__ import annotations

from starlette.responses import Response

from asgi_realtime.asgi.answers import error_answer, json_answer, json_bytes_answer
from asgi_realtime.asgi.auth import authorise, run_resources
from asgi_realtime.asgi.request import Request
from asgi_realtime.core.errors import RunNotFound
from asgi_realtime.core.run_json import run_json
from asgi_realtime.core.scopes import names


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
