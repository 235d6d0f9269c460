"""What reforge costs where it has nothing to do, as ratios measured in one run.

Each comparison is interleaved (A B A B …) and given as medians:

- `dvc repro` of this repository against `dvc repro` of ten stages that run `true`, with the same settings of DVC: without
  them the other would also start a process that sends analytics; and beside both a graph of `true` that declares what this
  repository's does, of files of a byte: what DVC itself takes for so many dependencies, outputs and params;
- the flow `pipeline`, all stages Cached, against a flow of as many empty tasks, both against one running Prefect server;
- the start of a data stage against `import polars`.

What `dvc repro` takes here beyond the ten, as CPU time on one machine in ms, of 210: 41 the import of pyparsing, which DVC
needs for the `${…}` of `foreach`; 37 the status of 207 dependencies and outputs, and 24 their entries in DVC's lock of
paths; 31 params.yaml, parsed for each stage; 31 dvc.yaml and dvc.lock, parsed twice. All but the first grow with what is
declared, so the bar is not within reach while every input is.
"""

import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml
from dvc.repo import Repo

ROOT = Path(__file__).parent.parent
EMPTY = """\
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

@task(cache_policy=NO_CACHE, persist_result=False)
def nothing(before):
    return None

@flow
def empty():
    futures = []
    for _ in range({tasks}):
        futures.append(nothing.submit(futures[-1:]))
    futures[-1].result()

empty()
"""
DVC = [sys.executable, "-m", "dvc", "repro"]


def median_seconds(runs: Sequence[Callable[[], None]], rounds: int) -> list[float]:
    """Median wall time of each of `runs`, in seconds; rounds alternate between them, and one before is not counted."""
    times: list[list[float]] = [[] for _ in runs]
    for number in range(rounds + 1):
        for index, run in enumerate(runs):
            started = time.perf_counter()
            run()
            if number:
                times[index].append(time.perf_counter() - started)
    return [statistics.median(found) for found in times]


def quiet(command: Sequence[str], folder: Path, environment: dict[str, str], expected: str) -> Callable[[], None]:
    """A run of `command` that must say `expected`: what was not a no-op is no measurement."""

    def run() -> None:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)  # noqa: S603
        if done.returncode or expected not in done.stdout + done.stderr:
            raise SystemExit(
                f"bench: {' '.join(command[-3:])}: expected {expected!r}, found:\n{done.stdout}{done.stderr}"
            )

    return run


@contextmanager
def ten_stages() -> Iterator[Path]:
    """A repository of ten stages that run `true`, up to date."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stages = "".join(f"  s{i}:\n    cmd: 'true'\n    deps: [in]\n" for i in range(10))
        (folder / "dvc.yaml").write_text(f"stages:\n{stages}")
        (folder / "in").touch()
        for command in (["git", "init", "-q"], [*DVC[:-1], "init", "-q"]):
            subprocess.run(command, cwd=folder, check=True, capture_output=True)  # noqa: S603
        shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")
        subprocess.run(DVC, cwd=folder, check=True, capture_output=True)  # noqa: S603
        yield folder


@contextmanager
def same_graph() -> Iterator[Path]:
    """This repository's graph, up to date, in which every stage runs `true` on files of a byte."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        graph = yaml.safe_load((ROOT / "dvc.yaml").read_text())
        with Repo(str(ROOT)) as here:
            stages = [stage for stage in here.index.stages if stage.path_in_repo == "dvc.yaml"]
            paths = {Path(entry.fs_path).relative_to(ROOT) for s in stages for entry in (*s.deps, *s.outs)}
        for stage in graph["stages"].values():
            stage.get("do", stage)["cmd"] = "true"
        (folder / "dvc.yaml").write_text(yaml.safe_dump(graph, sort_keys=False))
        shutil.copy(ROOT / "params.yaml", folder)
        for path in sorted(paths, reverse=True):  # what is in a folder before it
            if not (folder / path).exists():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text("x")
        for command in (["git", "init", "-q"], [*DVC[:-1], "init", "-q"]):
            subprocess.run(command, cwd=folder, check=True, capture_output=True)  # noqa: S603
        shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")
        subprocess.run([*DVC[:-1], "commit", "--force", "--quiet"], cwd=folder, check=True, capture_output=True)  # noqa: S603
        yield folder


@contextmanager
def server() -> Iterator[dict[str, str]]:
    """A Prefect server on loopback with a database of its own, as an environment for its clients."""
    with tempfile.TemporaryDirectory() as home, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        url = f"http://127.0.0.1:{port}/api"
        environment = os.environ | {
            "PREFECT_HOME": home, "PREFECT_API_URL": url, "PREFECT_SERVER_API_HOST": "127.0.0.1",
            "PREFECT_SERVER_API_PORT": port, "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "prefect", "server", "start"]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=2).close()  # noqa: S310  (loopback)
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise SystemExit("bench: Prefect's server did not start") from None
                    time.sleep(0.2)
            yield environment
        finally:
            process.terminate()
            process.wait(30)


def repro(rounds: int) -> tuple[float, float, float]:
    """Median seconds of `dvc repro` here, of ten stages of `true`, and of this graph of `true`, with nothing to do.

    Raises:
        SystemExit: the pipeline is not up to date.
    """
    with ten_stages() as ten, same_graph() as same:
        said = "Data and pipelines are up to date."
        runs = [quiet(DVC, folder, dict(os.environ), said) for folder in (ROOT, ten, same)]
        ours, theirs, alike = median_seconds(runs, rounds)
    return ours, theirs, alike


def flow(rounds: int) -> tuple[float, float, int]:
    """Median seconds of the flow with nothing to do, of as many empty tasks, and how many there are."""
    listed = subprocess.run([*DVC[:-1], "stage", "list", "--name-only"], cwd=ROOT, capture_output=True, text=True)  # noqa: S603
    count = len(listed.stdout.split())
    with server() as environment:
        runs = [
            quiet([sys.executable, "-m", "flows.pipeline"], ROOT, environment, f"pipeline: {count} unchanged"),
            quiet([sys.executable, "-c", EMPTY.format(tasks=count)], ROOT, environment, "Completed()"),
        ]
        ours, theirs = median_seconds(runs, rounds)
    return ours, theirs, count


def start(rounds: int) -> tuple[float, float]:
    """Median seconds of a data stage's `--help`, and of an import of the library that it can't do without."""
    runs = [
        quiet([sys.executable, "-m", "tasks.validate", "--help"], ROOT, dict(os.environ), "usage"),
        quiet([sys.executable, "-c", "import polars"], ROOT, dict(os.environ), ""),
    ]
    ours, theirs = median_seconds(runs, rounds)
    return ours, theirs
