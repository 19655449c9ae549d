"""A FastAPI backend for `useChat`: answers survive a reload and a lost connection, and any worker serves them."""

import os
import secrets
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.staticfiles import StaticFiles
from openai import AsyncOpenAI

from asgi_realtime import Realtime, RunEnd
from asgi_realtime.ai import parts
from examples.usechat_app.chats import EXPLAINED, PAGE, Asked, OwnChat, OwnQuestion, history, router, text_of

realtime = Realtime(
    secret_key=os.environ.get("REALTIME_SECRET_KEY") or secrets.token_urlsafe(32),
    broker=os.environ.get("REALTIME_BROKER", "memory://"),
)
openai = AsyncOpenAI()  # OPENAI_API_KEY, OPENAI_BASE_URL
MODEL = os.environ.get("OPENAI_MODEL", "gpt-4o-mini")


async def save(end: RunEnd) -> None:
    message = await end.message()
    if end.run.status != "COMPLETED":
        message["metadata"] = {"status": end.run.status}  # a part of an answer must not look finished
    history.save(end.run.payload["id"], message)


@realtime.task("answer", on_end=save)
async def answer(asked: Asked) -> None:
    earlier = history.messages(asked.id, before=asked.message.id)
    conversation = [*earlier, asked.message.model_dump()]
    messages: Any = [{"role": message["role"], "content": text_of(message)} for message in conversation]
    completion = await openai.chat.completions.create(model=MODEL, messages=messages, stream=True)
    await realtime.pipe(parts(completion)).wait_until_complete()


app = FastAPI(lifespan=realtime.lifespan, exception_handlers=EXPLAINED)
app.mount("/realtime", realtime)
app.include_router(router)


@app.post("/api/chat")
async def send(asked: OwnQuestion, request: Request) -> Response:
    run = await realtime.trigger(answer, asked, thread=asked.id)
    history.ask(asked.id, asked.message.model_dump(), answer_id=f"msg_{run.id}")  # not in the task: it may never start
    return realtime.response(run, protocol="ai-sdk", request=request)


@app.get("/api/chat/{chat_id}/stream")
async def resume(chat_id: OwnChat, request: Request) -> Response:
    run = await realtime.active_run(chat_id)
    return realtime.response(run, protocol="ai-sdk", request=request) if run else Response(status_code=204)


@app.post("/api/chat/{chat_id}/stop", status_code=204)
async def stop(chat_id: OwnChat) -> None:
    if run := await realtime.active_run(chat_id):
        await realtime.cancel(run)


app.mount("/", StaticFiles(directory=PAGE, html=True, check_dir=False))
