"""Everything that knows about asyncio, trio, threads and signals: waiters, the job
supervisor, retries, thread calls.
"""
