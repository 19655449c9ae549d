"""The chat page in React, with Trigger.dev's own hooks."""
