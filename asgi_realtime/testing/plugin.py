"""The pytest fixtures of `asgi_realtime.testing`, found by pytest through an entry point."""
