"""A small DVC repository of shell stages, for what would take a model too long to show: seconds, locks, kills.

A test on a busy machine can't say how long a stage must last for something else to happen meanwhile; it says when the stage
may end: `slow` lasts as long as there is a file `hold` (`held`), and each of `a` and `b` until both have begun, a second at
most, or a hundred with `MEET=00`.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.conftest import ROOT, commit, run

GRAPH = """\
stages:
  first:
    cmd: >-
      echo first >> log; cat in > one; echo '{"size": 1.5}' > first.json
    deps: [in]
    outs: [one]
    metrics: [first.json: {cache: false}]
  slow:
    cmd: python slow.py
    deps: [one, slow.py]
    params: [slow]
    outs: [two]
    meta: {gpu: true}
  each:
    foreach: [a, b]
    do:
      cmd: >-
        echo ${item} >> log; cat one > ${item}.out; date +%s.%N >> ${item}.times; touch ${item}.here;
        timeout 1$MEET sh -c 'until ls a.here b.here; do sleep 0.1; done' > /dev/null 2>&1; date +%s.%N >> ${item}.times
      deps: [one]
      outs: [ "${item}.out" ]
  report:
    cmd: echo report >> log; cat two a.out > report.md
    deps: [two, a.out]
    outs: [report.md]
"""
SLOW = """\
import json, os, subprocess, sys, time
from pathlib import Path
from tasks import die_with_parent
die_with_parent()
open("log", "a").write("slow\\n")
began = time.time()
child = subprocess.Popen(["sleep", "300"]) if os.environ.get("GRANDCHILD") else None
Path("pids").write_text(f"{os.getpid()} {child.pid if child else os.getpid()}")
seconds = float(os.environ.get("SLOW_SECONDS", "0"))
step = Path("checkpoint")
for n in range(int(step.read_text()) if step.exists() else 0, 10):
    print(f"{n * 10}%|##        | {n}/10 [00:00<?, ?it/s]", end="\\r", file=sys.stderr, flush=True)
    time.sleep(seconds / 10)
    step.write_text(str(n + 1))
print(f"100%|##########| 10/10 [00:00<?, ?it/s]", file=sys.stderr)
while Path("hold").exists(): time.sleep(0.05)
step.unlink()
Path("pids").unlink()
if os.environ.get("FAIL"):
    sys.exit(os.environ["FAIL"])
if os.environ.get("FAIL_ONCE") and not Path("failed.times").exists():
    Path("failed.times").touch()
    sys.exit(os.environ["FAIL_ONCE"])
Path("two").write_text(Path("one").read_text())
open("slow.times", "a").write(f"{began}\\n{time.time()}\\n")
if child: child.kill()
"""


def make(folder: Path) -> Path:
    """The repository, committed, nothing run yet."""
    folder.mkdir()
    run("git init -q -b main && dvc init -q && dvc config core.analytics false", folder)
    (folder / "dvc.yaml").write_text(GRAPH)
    (folder / "slow.py").write_text(SLOW)
    (folder / "params.yaml").write_text("slow: 1\n")
    (folder / "in").write_text("input\n")
    (folder / ".gitignore").write_text("log\n*.times\n*.here\nhold\npids\ncheckpoint\n__pycache__/\n")
    run("git add -A && git -c user.name=t -c user.email=t@example.org commit -qm one", folder)
    return folder


def ran(folder: Path) -> Path:
    """The repository in which all ran, committed."""
    repo = make(folder)
    run("dvc repro", repo, PYTHONPATH=str(ROOT))
    commit(repo, "ran")
    (repo / "log").unlink()
    return repo


def log(repo: Path) -> list[str]:
    """The stages whose commands ran, in order."""
    return (repo / "log").read_text().split() if (repo / "log").exists() else []


def alive(pid: int) -> bool:
    """Running, and no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def until(condition, seconds: float = 120, what: str = "it did not happen") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def pids(repo: Path) -> list[int]:
    """Of the running `slow` and its child, once it runs."""
    until(lambda: (repo / "pids").exists() and len((repo / "pids").read_text().split()) == 2, what="slow did not start")
    return [int(pid) for pid in (repo / "pids").read_text().split()]


@contextlib.contextmanager
def held(*repos: Path) -> Iterator[None]:
    """While this lasts no `slow` of these repositories ends."""
    holds = [repo / "hold" for repo in repos]
    try:
        for hold in holds:
            hold.touch()
        yield
    finally:
        for hold in holds:
            hold.unlink(missing_ok=True)


@contextlib.contextmanager
def meanwhile(repo: Path, do: Callable[[], object]) -> Iterator[None]:
    """`do` in a thread as soon as the `slow` that is started here runs, which ends no sooner than that is done."""

    def act() -> None:
        try:
            pids(repo)
            do()
        finally:
            (repo / "hold").unlink()

    (repo / "hold").touch()
    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(act)
        yield
        acting.result()


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PYTHONPATH": str(ROOT), "PATH": path} | more


def start(command: list[str], repo: Path, **env: str) -> "subprocess.Popen[str]":
    """A program beside the test, in a group of its own."""
    return subprocess.Popen(
        command, cwd=repo, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]", seconds: float = 120) -> str:
    """Its output, when it ended; it is killed if it does not."""
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()  # closes the pipe, which else fails a test that comes later


def times(path: Path) -> list[tuple[float, float]]:
    """When a stage's commands began and ended."""
    read = [float(line) for line in path.read_text().split()]
    return list(zip(read[::2], read[1::2], strict=True))


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] < other[1] and other[0] < one[1]
