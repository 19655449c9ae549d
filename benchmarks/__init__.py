"""Side-by-side measurements of asgi_realtime, a hand-written raw ASGI app and sse-starlette.

`python -m benchmarks` starts each server in a process of its own under the same uvicorn, drives it from this process on
another CPU, verifies every byte that arrives, and prints one table. Numbers of different machines do not compare; the
ratios to `raw` in one run do.
"""
