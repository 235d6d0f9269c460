"""dvc.yaml in Prefect: the same graph run, scheduled, gated and shared. Only `stages` imports dvc; nothing here loads torch."""
