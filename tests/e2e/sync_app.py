"""Apps with sync routes that use `realtime.sync`, for `test_sync_hosts`. `HOST` selects the one to serve.

This module does not postpone annotations, because FastAPI evaluates those of the routes.
"""

import os
import threading
from collections.abc import Callable
from typing import Any

from asgi_realtime import Realtime, RealtimeMiddleware, Timeouts, hypercorn
from asgi_realtime.core.errors import RealtimeError

realtime = Realtime(
    secret_key="a key for tests, 32 bytes or more",
    broker=os.environ.get("BROKER", "memory://"),
    timeouts=Timeouts(tick=0.05, drain=0.05),
)
hypercorn.watch(realtime)


@realtime.task("double")
def double(number: int) -> int:
    realtime.sync.append(number)
    return number * 2


def work(number: int) -> dict[str, Any]:
    """The sync route of each host, on whatever thread it runs."""
    handle = realtime.sync.trigger(double, number)
    output = realtime.sync.result(handle, timeout=30)
    with realtime.sync.open_run("import", tags=["sync"]) as run:
        realtime.sync.append(output)
        run.set_output(number)
    piped = realtime.sync.pipe(iter([number * 3])).handle
    chunks = [*realtime.sync.read(handle), *realtime.sync.read(run), *realtime.sync.read(piped)]
    return {"output": output, "chunks": chunks, "status": realtime.sync.get_run(run).status}


def mistake() -> str:
    """A sync call on a thread that runs an event loop."""
    try:
        realtime.sync.get_run("run_x")
    except RuntimeError as exc:
        return str(exc)
    raise AssertionError("it was not refused")


def wait_in_a_thread() -> str:
    """Wait forever in a thread that would keep the process from exiting, and log how the wait ends."""
    begun = threading.Event()

    def wait() -> None:
        try:
            begun.set()
            next(realtime.sync.subscribe_to_runs_with_tag("unused"))
        except RealtimeError as exc:
            os.write(1, f"the thread got {type(exc).__name__}\n".encode())

    threading.Thread(target=wait, daemon=False).start()  # a thread inherits daemon otherwise
    begun.wait()
    return "begun"


def fastapi() -> Any:
    from fastapi import FastAPI

    app = FastAPI(lifespan=realtime.lifespan)
    app.mount("/realtime", realtime)

    @app.get("/job/{number}")
    def do_work(number: int) -> dict[str, Any]:
        return work(number)

    @app.get("/mistake")
    async def make_mistake() -> str:
        return mistake()

    @app.get("/wait")
    def begin_to_wait() -> str:
        return wait_in_a_thread()

    return app


def starlette() -> Any:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Mount, Route

    def do_work(request: Request) -> JSONResponse:
        return JSONResponse(work(request.path_params["number"]))

    async def make_mistake(request: Request) -> JSONResponse:
        return JSONResponse(mistake())

    def begin_to_wait(request: Request) -> JSONResponse:
        return JSONResponse(wait_in_a_thread())

    routes = [Route("/job/{number:int}", do_work), Route("/mistake", make_mistake), Route("/wait", begin_to_wait)]
    return Starlette(routes=[*routes, Mount("/realtime", realtime)], lifespan=realtime.lifespan)


def django() -> Any:
    from django.conf import settings
    from django.core.asgi import get_asgi_application
    from django.http import HttpRequest, JsonResponse
    from django.urls import path

    def do_work(request: HttpRequest, number: int) -> JsonResponse:
        return JsonResponse(work(number))

    async def make_mistake(request: HttpRequest) -> JsonResponse:
        return JsonResponse(mistake(), safe=False)

    def begin_to_wait(request: HttpRequest) -> JsonResponse:
        return JsonResponse(wait_in_a_thread(), safe=False)

    routes = (path("job/<int:number>", do_work), path("mistake", make_mistake), path("wait", begin_to_wait))
    settings.configure(SECRET_KEY="of the tests", ALLOWED_HOSTS=["*"], ROOT_URLCONF=routes)
    return RealtimeMiddleware(get_asgi_application(), realtime)


def flask() -> Any:
    from asgiref.wsgi import WsgiToAsgi

    return RealtimeMiddleware(WsgiToAsgi(wsgi()), realtime)  # type: ignore[no-untyped-call]


def wsgi() -> Any:
    """Flask alone, for a WSGI server."""
    from flask import Flask, jsonify

    app = Flask(__name__)

    @app.get("/job/<int:number>")
    def do_work(number: int) -> Any:
        return jsonify(work(number))

    @app.get("/mistake")
    def make_mistake() -> Any:
        return jsonify(mistake())

    @app.get("/wait")
    def begin_to_wait() -> Any:
        return jsonify(wait_in_a_thread())

    return app


HOSTS: dict[str, Callable[[], Any]] = {
    "fastapi": fastapi,
    "starlette": starlette,
    "django": django,
    "flask": flask,
    "wsgi": wsgi,
}

if "HOST" in os.environ:
    app = HOSTS[os.environ["HOST"]]()
