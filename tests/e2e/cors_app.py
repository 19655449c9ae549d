"""The FastAPI example in a host with CORS middleware of its own around everything. CURE says what it does for us."""

from __future__ import annotations

import os

from fastapi.middleware.cors import CORSMiddleware

from asgi_realtime import EXPOSED_HEADERS, RealtimeMiddleware
from examples.fastapi_app.app import app, realtime
from examples.server import run

cure = os.environ["CURE"]
exposed = ["x-of-the-host", *(EXPOSED_HEADERS if cure == "exposed" else [])]
app.add_middleware(
    CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"], expose_headers=exposed
)
if cure == "outermost":
    app.add_middleware(RealtimeMiddleware, realtime=realtime)  # the last one added is the first that a request meets

if __name__ == "__main__":
    run("tests.e2e.cors_app:app")
