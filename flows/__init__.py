"""Where the Prefect flows derived from dvc.yaml belong; there are none yet, `dvc repro` runs the graph."""
