"""Kills at random moments of every stage: the next `dvc repro` goes on by itself, to the bytes of an uninterrupted run.

That run is the fixture's. This one is in another folder, with another language, time zone, home, umask, hash seed and shell,
and without a network: what of this changed a byte, or needed a route, would be seen here too.
"""

import itertools
import os
import queue
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from tests.conftest import ROOT, clone, edit, fork, run
from tests.namespaces import no_network
from tests.small import alive, environment

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

# whom it hits, and how; `memory`: the kernel gives it no more, and what then neither ends nor goes on is killed, as the
# kernel itself does when it is out of memory
WAYS = [
    (whom, how)
    for whom in ("stage", "dvc", "group")
    for how in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
] + [("stage", "memory")]  # fmt: skip
# what a person would have to look into, or clear away by hand
STUCK = ("Unable to acquire lock", "is busy", "Unexpected error", "JSON structure is corrupted")
SILENCE = 300.0  # seconds without a line: it hangs
CUT_OFF = ("dvc.lock' is invalid", "YAML file structure is corrupted")  # see tests/test_mend.py
DEAD = "mend: .dvc/tmp/rwlock named processes that are gone: removed from it\nmend: 1 put right\n"
ELSEWHERE = {
    "TZ": "Asia/Kathmandu", "LANG": "C", "LC_ALL": "C", "HOME": "/nonexistent", "PYTHONHASHSEED": "7", "PYTHONPATH": "",
    "HF_HUB_OFFLINE": "0", "SHELL": "",
}  # fmt: skip


@dataclass
class Repro:
    """A `dvc repro` in a group of its own, whose output is read as it comes."""

    repo: Path
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(
            [*no_network(), "dvc", "repro"], cwd=self.repo, env=environment(**ELSEWHERE), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True, umask=0o077,
        )  # fmt: skip
        self.coming: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.coming.put(line)
        self.coming.put(None)

    def _line(self, seconds: float) -> str | None:
        """The next line; None when it and all that writes to the same pipe have ended.

        Raises:
            queue.Empty: there was none in time.
        """
        line = self.coming.get(timeout=seconds)
        if line is None:
            self.coming.put(None)
        else:
            self.lines.append(line)
        return line

    def until_a_stage_starts(self, within: float | None = None) -> str | None:
        """Its name; None when dvc has ended, or when none started within so many seconds."""
        deadline = None if within is None else time.monotonic() + within
        while True:
            try:
                line = self._line(SILENCE if deadline is None else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                if deadline is None:
                    self._fail()
                return None
            if line is None:
                return None
            if line.startswith("Running stage '"):
                return line.split("'")[1]

    def _fail(self) -> None:
        tree = run("ps axfo pid,stat,wchan:20,etimes,args", self.repo).stdout
        pytest.fail(f"no word for {SILENCE:.0f} s\n{''.join(self.lines)}\n{tree}")

    def hit(self, whom: str, how: signal.Signals | str) -> None:
        """Also where there is no stage at this moment: then dvc is hashing, copying or writing, and is hit itself."""
        try:
            if whom == "group":
                os.killpg(self.process.pid, how)
                return
            dvc = psutil.Process(self.process.pid)
            found = [p for p in dvc.children(recursive=True) if any("tasks." in word for word in p.cmdline())]
            target = found[-1] if whom == "stage" and found else dvc
            if how == "memory":
                resource.prlimit(target.pid, resource.RLIMIT_AS, (2**20, resource.RLIM_INFINITY))
                deadline = time.monotonic() + 15
                while alive(target.pid) and time.monotonic() < deadline:
                    time.sleep(0.1)
                target.kill()
            else:
                target.send_signal(how)
        except (psutil.NoSuchProcess, ProcessLookupError):
            pass

    def output(self) -> str:
        try:
            while self._line(SILENCE) is not None:
                pass
        except queue.Empty:
            self._fail()
        self.process.wait(60)
        return "".join(self.lines)


def soak(repo: Path, kills: dict[str, int], seed: int, longest: float) -> list[str]:
    """Run the pipeline of `repo` to its end with so many kills of each stage (in the order of the graph); who was hit how.

    The first kill of a stage comes within half a second, so that each gets one; the others up to `longest` seconds after it
    began. Where it was over by then, `dvc` itself is hit at its work; where the next one runs by then, that one gets the kill.
    A dvc.lock that was cut off is put right as `make run` does it: that is the one thing that a plain `dvc repro` stops at.
    """
    draw = random.Random(seed)
    ways = itertools.cycle(draw.sample(WAYS, len(WAYS)))
    *_, last = kills
    due = dict(zip(kills, itertools.accumulate(kills.values()), strict=True))
    done: list[str] = []
    cut, began = 0, time.monotonic()
    while True:
        repro = Repro(repo)
        stage = repro.until_a_stage_starts()
        while stage is not None:
            if len(done) < due[stage]:
                first = not any(line.startswith(f"{stage}: ") for line in done)
                moment = draw.uniform(0, 0.4 if first or stage == last else longest)
                following = repro.until_a_stage_starts(moment)
                if following is not None:
                    stage = following
                    continue
                if repro.process.poll() is not None:
                    break
                whom, how = next(ways)
                repro.hit(whom, how)
                done.append(f"{stage}: {getattr(how, 'name', how)} to {whom} after {moment:.1f} s")
                print(f"{time.monotonic() - began:.0f} s: {done[-1]}", flush=True)
            # dvc may go on: it ignores an INT to itself alone while a stage runs
            stage = repro.until_a_stage_starts()
        output = repro.output()
        assert not any(word in output for word in STUCK), f"{done[-2:]}\n{output}"
        # Python's own start knows no better than a traceback, and without memory it ends in any way
        assert "Traceback" not in output or "KeyboardInterrupt" in output or "memory" in done[-1], output
        if repro.process.returncode == 0:
            print(f"{len(done)} kills, after {cut} of which dvc.lock was cut off", flush=True)
            return done
        if any(word in output for word in CUT_OFF):
            cut += 1
            run([sys.executable, "-m", "flows.mend", "--quick"], repo)


def results(repo: Path) -> dict[str, bytes]:
    """Every output of every stage, and dvc.lock; not what is about the event."""
    files = (p for p in (repo / "data").rglob("*") if p.is_file() and not p.name.startswith("event"))
    return {str(p.relative_to(repo)): p.read_bytes() for p in (*files, repo / "dvc.lock")}


def graph_order(repo: Path) -> list[str]:
    """The stages as `dvc repro` runs them from nothing."""
    return list(YAML(typ="safe").load(repo / "dvc.lock")["stages"])


def forget(repo: Path) -> None:
    """As if nothing had ever run."""
    stages = YAML(typ="safe").load(repo / "dvc.lock")["stages"].values()
    outs = [repo / out["path"] for stage in stages for out in stage["outs"]]
    for path in (*outs, repo / ".dvc/cache", repo / "dvc.lock"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def check(repo: Path, wanted: dict[str, bytes]) -> None:
    assert results(repo) == wanted
    assert run("dvc status -q", repo, check=False).returncode == 0
    said = run([sys.executable, "-m", "flows.mend"], repo).stdout
    assert said in ("mend: nothing is damaged\n", DEAD)  # the dead are in DVC's way only if their numbers come again
    assert not (repo / ".checkpoints").exists()
    assert not list(_processes(repo))


def _processes(repo: Path) -> Iterator[list[str]]:
    """Whatever still works in this folder."""
    for process in psutil.process_iter(["cwd", "cmdline"]):
        if process.info["cwd"] == str(repo):
            yield process.info["cmdline"]


@pytest.mark.timeout(1800)
def test_thirty_kills(pipeline: Path, tmp_path: Path) -> None:
    repo = fork(pipeline, tmp_path / "repo")
    wanted = results(repo)
    order = graph_order(repo)
    forget(repo)
    done = soak(repo, dict.fromkeys(order, 2) | {"sft": 3, "dpo": 3}, seed=30, longest=2.5)
    assert len(done) == 30
    assert {line.split(":")[0] for line in done} == set(order)
    check(repo, wanted)


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("seed", range(int(os.environ.get("SOAK_ROUNDS", "5"))))
def test_many_kills(pipeline: Path, tmp_path: Path, seed: int) -> None:
    """With checkpoints every other step, so that trainings are resumed from everywhere."""
    repo = fork(pipeline, tmp_path / "repo")
    for section in ("sft", "dpo"):
        for key, value in (("save_strategy", "steps"), ("save_steps", 2), ("load_best_model_at_end", False)):
            edit(repo, section, key, value)
    run("dvc repro", repo)
    wanted = results(repo)
    order = graph_order(repo)
    forget(repo)
    soak(repo, dict.fromkeys(order, 3) | {"sft": 8, "dpo": 8}, seed=seed, longest=8.0)
    check(repo, wanted)


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.skipif(
    "SOAK_DEFAULT" not in os.environ, reason="SOAK_DEFAULT=1 runs the default model: an hour and a half"
)
def test_the_default_model(tmp_path: Path) -> None:
    """The repository's own run, whose dvc.lock is in git; kills within the first two minutes of each stage."""
    repo = clone(tmp_path / "repo")
    shutil.copy2(ROOT / "dvc.lock", repo / "dvc.lock")
    run("git add -A && git -c user.name=t -c user.email=t@example.org commit -qm lock", repo)
    run("dvc repro", repo)
    wanted = results(repo)
    order = graph_order(repo)
    forget(repo)
    soak(repo, dict.fromkeys(order, 2) | {"sft": 5, "dpo": 5}, seed=1, longest=120.0)
    check(repo, wanted)
