"""The Trigger.dev dialect: what its official clients ask for beyond plain SSE."""
