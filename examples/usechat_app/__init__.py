"""A chat with the AI SDK's `useChat`: `make demo APP=usechat`."""
