"""The Redis suite: a web process, a worker process and their own Redis, with separate CPU figures.

`python -m benchmarks redis` starts them anew for each workload and peer. The web process has its own CPU and the load
client another. The worker and Redis share what is left, so on a machine with two CPUs only CPU figures and ratios are
meaningful.
"""
