"""The loggers of the library, `asgi_realtime` and, of the client, `asgi_realtime.client`. Hosts configure these names.

Each message starts with the name, because an unconfigured host prints warnings without it.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Adapter = logging.LoggerAdapter[logging.Logger]
else:
    Adapter = logging.LoggerAdapter


class PrefixedLogger(Adapter):
    """Starts every message with `asgi_realtime: `."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return f"asgi_realtime: {msg}", kwargs


logger = PrefixedLogger(logging.getLogger("asgi_realtime"), {})
client_logger = PrefixedLogger(logging.getLogger("asgi_realtime.client"), {})
