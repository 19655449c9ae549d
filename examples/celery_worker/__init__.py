"""A task on a Celery worker: `python -m examples.celery_worker`."""
