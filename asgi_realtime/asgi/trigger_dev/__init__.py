"""The Trigger.dev dialect, and nothing else."""
