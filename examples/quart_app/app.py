"""The chat of `examples/fastapi_app` in Quart: the same task, the same page."""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI
from quart import Quart, Response, abort, jsonify, request

from asgi_realtime import Realtime, RealtimeError, RealtimeMiddleware, Run

realtime = Realtime(secret_key=os.environ.get("REALTIME_SECRET_KEY") or secrets.token_urlsafe(32))
openai = AsyncOpenAI()  # OPENAI_API_KEY, OPENAI_BASE_URL
MODEL = os.environ.get("OPENAI_MODEL", "gpt-4o-mini")
PAGE = Path(__file__).parent.parent / "page"


@dataclass
class Question:
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


app = Quart(__name__, static_folder=str(PAGE), static_url_path="")
app.asgi_app = RealtimeMiddleware(app.asgi_app, realtime)  # type: ignore[method-assign,assignment]


@app.get("/")
async def page() -> Response:
    return await app.send_static_file("index.html")


@app.post("/session")
async def session() -> Response:
    user = request.cookies.get("user") or secrets.token_urlsafe()  # replace this with your own sign-in
    tag = f"user:{user}"
    response = jsonify(tag=tag, token=realtime.create_public_token(scopes={"read": {"tags": [tag]}}))
    response.set_cookie("user", user, httponly=True, samesite="Lax")
    return response


@app.post("/chat")
async def ask() -> dict[str, Any]:
    question = await request.get_json()
    return await realtime.trigger(chat, question, tags=[f"user:{request.cookies['user']}"])


@app.post("/chat/<run_id>/stop")
async def stop(run_id: str) -> tuple[str, int]:
    run = await realtime.get_run(run_id)
    if f"user:{request.cookies.get('user')}" not in run.tags:
        abort(404)
    await realtime.cancel(run)
    return "", 204


@app.errorhandler(RealtimeError)
async def error(exc: RealtimeError) -> tuple[str, int]:
    return str(exc), exc.status  # 404 for an expired run, 422 for an invalid question
