"""`python -m examples.pydantic_ai_app`: build the page of `examples/usechat_app`, and run the agent, until Ctrl-C."""

from __future__ import annotations

from contextlib import nullcontext

from examples.usechat_app.serving import main

if __name__ == "__main__":
    main("examples.pydantic_ai_app.app:app", nullcontext())
