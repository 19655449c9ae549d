"""A chat whose answers survive a reload, in FastAPI. The page needs no more of its host than this."""

import os
import secrets
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.staticfiles import StaticFiles
from openai import AsyncOpenAI
from pydantic import BaseModel

from asgi_realtime import Realtime, Run, RunNotFound

realtime = Realtime(secret_key=os.environ.get("REALTIME_SECRET_KEY") or secrets.token_urlsafe(32))
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
    stream = realtime.pipe(completion)  # whoever watches the run has each chunk as it comes; this loop has it too
    async for chunk in stream:
        token = "".join(choice.delta.content or "" for choice in chunk.choices)
        text += token
        run.metadata.increment("tokens", 1 if token else 0)
    await stream.wait_until_complete()
    return {"text": text}


def current_user(request: Request, response: Response) -> str:
    user = request.cookies.get("user") or secrets.token_urlsafe()  # in place of your own sign-in
    response.set_cookie("user", user, httponly=True, samesite="lax")
    return user


User = Annotated[str, Depends(current_user)]
app = FastAPI(lifespan=realtime.lifespan)
app.mount("/realtime", realtime)


@app.post("/session")
async def session(user: User) -> dict[str, str]:
    tag = f"user:{user}"
    return {"tag": tag, "token": realtime.create_public_token(scopes={"read": {"tags": [tag]}})}


@app.post("/chat")
async def ask(question: Question, user: User) -> dict[str, object]:
    return await realtime.trigger(chat, question, tags=[f"user:{user}"])


@app.post("/chat/{run_id}/stop", status_code=204)
async def stop(run_id: str, user: User) -> None:
    run = await realtime.get_run(run_id)
    if f"user:{user}" not in run.tags:
        raise HTTPException(404)
    await realtime.cancel(run)


@app.exception_handler(RunNotFound)
async def not_found(request: Request, exc: RunNotFound) -> Response:
    return Response(status_code=404)


app.mount("/", StaticFiles(directory=PAGE, html=True))
