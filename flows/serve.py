"""The deployments of a team's server: `retrain` every night, `pipeline` and `sweep` when somebody asks for them.

    python -m flows.serve [--cron '0 2 * * *'] [--timezone Europe/Berlin] [--limit 4]
    python -m flows.serve --start-server [--port 4200]     # the same with a server of its own, on loopback: `make ui`

Runs until it is stopped, in the workspace in which it is started, against the server of PREFECT_API_URL. Runs of one
workspace wait for each other. It leaves one automation on the server, which ends runs whose process died.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zoneinfo
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from prefect import get_client, serve
from prefect.automations import Automation
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.schedules import Cron
from prefect.settings import PREFECT_API_URL

import flows.pipeline as pipeline_module
import flows.retrain as retrain_module
import flows.sweep as sweep_module
from flows import HEARTBEAT
from flows.pipeline import UNREACHABLE

LOST = "reforge: runs whose process died"


def deployments(cron: str, timezone: str) -> list[Any]:
    """`retrain` on its schedule, `pipeline` and `sweep` without one.

    Raises:
        ValueError: not a cron line, or no such time zone.
    """
    zoneinfo.ZoneInfo(timezone)
    return [
        pipeline_module.pipeline.to_deployment("pipeline", description="Bring the stages of dvc.yaml up to date."),
        sweep_module.sweep.to_deployment(
            "sweep", description="Run the pipeline for every combination of some parameters."
        ),
        retrain_module.retrain.to_deployment(
            "retrain",
            description="Refresh the data, run the pipeline, promote the model if it passes the gate.",
            schedule=Cron(cron, timezone=timezone),
        ),
    ]


def end_lost_runs() -> None:
    """Have the server end a run of these flows as *Crashed* when its heartbeat stays away for three beats."""
    read: Any = Automation.read
    automation: Any = Automation(
        name=LOST,
        description="A flow that is killed (kill -9, a lost machine) can't say so: without this it stays Running for ever.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", "prefect.flow-run.Completed", "prefect.flow-run.Failed",
                    "prefect.flow-run.Cancelled", "prefect.flow-run.Crashed"},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            match_related={"prefect.resource.role": "flow", "prefect.resource.name": ["pipeline", "retrain", "sweep"]},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=3 * HEARTBEAT),
        ),
        actions=[ChangeFlowRunState(name="Crashed", state=StateType.CRASHED, force=False, message="Its process is gone: no heartbeat.")],
    )  # fmt: skip
    with contextlib.suppress(ValueError):
        automation.id = read(name=LOST).id
        automation.update()
        return
    automation.create()


def with_server(port: int, arguments: Sequence[str]) -> int:
    """A server on 127.0.0.1 and this program against it, until the latter is stopped; both end together."""
    url = f"http://127.0.0.1:{port}/api"
    environment = os.environ | {
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(
            port
        ),  # `server start --port` alone leaves the page calling 4200 (prefect 3.8.8)
        "PREFECT_API_URL": url,
    }
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            print(
                f"serve: port {port} is taken: stop what listens there, or choose another with --port", file=sys.stderr
            )
            return 1
    # in a session of its own: a Ctrl-C goes to all of a terminal's, and what runs must still be able to say how it ended
    command = [sys.executable, "-m", "prefect", "server", "start"]
    server = subprocess.Popen(command, env=environment, start_new_session=True)  # noqa: S603
    try:
        deadline = time.monotonic() + 120
        while not _healthy(url):
            if server.poll() is not None or time.monotonic() > deadline:
                print("serve: the server did not start; what it said is above", file=sys.stderr)
                return 1
            time.sleep(0.3)
        runner = subprocess.Popen([sys.executable, "-m", "flows.serve", *arguments], env=environment)  # noqa: S603
        try:
            return runner.wait()
        finally:  # it ends the runs that it started, while the server still listens
            _end(runner)
    except (KeyboardInterrupt, SystemExit):
        return 130
    finally:
        _end(server)


def _end(process: "subprocess.Popen[Any]", patience: float = 30) -> None:
    """Terminate it, twice if need be, else kill it.

    What a signal raises in Python is lost if it comes within a destructor: the first one may do nothing. A runner ends its runs
    first, whose stages have ten seconds to end themselves.
    """
    for _ in range(2):
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return
    process.kill()
    process.wait()


def _healthy(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2) as answer:  # noqa: S310  (loopback)
        return bool(answer.status == 200)
    return False


def _answers() -> bool:
    """Whether the server of PREFECT_API_URL does, asked as Prefect asks it: with its certificates, headers and password."""
    with contextlib.suppress(*UNREACHABLE), get_client(sync_client=True) as client:
        return client.api_healthcheck() is None
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cron", default="0 2 * * *", help="when `retrain` starts (default: %(default)s)")
    parser.add_argument("--timezone", default="UTC", help="of the cron line (default: %(default)s)")
    parser.add_argument(
        "--limit", type=int, default=4, help="runs at a time; those of one workspace wait for each other"
    )
    parser.add_argument("--start-server", action="store_true", help="start Prefect's server on 127.0.0.1 too")
    parser.add_argument("--port", type=int, default=4200, help="of that server (default: %(default)s)")
    given = parser.parse_args(arguments)
    if given.limit < 1:
        parser.error(f"--limit: expected 1 or more, found {given.limit}")
    if not 1 <= given.port <= 65535:
        parser.error(f"--port: expected 1 to 65535, found {given.port}")
    try:
        chosen = deployments(given.cron, given.timezone)
    except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError) as error:  # a folder of zones is an OSError
        print(f"serve: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # which is nohup's
        # the terminal was closed: end as with SIGTERM, which Prefect's runner handles too
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    if given.start_server:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return with_server(
            given.port, [f"--cron={given.cron}", f"--timezone={given.timezone}", f"--limit={given.limit}"]
        )
    if not PREFECT_API_URL.value():
        print("serve: no server: set PREFECT_API_URL, or start both with `make ui`", file=sys.stderr)
        return 1
    try:
        with get_client(sync_client=True) as client:
            client.hello().raise_for_status()
        end_lost_runs()
    except Exception as error:  # of httpx, for whatever reason the server can't be used
        print(f"serve: {PREFECT_API_URL.value()} can't be used: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    while True:
        try:
            serve(*chosen, limit=given.limit)
            return 0
        except UNREACHABLE as error:  # Prefect's runner gives up after some minutes without a server
            print(f"serve: {' '.join(str(error).split())}; waiting for {PREFECT_API_URL.value()}", file=sys.stderr)
            time.sleep(10)  # also where the server is there and something else is wrong
            while not _answers():
                time.sleep(10)


if __name__ == "__main__":
    sys.exit(main())
