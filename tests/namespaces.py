"""A part of the machine taken away, for a program and what it starts: its network, or the room on its disk."""

import shlex
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest


@cache
def _allowed(*options: str) -> bool:
    try:
        return subprocess.run(["unshare", *options, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def no_network() -> list[str]:
    """Put before a command: it has a loopback interface, and no route to anywhere."""
    if not _allowed("--net"):
        pytest.skip("this machine lets nobody here make a network namespace (`unshare --net`)")
    up = "import fcntl, os, socket, struct, sys; s = socket.socket(); r = struct.pack('16sh', b'lo', 0x49)\n"
    up += "fcntl.ioctl(s, 0x8914, r); os.execvp(sys.argv[1], sys.argv[1:])"  # SIOCSIFFLAGS: up, running, loopback
    return ["unshare", "--net", "python", "-c", up]


def mounted(folder: Path, options: str, command: Sequence[str] | str) -> list[str]:
    """A command that finds a file system of its own at `folder`; with it, that is gone.

    Args:
        options: of tmpfs, such as `size=64k` or `ro`.
        command: a list, or a line of shell.
    """
    if not _allowed("--mount"):
        pytest.skip("this machine lets nobody here mount anything (`unshare --mount`)")
    line = command if isinstance(command, str) else shlex.join(command)
    return ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs -o {options} tmpfs {shlex.quote(str(folder))} && {line}"]
