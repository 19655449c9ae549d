"""The library in each host framework, under each server, in separate processes."""
