"""The pure part: logs, frames, scopes, metadata and runs as values and functions.

No I/O, no event loop, no clock (the time is an argument) and no framework.
"""
