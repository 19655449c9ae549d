"""Side-by-side measurements of asgi_realtime, a hand-written raw ASGI app and sse-starlette.

`python -m benchmarks` starts each server in a separate process under the same uvicorn, drives it from this process on
another CPU, verifies every byte that arrives, and prints one table. Figures of different machines are not comparable;
ratios to `raw` within one run are.
"""
