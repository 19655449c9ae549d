"""What lives between start and stop: executions, ticker, leases, subscribers, shutdown."""
