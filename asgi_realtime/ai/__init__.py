"""Converts any model or agent stream to message parts, and parts to the wire formats of chat frontends."""

from __future__ import annotations

from asgi_realtime.ai.parts import Parts, parts

__all__ = ["Parts", "parts"]
