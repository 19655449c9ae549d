"""Live run updates and LLM token streams for any ASGI app, in the app's own process."""

from __future__ import annotations

__version__ = "0.1.0"
