"""`python -m asgi_realtime`: see `cli`."""

from __future__ import annotations

from asgi_realtime.cli import main

if __name__ == "__main__":
    main()
