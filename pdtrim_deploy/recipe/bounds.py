"""Upper limits of input values: far above useful values, but within what clocks, sockets and memory allow."""

from __future__ import annotations

MOST_SECONDS = 604_800  # a week
MOST_TOKENS = 10_000_000  # of one text
MOST_REQUESTS = 10_000_000
MOST_SIMULATED = 1_000_000  # each is an object in memory
MOST_SIMULATED_WORKERS = 10_000
MOST_CLIENTS = 10_000
MOST_WORKERS = 64  # on one machine: each has ports and memory of its own
MOST_ROUNDS = 1000
MOST_REPLICAS = 10_000  # of a cluster's stage, and GPUs of one worker
