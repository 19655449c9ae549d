"""Writing a stream and reading it back: sources, pipe, writer, local copy, readers."""
