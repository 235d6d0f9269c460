"""One Prefect server for all tests of a session, on a free port of loopback, with a database of its own."""

import atexit
import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT, fork
from tests.small import environment

needs_ss = pytest.mark.skipif(
    shutil.which("ss") is None, reason="no `ss`: what still listens is not seen (apt-get install iproute2)"
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Server:
    url: str  # of the page
    home: Path
    env: dict[str, str]  # for its clients

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        for _ in range(10):
            answer = httpx.request(method, f"{self.url}/api/{path}", json=body, timeout=120)
            if answer.status_code != 503:  # SQLite is busy; Prefect's own clients try again too
                break
            time.sleep(1)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def post(self, path: str, body: Any = None) -> Any:
        return self.ask("POST", path, body if body is not None else {})

    def get(self, path: str) -> Any:
        return self.ask("GET", path)

    def newest(self, flow: str = "pipeline") -> Any:
        """The flow run that was made last."""
        return self.post(
            "flow_runs/filter", {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_DESC", "limit": 1}
        )[0]

    def tasks(self, run: str) -> dict[str, tuple[str, str]]:
        """Task run name → (state, message) of a flow run that ended; the server writes them from events, a little later.

        So they are taken when none is on its way and a second look finds the same ones.
        """
        deadline = time.monotonic() + 120
        before: dict[str, tuple[str, str]] | None = None
        while True:
            found = self.post("task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
            known = {
                task["name"]: task["state"] or {"name": "Pending", "message": ""} for task in found
            }  # none yet: no event
            states = {name: (state["name"], state["message"]) for name, state in known.items()}
            waiting = any(name in ("Pending", "Running") for name, _ in states.values())
            if (states == before and not waiting) or time.monotonic() > deadline:
                return states
            before = states
            time.sleep(1)

    def artifacts(self, run: str) -> dict[str, Any]:
        found = self.post("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}})
        return {artifact["key"]: artifact for artifact in found}

    def logs(self, run: str) -> list[str]:
        return [
            log["message"]
            for log in self.post("logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC"})
        ]


def wait_healthy(url: str, process: "subprocess.Popen[Any]", seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"{url}/api/health", timeout=2):
                return
        except OSError:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.2)


@functools.cache
def start() -> Server:
    """The session's server; it ends with the session."""
    home = Path(tempfile.mkdtemp(prefix="prefect-"))
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    env = {
        "PREFECT_HOME": str(home), "PREFECT_SERVER_API_HOST": "127.0.0.1", "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_API_URL": f"{url}/api", "DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }  # fmt: skip
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start"],
            env=environment(**env), stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def stop() -> None:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
        shutil.rmtree(home, ignore_errors=True)

    atexit.register(stop)
    wait_healthy(url, process)
    return Server(url, home, env)


@dataclass(frozen=True)
class Served:
    api: Server
    repo: Path
    process: "subprocess.Popen[Any]"

    def run(self, deployment: str, seconds: float = 120, **parameters: Any) -> Any:
        """Start a deployment as the page does, and wait for its end."""
        name = self.api.get(f"deployments/name/{deployment}")["id"]
        run = self.api.post(
            f"deployments/{name}/create_flow_run",
            {"parameters": parameters, "enforce_parameter_schema": True, "state": {"type": "SCHEDULED"}},
        )
        return self.ended(run["id"], seconds)

    def ended(self, run: str, seconds: float = 120) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            found = self.api.get(f"flow_runs/{run}")
            if found["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
                return found
            assert time.monotonic() < deadline, (found["state"], self.api.logs(run))
            time.sleep(0.3)


@functools.cache
def ui(pipeline: Path) -> Served:
    """What `make ui` runs, in a copy of `pipeline` with the work tree's flows; it ends with the session."""
    folder = Path(tempfile.mkdtemp(prefix="served-"))
    repo = fork(pipeline, folder / "repo")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    env = {"PREFECT_HOME": str(folder / "prefect"), "PREFECT_API_URL": f"{url}/api"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.serve", "--start-server", "--port", str(port), "--cron", "30 3 * * *", "--timezone", "Asia/Seoul"],
            cwd=repo, env=environment(PREFECT_HOME=env["PREFECT_HOME"], PREFECT_API_URL="", PYTHONPATH=str(ROOT)),
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def stop() -> None:
        if process.poll() is None:
            os.killpg(process.pid, 15)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(stop)
    wait_healthy(url, process)
    api = Server(url, folder / "prefect", env)
    deadline = time.monotonic() + 120
    while len(api.post("deployments/filter", {})) < 3:
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.3)
    return Served(api, repo, process)
