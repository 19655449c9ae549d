"""A pydantic-ai agent behind the AI SDK's `useChat`: `make demo APP=pydantic_ai`."""
