"""The chat beyond one process: two web workers, two job workers, Redis between them."""
