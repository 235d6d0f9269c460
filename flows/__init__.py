"""dvc.yaml in Prefect: the same graph run, scheduled, gated and shared. Only `stages` imports dvc; nothing here loads torch."""

import os

# before prefect is imported, which reads them then; nothing phones home
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("ITERATIVE_DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
HEARTBEAT = 30  # seconds, the least that Prefect sends; `flows.serve` has the server end a run after three
os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", str(HEARTBEAT))
# of the server that Prefect starts where there is none; its own 20 are few on a busy machine
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
# who holds a slot of a concurrency limit, on disk: in memory, which is Prefect's default, a server that ends forgets it, and
# the slot stays taken for ever
os.environ.setdefault("PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE", "prefect.server.concurrency.lease_storage.filesystem")
