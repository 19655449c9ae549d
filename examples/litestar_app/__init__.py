"""The same chat in Litestar: `make demo APP=litestar`."""
