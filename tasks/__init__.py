"""The work: one module per stage of `dvc.yaml`, and the few modules that they share."""

import ctypes
import os
import signal
import sys


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent does: `dvc` forwards no signal (3.67.1: TERM or KILL orphans a stage)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


if "DVC_STAGE" in os.environ:  # here, since what a stage imports first takes seconds, in which `dvc` may be killed too
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `stage.main` answers it: no traceback out of an import
