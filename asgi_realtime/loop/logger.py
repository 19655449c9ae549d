"""The loggers of the library, `asgi_realtime` and, of the client, `asgi_realtime.client`. Hosts configure these names.

Where no handler is configured, such as in an app under plain uvicorn, Python prints the bare message of a warning to
stderr (`logging.lastResort`). Only there, messages start with the name of the library. The format of a handler is the
host's choice, and can contain the name of the logger.
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
    """Starts messages with `asgi_realtime: ` while no handler is configured."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return msg if self.hasHandlers() else f"asgi_realtime: {msg}", kwargs


logger = PrefixedLogger(logging.getLogger("asgi_realtime"), {})
client_logger = PrefixedLogger(logging.getLogger("asgi_realtime.client"), {})
