"""What goes over Redis, measured as the rest is: web process, worker process and a Redis of its own, told apart in CPU.

`python -m benchmarks redis` starts them anew for each workload and peer. The web process has a CPU of its own and the
load client another; the worker and Redis run where there is room, so only figures of CPU and ratios mean something on a
machine with two.
"""
