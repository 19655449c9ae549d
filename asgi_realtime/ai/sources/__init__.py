"""The supported kinds of sources. Each is recognized by the form of its items, without an import of its library.

The form of an item decides, not that of the source, because most sources are wrapped: in generators of the host, and
in proxies of instrumentations. Only objects that are no iterables themselves are recognized before (`unwrapped`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asgi_realtime.ai.sources.ag_ui import AgUi
from asgi_realtime.ai.sources.anthropic import Anthropic
from asgi_realtime.ai.sources.base import Converter
from asgi_realtime.ai.sources.completions import Completions
from asgi_realtime.ai.sources.genai import GenAI
from asgi_realtime.ai.sources.langchain import Events, Messages
from asgi_realtime.ai.sources.langgraph import Graph
from asgi_realtime.ai.sources.openai_agents import EventStream, OpenAIAgents
from asgi_realtime.ai.sources.pydantic_ai import PydanticAI, ResponseStream
from asgi_realtime.ai.sources.responses import Responses
from asgi_realtime.ai.sources.strings import Strings
from asgi_realtime.ai.sources.ui_parts import UiParts
from asgi_realtime.core.errors import InvalidSource
from asgi_realtime.streams.sources import check_source

__all__ = ["SUPPORTED", "Converter", "check", "converter_for", "unwrapped"]

KINDS: tuple[type[Converter], ...] = (
    Strings,
    UiParts,
    Completions,
    Responses,
    Anthropic,
    PydanticAI,
    AgUi,
    GenAI,
    OpenAIAgents,
    Events,
    Messages,
    Graph,
)
"""In this order: the first that accepts an item converts it."""

SUPPORTED = (
    "supported are streams of openai (chat completions and Responses), litellm, anthropic, google-genai, pydantic-ai,"
    " openai-agents, LangChain and LangGraph, AI SDK parts as dicts, AG-UI events, and strings"
)


_STREAMS: tuple[tuple[tuple[str, ...], Callable[[Any], Any]], ...] = (
    (("stream_events", "is_complete", "cancel"), EventStream),  # run_streamed of openai-agents
    (("stream_response", "new_messages"), ResponseStream),  # run_stream of pydantic-ai
)
"""The streams of results that are no iterables, by the attributes that reveal them."""


def check(source: Any) -> None:
    """Raise `InvalidSource` for an object that is no stream of items."""
    if _stream_of(source) is not None:
        return
    if isinstance(source, str):
        raise InvalidSource(f"a str is not a source; pass [text] for one text; {SUPPORTED}")
    try:
        check_source(source)
    except InvalidSource as exc:
        raise InvalidSource(f"{exc}; {SUPPORTED}") from None


def unwrapped(source: Any) -> Any:
    """The iterable of an object that has its stream in a method; any other object unchanged."""
    stream = _stream_of(source)
    return source if stream is None else stream(source)


def _stream_of(source: Any) -> Callable[[Any], Any] | None:
    if isinstance(source, type) or hasattr(source, "__aiter__"):
        return None
    for attributes, stream in _STREAMS:
        if all(hasattr(source, name) for name in attributes):
            return stream
    return None


def converter_for(item: Any) -> type[Converter]:
    """The kind of source that an item belongs to. Raises `InvalidSource` if it is unknown."""
    for kind in KINDS:
        if kind.accepts(item):
            return kind
    raise InvalidSource(f"parts() does not know the item {_description(item)}; {SUPPORTED}")


def _description(item: Any) -> str:
    """The type of an item, and what identifies it; nothing of its content."""
    if isinstance(item, dict):
        names = ", ".join(repr(str(name)[:40]) for name in list(item)[:8])
        return f"a dict with the keys {names}" if names else "an empty dict"
    cls = type(item)
    return f"a {cls.__name__} of {cls.__module__}"
