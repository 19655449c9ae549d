"""Runs as the rest of the code uses them: read, create, change, restore after broker data loss."""
