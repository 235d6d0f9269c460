"""The work: one module per stage of `dvc.yaml`, and the few modules that they share."""
