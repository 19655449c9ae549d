"""The chat in several processes: two web workers and two job workers, connected through Redis."""
