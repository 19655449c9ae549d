"""The hosts of the matrix: one idiomatic app per framework. `HOST` selects the one to serve.

This module does not postpone annotations, because the frameworks evaluate those of the local route functions.
"""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from tests.e2e.hosts.guest import COMPRESSES, MIDDLEWARE, act, host_starts, host_stops, realtime, wrapped


@asynccontextmanager
async def host_life(app: object = None) -> AsyncIterator[None]:
    await host_starts()
    yield
    await host_stops()


@asynccontextmanager
async def both_lives(app: object = None) -> AsyncIterator[None]:
    async with realtime, host_life():
        yield


def starlette() -> Any:
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.middleware.gzip import GZipMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Mount, Route

    async def do(request: Request) -> JSONResponse:
        return JSONResponse(await act(await request.json()))

    async def pass_on(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers["x-passed"] = "yes"
        return response

    around = [Middleware(GZipMiddleware, minimum_size=0), Middleware(BaseHTTPMiddleware, dispatch=pass_on)]
    routes: list[Any] = [Route("/do", do, methods=["POST"])]
    if MIDDLEWARE:
        return wrapped(Starlette(routes=routes, lifespan=host_life))
    routes.append(Mount("/realtime", realtime))
    return Starlette(routes=routes, lifespan=both_lives, middleware=around if COMPRESSES else [])


def fastapi() -> Any:
    from fastapi import FastAPI, Request, Response
    from fastapi.middleware.gzip import GZipMiddleware

    from asgi_realtime import RealtimeMiddleware

    app = FastAPI(lifespan=host_life if MIDDLEWARE else both_lives)

    @app.post("/do")
    async def do(body: dict[str, Any]) -> dict[str, Any]:
        return await act(body)

    if COMPRESSES:
        app.add_middleware(GZipMiddleware, minimum_size=0)

        @app.middleware("http")
        async def pass_on(request: Request, call_next: Any) -> Response:
            response: Response = await call_next(request)
            response.headers["x-passed"] = "yes"
            return response

    if MIDDLEWARE:
        app.add_middleware(RealtimeMiddleware, realtime=realtime)
    else:
        app.mount("/realtime", realtime)
    return app


def litestar() -> Any:
    from litestar import Litestar, asgi, post
    from litestar.config.compression import CompressionConfig
    from litestar.types import Receive, Scope, Send

    @post("/do", status_code=200)
    async def do(data: dict[str, Any]) -> dict[str, Any]:
        return await act(data)

    @asgi("/realtime", is_mount=True, copy_scope=True)
    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        await realtime(scope, receive, send)

    if MIDDLEWARE:
        return wrapped(Litestar([do], lifespan=[host_life]))
    compression = CompressionConfig(backend="gzip", minimum_size=1) if COMPRESSES else None
    return Litestar([do, mounted], lifespan=[both_lives], compression_config=compression)


def quart() -> Any:
    from quart import Quart

    return _quart(Quart(__name__))


def quart_trio() -> Any:
    from quart_trio import QuartTrio

    return _quart(QuartTrio(__name__))


def _quart(app: Any) -> Any:
    from quart import request

    @app.post("/do")  # type: ignore[untyped-decorator]
    async def do() -> dict[str, Any]:
        return await act(await request.get_json())

    app.before_serving(host_starts)
    app.after_serving(host_stops)
    app.asgi_app = wrapped(app.asgi_app)
    return app


def blacksheep() -> Any:
    from blacksheep import Application, Request, Response, json

    app = Application()

    @app.router.post("/do")
    async def do(request: Request) -> Response:
        return json(await act(await request.json()))

    async def starts(app: Application) -> None:
        if not MIDDLEWARE:
            await realtime.start()
        await host_starts()

    async def stops(app: Application) -> None:
        await host_stops()
        if not MIDDLEWARE:
            await realtime.stop()

    app.on_start += starts
    app.on_stop += stops
    if MIDDLEWARE:
        return wrapped(app)
    app.mount("/realtime", realtime)
    return app


def falcon() -> Any:
    import falcon.asgi

    class Do:
        async def on_post(self, request: falcon.asgi.Request, response: falcon.asgi.Response) -> None:
            response.media = await act(await request.get_media())

    class Life:
        async def process_startup(self, scope: dict[str, Any], event: dict[str, Any]) -> None:
            await host_starts()

        async def process_shutdown(self, scope: dict[str, Any], event: dict[str, Any]) -> None:
            await host_stops()

    app: Any = falcon.asgi.App()
    app.add_middleware(Life())
    app.add_route("/do", Do())
    return wrapped(app)


def django() -> Any:
    import json

    from django.conf import settings
    from django.core.asgi import get_asgi_application
    from django.http import HttpRequest, JsonResponse
    from django.urls import path
    from django.views.decorators.csrf import csrf_exempt

    @csrf_exempt  # type: ignore[untyped-decorator]
    async def do(request: HttpRequest) -> JsonResponse:
        return JsonResponse(await act(json.loads(request.body)))

    settings.configure(SECRET_KEY="of the tests", ALLOWED_HOSTS=["*"], ROOT_URLCONF=(path("do", do),))
    return wrapped(get_asgi_application())


def sanic() -> Any:
    from sanic import HTTPResponse, Request, Sanic, json

    app: Any = Sanic("guest", configure_logging=False)

    @app.post("/do")  # type: ignore[untyped-decorator]
    async def do(request: Request) -> HTTPResponse:
        return json(await act(request.json))

    @app.before_server_start  # type: ignore[untyped-decorator]
    async def starts(app: Any) -> None:
        await host_starts()

    @app.after_server_stop  # type: ignore[untyped-decorator]
    async def stops(app: Any) -> None:
        await host_stops()

    return wrapped(app)


HOSTS: dict[str, Callable[[], Any]] = {
    "starlette": starlette,
    "fastapi": fastapi,
    "litestar": litestar,
    "quart": quart,
    "quart_trio": quart_trio,
    "blacksheep": blacksheep,
    "falcon": falcon,
    "django": django,
    "sanic": sanic,
}

if "HOST" in os.environ:
    app = HOSTS[os.environ["HOST"]]()
