"""A model that needs no endpoint: it looks the weather up, offers a postcard, and says what has happened."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import anyio
from pydantic_ai.messages import ModelMessage, ModelRequest, ToolReturnPart, UserPromptPart
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, DeltaToolCalls, FunctionModel

WORD_S = 0.05


async def script(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str | DeltaToolCalls]:
    prompt, results = "", dict[str, str]()
    for part in (part for message in messages if isinstance(message, ModelRequest) for part in message.parts):
        if isinstance(part, UserPromptPart):
            prompt, results = str(part.content), {}
        elif isinstance(part, ToolReturnPart):
            results[part.tool_name] = str(part.content)
    city = next(iter(re.findall(r"\b(?:in|from|to) ([A-Z]\w+)", prompt)), "Lisbon")
    if not results:
        yield {0: DeltaToolCall("weather", f'{{"city": "{city}"}}', tool_call_id=f"weather-{len(messages)}")}
    elif len(results) == 1:
        text = f"Greetings! It is {results['weather']}."
        arguments = f'{{"city": "{city}", "text": "{text}"}}'
        yield {0: DeltaToolCall("send_postcard", arguments, tool_call_id=f"postcard-{len(messages)}")}
    else:
        end = "The postcard is on its way." if results["send_postcard"] == "sent" else "I have not sent a postcard."
        for word in f"It is {results['weather']}. {end}".split(" "):
            yield f"{word} "
            await anyio.sleep(WORD_S)


scripted_model = FunctionModel(stream_function=script)
