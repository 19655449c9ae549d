"""The web process of the chat: it triggers runs and serves their streams, but does not execute them."""

import secrets
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.staticfiles import StaticFiles

from asgi_realtime import RunNotFound
from examples.redis_workers.tasks import Question, chat, realtime

PAGE = Path(__file__).parent.parent / "page"


def current_user(request: Request, response: Response) -> str:
    user = request.cookies.get("user") or secrets.token_urlsafe()  # replace this with your own sign-in
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
    await realtime.cancel(run)  # the worker is notified


@app.exception_handler(RunNotFound)
async def not_found(request: Request, exc: RunNotFound) -> Response:
    return Response(status_code=404)


app.mount("/", StaticFiles(directory=PAGE, html=True))
