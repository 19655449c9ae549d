"""Records docs/restart.gif: the chat in Chromium, while its web server is killed, and while the page is reloaded.

`PYTHONPATH=. .venv/bin/python tools/animation.py`, after `make test`, and `pip install pillow` into `.venv`. It starts
the processes of `make demo APP=redis_workers`, with one web process. The model is a script, so that the answer has the
same speed on every machine, and most of it is left when the new server is there. The waits for that are shortened.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import Page, sync_playwright

from examples.local_redis import local_redis, wait_until
from examples.processes import running
from examples.redis_workers.__main__ import is_up

QUESTION = "Why is the sky blue?"
ANSWER = """Sunlight looks white, but it is a mixture of all colors. On its way to you, it passes through the air, \
whose molecules are much smaller than the wavelength of light. They scatter light in all directions, and the shorter \
the wavelength, the more they scatter: blue light about four times as much as red light.

So wherever you look, some of the light that reaches your eye has been scattered out of its path, and most of that is \
blue. Violet has an even shorter wavelength, but the sun sends less of it, and our eyes are less sensitive to it.

In the evening, the light takes a longer way through the air. By then, most of the blue has been scattered away, and \
what is left near the horizon is orange and red."""
SIZE = (800, 500)
CAPTION = 34
COLORS = 64
PORT = 8123
URL = f"http://127.0.0.1:{PORT}"
WORKER = [sys.executable, *"-m taskiq worker examples.redis_workers.tasks:queue --workers 1 --log-level ERROR".split()]
WEB = [sys.executable, *f"-m uvicorn examples.redis_workers.app:app --port {PORT} --log-level error".split()]

FONT = ImageFont.truetype("DejaVuSansMono.ttf", 15)


class Model(BaseHTTPRequestHandler):
    """Streams `ANSWER` in OpenAI's format, one word at a time."""

    word_s = 0.13

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for word in ANSWER.split(" "):
            time.sleep(Model.word_s)
            choice = {"index": 0, "delta": {"content": f"{word} "}}
            chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "script", "choices": [choice]}
            self.wfile.write(b"data: %b\n\n" % json.dumps(chunk).encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


class Recording:
    """Frames with the time that each is shown."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.frames: list[Image.Image] = []
        self.shown_ms: list[int] = []

    def record(self, caption: str, until: Callable[[float], bool], at_most_ms: int = 60_000) -> None:
        first, began = len(self.frames), time.monotonic()
        while not until(time.monotonic() - began):
            shot = time.monotonic()
            screen = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
            frame = Image.new("RGB", (SIZE[0], SIZE[1] + CAPTION), "#1b1b22")
            frame.paste(screen, (0, CAPTION))
            ImageDraw.Draw(frame).text((14, 8), caption, "#ececf1", FONT)
            time.sleep(max(0.0, 0.1 - (time.monotonic() - shot)))
            self.frames.append(frame)
            self.shown_ms.append(round((time.monotonic() - shot) * 1000))
        faster = max(1.0, sum(self.shown_ms[first:]) / at_most_ms)
        self.shown_ms[first:] = [round(ms / faster) for ms in self.shown_ms[first:]]

    def save(self, path: Path) -> None:
        samples = Image.new("RGB", (SIZE[0], 3 * SIZE[1]))
        for number in range(3):
            samples.paste(self.frames[len(self.frames) * number // 3], (0, number * SIZE[1]))
        palette = samples.quantize(COLORS, Image.Quantize.MAXCOVERAGE)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in self.frames]
        self.shown_ms[-1] = 3000
        frames[0].save(
            path, save_all=True, append_images=frames[1:], duration=self.shown_ms, loop=0, optimize=True, disposal=1
        )


def main(path: Path) -> None:
    with local_redis() as redis, sync_playwright() as playwright, ExitStack() as stack:
        model = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Model))
        stack.callback(model.shutdown)
        Thread(target=model.serve_forever).start()
        environment = {**os.environ, "REDIS_URL": redis.url, "REALTIME_SECRET_KEY": secrets.token_hex()}
        environment |= {"OPENAI_BASE_URL": f"http://127.0.0.1:{model.server_port}", "OPENAI_API_KEY": "none"}
        stack.enter_context(running(*WORKER, environment=environment))
        web = subprocess.Popen(WEB, env=environment)
        stack.callback(lambda: web.kill())
        wait_until(lambda: is_up(URL), [web])
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        page = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page(
            viewport={"width": SIZE[0], "height": SIZE[1]}, color_scheme="light"
        )
        page.goto(URL)
        page.wait_for_selector("#feed[data-state=live]")

        def characters() -> int:
            return len(page.text_content("#answer") or "")

        def is_complete(seconds: float) -> bool:
            return page.get_attribute("#answer", "aria-busy") == "false"

        movie = Recording(page)
        page.type("#prompt", QUESTION)
        page.keyboard.press("Enter")
        movie.record("A worker answers, a web server streams.", lambda s: characters() > 190, 5000)
        web.send_signal(signal.SIGKILL)
        web.wait()
        movie.record("$ kill -9 %web", lambda s: s > 1.5)
        Model.word_s = 1.0  # this machine can take long to start a server
        web = subprocess.Popen(WEB, env=environment)
        before = characters()
        movie.record("$ uvicorn app:app", lambda s: characters() > before, 2500)
        Model.word_s = 0.13
        movie.record("The text continues where it was.", lambda s: s > 2)
        page.reload(wait_until="commit")
        movie.record("The page is reloaded.", lambda s: s > 1 and characters() > before, 2000)
        movie.record("The whole text is there, and continues.", is_complete, 5000)
        movie.record("Complete: nothing is missing, nothing doubled.", lambda s: s > 0.3)
    movie.save(path)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/restart.gif"))
