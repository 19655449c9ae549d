"""A chat in FastAPI: `make demo`."""
