"""Makes `python -m asgi_realtime` run the command line."""

from __future__ import annotations

from asgi_realtime.cli import main

if __name__ == "__main__":
    main(prog="python -m asgi_realtime")
