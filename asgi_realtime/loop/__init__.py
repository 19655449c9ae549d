"""Everything that knows about asyncio, trio, threads and signals."""
