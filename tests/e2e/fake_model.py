"""An endpoint with OpenAI's API whose answer the test sets, and can hold back."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ANSWER = [f"word{number} " for number in range(40)]
FAILS = "Fail, please."
"""The question that causes an error."""


class FakeModel:
    """Answers each question with the words of `ANSWER`. While held, it stops after some of them until released."""

    def __init__(self, url: str) -> None:
        self.environment = {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "for the tests only"}
        self._words = len(ANSWER)
        self._go = threading.Event()

    def hold(self, after: int = 10) -> None:
        self._go.clear()
        self._words = after

    def let_go(self) -> None:
        self._words = len(ANSWER)
        self._go.set()

    def words(self) -> Iterator[str]:
        held_at = self._words
        yield from ANSWER[:held_at]
        if held_at < len(ANSWER):
            self._go.wait()
            yield from ANSWER[held_at:]


@contextmanager
def fake_model() -> Iterator[FakeModel]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["content-length"])))["messages"][0]["content"]
            self.send_response(400 if question == FAILS else 200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            if question != FAILS:
                for word in model.words():
                    self.wfile.write(b"data: %s\n\n" % json.dumps(_chunk(word)).encode())
                self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        model = FakeModel(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield model
        model.let_go()
        server.shutdown()
        thread.join()


def _chunk(word: str) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
    return {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "fake", "choices": [choice]}
