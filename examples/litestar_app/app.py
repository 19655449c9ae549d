"""The chat of `examples/fastapi_app` in Litestar: the same task, the same page."""

import os
import secrets
from pathlib import Path
from typing import Any

from litestar import Litestar, Request, post
from litestar.datastructures import Cookie
from litestar.exceptions import NotFoundException
from litestar.response import Response
from litestar.static_files import create_static_files_router
from msgspec import Struct
from openai import AsyncOpenAI

from asgi_realtime import Realtime, RealtimeMiddleware, Run, RunNotFound

realtime = Realtime(secret_key=os.environ.get("REALTIME_SECRET_KEY") or secrets.token_urlsafe(32))
openai = AsyncOpenAI()  # OPENAI_API_KEY, OPENAI_BASE_URL
MODEL = os.environ.get("OPENAI_MODEL", "gpt-4o-mini")
PAGE = Path(__file__).parent.parent / "page"


class Question(Struct):
    text: str


@realtime.task("chat")
async def chat(question: Question, run: Run) -> dict[str, str]:
    completion = await openai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": question.text}], stream=True
    )
    text = ""
    stream = realtime.pipe(completion)
    async for chunk in stream:
        token = "".join(choice.delta.content or "" for choice in chunk.choices)
        text += token
        run.metadata.increment("tokens", 1 if token else 0)
    await stream.wait_until_complete()
    return {"text": text}


@post("/session", status_code=200)
async def session(request: Request[Any, Any, Any]) -> Response[dict[str, str]]:
    user = request.cookies.get("user") or secrets.token_urlsafe()  # replace this with your own sign-in
    tag = f"user:{user}"
    token = realtime.create_public_token(scopes={"read": {"tags": [tag]}})
    cookie = Cookie("user", value=user, httponly=True, samesite="lax")
    return Response({"tag": tag, "token": token}, cookies=[cookie])


@post("/chat")
async def ask(data: Question, request: Request[Any, Any, Any]) -> dict[str, Any]:
    return await realtime.trigger(chat, data, tags=[f"user:{request.cookies['user']}"])


@post("/chat/{run_id:str}/stop", status_code=204)
async def stop(run_id: str, request: Request[Any, Any, Any]) -> None:
    run = await realtime.get_run(run_id)
    if f"user:{request.cookies.get('user')}" not in run.tags:
        raise NotFoundException
    await realtime.cancel(run)


def not_found(request: Request[Any, Any, Any], exc: RunNotFound) -> Response[None]:
    return Response(None, status_code=404)


page = create_static_files_router("/", directories=[PAGE], html_mode=True)
host = Litestar([session, ask, stop, page], exception_handlers={RunNotFound: not_found}, logging_config=None)
# Not a mount: Litestar copies the scope for mounts, so the server would log the tokens in URLs.
app = RealtimeMiddleware(host, realtime)
