"""What the backend of the page needs beside the answers: the user, the stored chats, and errors as text."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from asgi_realtime import RealtimeError, ThreadBusy
from examples.usechat_app.history import History, Message

FOLDER = Path(__file__).parent
PAGE = FOLDER / "dist"
history = History(os.environ.get("CHAT_DATABASE", FOLDER / "chats.sqlite3"))


class Text(BaseModel):
    type: Literal["text"]
    text: str = Field(min_length=1, max_length=20_000)


class Question(BaseModel):
    id: str = Field(max_length=100)
    role: Literal["user"]
    parts: list[Text] = Field(min_length=1, max_length=10)

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)


class Asked(BaseModel):
    """What the page sends: the id of the chat, and the newest message. The others are in the history."""

    id: str = Field(pattern=r"^[\w-]{1,64}$")
    message: Question


def current_user(request: Request, response: Response) -> str:
    user = request.cookies.get("user") or secrets.token_urlsafe()  # replace this with your own sign-in
    response.set_cookie("user", user, httponly=True, samesite="lax")
    return user


User = Annotated[str, Depends(current_user)]


def own_chat(chat_id: str, user: User) -> str:
    if history.owner(chat_id) != user:
        raise HTTPException(404, "There is no such chat, or it is not yours.")
    return chat_id


def own_question(asked: Asked, user: User) -> Asked:
    if not history.claim(asked.id, user):
        raise HTTPException(404, "There is no such chat, or it is not yours.")
    return asked


OwnChat = Annotated[str, Depends(own_chat)]
OwnQuestion = Annotated[Asked, Depends(own_question)]
router = APIRouter()


@router.get("/api/chats")
def list_chats(user: User) -> list[dict[str, str]]:
    return [{"id": chat, "title": text_of(history.messages(chat)[0])} for chat in history.chats(user)]


@router.get("/api/chat/{chat_id}")
def load_chat(chat_id: OwnChat) -> list[Message]:
    return history.messages(chat_id)


def text_of(message: Message) -> str:
    return "".join(part["text"] for part in message["parts"] if part["type"] == "text")


# Errors. The page shows the text of a response.


async def explain(request: Request, exc: Exception) -> Response:
    match exc:
        case RequestValidationError():
            wrong = [f"{'.'.join(map(str, error['loc'][1:]))}: {error['msg']}" for error in exc.errors()]
            return PlainTextResponse(f"This cannot be sent. {'; '.join(wrong)}", 422)
        case HTTPException():
            return PlainTextResponse(exc.detail, exc.status_code)
        case ThreadBusy():
            return PlainTextResponse("This chat is still answering. Wait for the answer, or stop it.", exc.status)
        case _:
            assert isinstance(exc, RealtimeError)
            return PlainTextResponse(str(exc), exc.status)


EXPLAINED: dict[int | type[Exception], Any] = dict.fromkeys(
    (RequestValidationError, HTTPException, RealtimeError), explain
)
"""The exception handlers of the app."""
