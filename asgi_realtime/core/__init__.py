"""Values and pure functions: log, SSE, chunks, topics, runs, metadata, scopes, names, errors. No loop, clock or I/O."""
