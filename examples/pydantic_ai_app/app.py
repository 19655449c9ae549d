"""A pydantic-ai agent with tools, one of which asks the user first. The page is that of `examples/usechat_app`."""

import os
import secrets
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, ModelRequest, ModelResponse, TextPart, UserPromptPart

from asgi_realtime import Realtime, RunEnd, current_run
from asgi_realtime.ai import parts
from examples.pydantic_ai_app.scripted_model import scripted_model
from examples.usechat_app.chats import EXPLAINED, PAGE, Asked, OwnChat, OwnQuestion, history, router, text_of

realtime = Realtime(
    secret_key=os.environ.get("REALTIME_SECRET_KEY") or secrets.token_urlsafe(32),
    broker=os.environ.get("REALTIME_BROKER", "memory://"),
)
agent = Agent(
    os.environ.get("AGENT_MODEL") or scripted_model,  # such as "openai:gpt-4o-mini"
    instructions="Answer in one or two sentences. Use the tools.",
)


@agent.tool_plain
async def weather(city: str) -> str:
    """The weather in a city."""
    return f"21 °C and sunny in {city}"


@agent.tool_plain
async def send_postcard(city: str, text: str) -> str:
    """Send a postcard from a city."""
    return "sent" if await approved(f"Send a postcard from {city}: “{text}”?") else "The user does not want that."


async def approved(question: str) -> bool:
    """Show a question in the page, and wait for the answer."""
    run, id = current_run(), secrets.token_hex(8)
    await realtime.append({"type": "data-approval", "id": id, "data": {"question": question}})
    answer: bool = await run.input(f"approval-{id}").get(timeout="1h")
    await realtime.append({"type": "data-approval", "id": id, "data": {"question": question, "approved": answer}})
    return answer


async def save(end: RunEnd) -> None:
    message = await end.message()
    if end.run.status != "COMPLETED":
        message["metadata"] = {"status": end.run.status}  # a part of an answer must not look finished
    history.save(end.run.payload["id"], message)


@realtime.task("answer", on_end=save)
async def answer(asked: Asked) -> None:
    earlier = [to_pydantic_ai(message) for message in history.messages(asked.id, before=asked.message.id)]
    events = agent.run_stream_events(asked.message.text, message_history=earlier)
    await realtime.pipe(parts(events)).wait_until_complete()


def to_pydantic_ai(message: dict[str, Any]) -> ModelMessage:
    if message["role"] == "user":
        return ModelRequest([UserPromptPart(text_of(message))])
    return ModelResponse([TextPart(text_of(message))])


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


class Approval(BaseModel):
    id: str
    approved: bool


@app.post("/api/chat/{chat_id}/approve", status_code=204)
async def approve(chat_id: OwnChat, approval: Approval) -> None:
    run = await realtime.active_run(chat_id)
    if run is None:
        raise HTTPException(409, "This question is no longer open.")
    await realtime.send_input(run, f"approval-{approval.id}", approval.approved)


app.mount("/", StaticFiles(directory=PAGE, html=True, check_dir=False))
