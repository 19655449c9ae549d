"""Each handler is registered as its framework wants it, and an error is raised in a route of the host."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from flask import Flask
from litestar import Litestar, get
from quart import Quart
from starlette.applications import Starlette
from starlette.routing import Route

from asgi_realtime import (
    BrokerUnavailable,
    InvalidToken,
    LimitExceeded,
    RealtimeError,
    RunFailed,
    RunNotFound,
    ThreadBusy,
    realtime_error_handler,
    realtime_error_response,
)
from asgi_realtime.core.errors import ServerShutdown
from asgi_realtime.testing import AsgiClient

CASES: list[tuple[Exception, int, dict[str, str]]] = [
    (RunNotFound("no run 'run_1'"), 404, {}),
    (LimitExceeded("this owner has 100 runs, limit 100", status=429, retry_after_s=4.2), 429, {"retry-after": "5"}),
    (LimitExceeded("payload is 9 bytes, limit 8"), 422, {}),
    (InvalidToken("no token"), 401, {"www-authenticate": "Bearer"}),
    (BrokerUnavailable("redis is down"), 503, {}),
    (ServerShutdown(), 503, {"retry-after": "1"}),
    (ThreadBusy("chat:1", "run_1"), 409, {"x-should-retry": "false"}),
    (RunFailed("the run ended failed: task failed"), 500, {}),
]


def raising(error: Exception) -> Callable[[], Any]:
    def route() -> Any:
        raise error

    return route


def starlette(error: Exception) -> Any:
    async def route(request: Any) -> Any:
        raise error

    app = Starlette(routes=[Route("/", route)])
    app.add_exception_handler(RealtimeError, realtime_error_handler)
    return app


def fastapi(error: Exception) -> Any:
    app = FastAPI()
    app.get("/")(raising(error))
    app.add_exception_handler(RealtimeError, realtime_error_handler)
    return app


def litestar(error: Exception) -> Any:
    route = get("/", sync_to_thread=False)(raising(error))
    handlers: Any = {RealtimeError: realtime_error_handler}
    return Litestar([route], exception_handlers=handlers, logging_config=None)


def quart(error: Exception) -> Any:
    app = Quart(__name__)
    app.add_url_rule("/", view_func=raising(error))
    app.register_error_handler(RealtimeError, realtime_error_response)
    return app


@pytest.mark.asyncio
@pytest.mark.parametrize("host", [starlette, fastapi, litestar, quart], ids=lambda host: host.__name__)
@pytest.mark.parametrize(("error", "status", "headers"), CASES)
async def test_an_error_in_a_route_of_the_host_has_its_own_status(
    host: Callable[[Exception], Any], error: RealtimeError, status: int, headers: dict[str, str]
) -> None:
    response = await AsgiClient(host(error), lifespan=False).get("/")
    assert response.status_code == status
    assert response.json()["code"] == error.code
    expected = {"content-type": "application/json", "cache-control": "private, no-store", **headers}
    assert {name: response.headers[name] for name in expected} == expected


def test_flask_accepts_the_same_response_as_quart() -> None:
    app = Flask(__name__)
    app.add_url_rule("/", view_func=raising(RunNotFound("no run 'run_1'")))
    app.register_error_handler(RealtimeError, realtime_error_response)
    response = app.test_client().get("/")
    assert (response.status_code, response.json) == (404, {"error": "no run 'run_1'", "code": "run_not_found"})


def test_a_busy_thread_is_explained_to_the_user_and_its_details_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A chat shows the text of the response to its user, who knows nothing of threads, runs and on_conflict."""
    with caplog.at_level(logging.DEBUG, "asgi_realtime"):
        body, _, _ = realtime_error_response(ThreadBusy("chat:1", "run_1"))
    assert json.loads(body) == {
        "error": "the previous request is still in progress; wait until it is done, or stop it",
        "code": "thread_busy",
        "runId": "run_1",
    }
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "DEBUG",
            "a request to the host gets 409 thread_busy: thread 'chat:1' has an active run, run_1; wait until it ends,"
            " or replace it (on_conflict)",
        )
    ]


def test_an_error_of_the_server_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "asgi_realtime"):
        realtime_error_response(RunNotFound("no run"))
        assert caplog.records == []
        realtime_error_response(RunFailed("the run ended failed"))
        body, status, _ = realtime_error_response(ValueError("a secret"))
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert (status, body) == (500, b'{"error":"internal error","code":"internal"}')
