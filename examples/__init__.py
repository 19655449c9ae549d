"""Programs to be read, run and copied. Each is started by `python -m examples.<name>`."""
