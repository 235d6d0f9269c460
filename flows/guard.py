"""Run a command, and end all that it started as soon as nobody waits for it any more.

`python guard.py COMMAND …`: standard input is the lifeline. When its other end is closed, which the kernel does even for a
process that was killed, the command's whole process group gets SIGTERM, and SIGKILL after `GRACE` seconds. The exit code
is the command's (128 + n for signal n). `dvc` forwards no signal to the stage that it runs (dvc 3.67.1), so that a flow
that starts it without this leaves the training behind.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

GRACE = 10.0  # seconds


def main(command: list[str]) -> int:
    """Run `command` until it or the lifeline ends; nothing of its process group survives this call."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # only the lifeline ends it; a handler, unlike SIG_IGN, is not inherited
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(
            36, 1, 0, 0, 0
        )  # PR_SET_CHILD_SUBREAPER: orphans of the command come here to be waited for
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603  (what the flow runs)
    cut = threading.Event()

    def watch() -> None:
        while os.read(0, 1):
            pass
        cut.set()
        _signal(child.pid, signal.SIGTERM)
        time.sleep(GRACE)
        _signal(child.pid, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    deadline = time.monotonic() + (GRACE if cut.is_set() else 0)
    while time.monotonic() < deadline and _children():
        time.sleep(0.02)
    _signal(child.pid, signal.SIGKILL)
    return code if code >= 0 else 128 - code


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _children() -> bool:
    """Whether any is left, after reaping those that ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
