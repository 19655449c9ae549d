"""The FastAPI example in a host whose own CORS middleware wraps everything. CURE selects how it accommodates us."""

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
    app.add_middleware(RealtimeMiddleware, realtime=realtime)  # the last one added runs first

if __name__ == "__main__":
    run("tests.e2e.cors_app:app")
