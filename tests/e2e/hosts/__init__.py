"""The library as a guest: each host framework, under each server, as processes of their own."""
