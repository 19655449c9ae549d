"""A FastAPI chat with answers that survive a reload: the backend of `examples/page` and `examples/react_app`."""

import os
import secrets
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.staticfiles import StaticFiles
from openai import AsyncOpenAI
from pydantic import BaseModel

from asgi_realtime import Realtime, Run, RunNotFound, RunRecord

realtime = Realtime(
    secret_key=os.environ.get("REALTIME_SECRET_KEY") or secrets.token_urlsafe(32),
    broker=os.environ.get("REALTIME_BROKER", "memory://"),
)
openai = AsyncOpenAI()  # OPENAI_API_KEY, OPENAI_BASE_URL
MODEL = os.environ.get("OPENAI_MODEL", "gpt-4o-mini")
PAGE = Path(__file__).parent.parent / "page"


class Question(BaseModel):
    text: str


@realtime.task("chat")
async def chat(question: Question, run: Run) -> dict[str, str]:
    completion = await openai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": question.text}], stream=True
    )
    text = ""
    stream = realtime.pipe(completion)  # sends each chunk to subscribers and to this loop
    async for chunk in stream:
        token = "".join(choice.delta.content or "" for choice in chunk.choices)
        text += token
        run.metadata.increment("tokens", 1 if token else 0)
    await stream.wait_until_complete()
    return {"text": text}


@realtime.task("publish")
async def publish(answer: Question, run: Run) -> dict[str, bool]:
    approval = await run.input("approval").get(timeout="1h")  # sent by a page with a token for this input
    return {"published": approval["approved"]}


def current_user(request: Request, response: Response) -> str:
    user = request.cookies.get("user") or secrets.token_urlsafe()  # replace this with your own sign-in
    response.set_cookie("user", user, httponly=True, samesite="lax")
    return user


User = Annotated[str, Depends(current_user)]


async def own_run(run_id: str, user: User) -> RunRecord:
    run = await realtime.get_run(run_id)
    if f"user:{user}" not in run.tags:
        raise HTTPException(404)
    return run


OwnRun = Annotated[RunRecord, Depends(own_run)]
app = FastAPI(lifespan=realtime.lifespan)
app.mount("/realtime", realtime)


@app.post("/session")
async def session(user: User) -> dict[str, str]:
    tag = f"user:{user}"
    return {
        "tag": tag,
        "token": realtime.create_public_token(scopes={"read": {"tags": [tag]}}),
        "triggerToken": realtime.create_trigger_public_token([chat, publish], multiple_use=True),
    }


@app.post("/session/{run_id}")
async def run_session(run: OwnRun) -> dict[str, str]:
    return {"token": realtime.create_public_token(scopes={"write": {"inputStreams": [run.id]}})}


@app.post("/chat")
async def ask(question: Question, user: User) -> dict[str, object]:
    return await realtime.trigger(chat, question, tags=[f"user:{user}"])


@app.post("/chat/{run_id}/stop", status_code=204)
async def stop(run: OwnRun) -> None:
    await realtime.cancel(run)


@app.exception_handler(RunNotFound)
async def not_found(request: Request, exc: RunNotFound) -> Response:
    return Response(status_code=404)


app.mount("/", StaticFiles(directory=PAGE, html=True))
