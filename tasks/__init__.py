"""The work: one module per stage of `dvc.yaml`, and the modules that they share."""

import ctypes
import os
import select
import signal
import sys
import threading
from pathlib import Path

# What the libraries are told, unless the environment tells them otherwise. Set here, since they read most of it when they are
# imported, which is before any code of a stage runs.
ENVIRONMENT = {
    # nothing phones home and nothing asks a hub unless a source in params.yaml names one
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "warning",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS sums in one order only with a workspace of its own, which torch asks for
    # of the products that oneDNN compiles: each new number of tokens needs some 30, which seldom come again, about 1 MiB each;
    # of 1,024, which it keeps by itself, a training of many lengths fills 1 GiB. A step has fewer than 100.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    # torch's own layer above it (ideep) would hold 1,024 more, with what each computes in, whose name says nothing of it: of
    # the default's SFT 0.34 GiB in 60 steps
    "LRU_CACHE_CAPACITY": "128",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent does: `dvc` forwards no signal (3.67.1: TERM or KILL orphans a stage)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def die_with_dvc() -> None:
    """The same where a shell stays between `dvc` and the stage, as dash does, which is /bin/sh on Debian: no $SHELL, no exec.

    That shell outlives `dvc`, and waits for the stage. `dvc` is the nearest ancestor without the environment that it gave it.
    """
    die_with_parent()
    try:
        above = os.getppid()
        while b"DVC_STAGE=" in Path(f"/proc/{above}/environ").read_bytes():
            above = int(Path(f"/proc/{above}/stat").read_text().rpartition(")")[2].split()[1])
        if above == os.getppid():
            return  # it is the parent
        ended = os.pidfd_open(above)
    except (OSError, AttributeError):  # not Linux, or it is gone already: `stage.main` of the next one ends this
        return

    def wait() -> None:
        select.select([ended], [], [])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="die_with_dvc", daemon=True).start()


if "DVC_STAGE" in os.environ:  # here, since what a stage imports first takes seconds, in which `dvc` may be killed too
    die_with_dvc()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `stage.main` answers it: no traceback out of an import
