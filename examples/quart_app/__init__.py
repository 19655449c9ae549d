"""The same chat in Quart: `make demo APP=quart`."""
