"""Deployments on a real server: what `make ui` offers, and work pools out of prefect.yaml."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_CLIENT_CUSTOM_HEADERS,
    PREFECT_CLIENT_MAX_RETRIES,
    temporary_settings,
)
from ruamel.yaml import YAML

from flows import serve, sweep
from tasks.params import UserError
from tests import server, small
from tests.conftest import ORDER, ROOT, fork, run

PREFECT = [sys.executable, "-m", "prefect"]


@pytest.fixture(scope="module")
def served(pipeline: Path) -> server.Served:
    return server.ui(pipeline)


def test_deployments_and_their_schedules(served: server.Served) -> None:
    found = {d["name"]: d for d in served.api.post("deployments/filter", {})}
    assert set(found) == {"pipeline", "sweep", "retrain"}
    assert [d["schedules"] for name, d in found.items() if name != "retrain"] == [[], []]
    (schedule,) = found["retrain"]["schedules"]
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == ("30 3 * * *", "Asia/Seoul")
    assert schedule["active"]
    # and its runs are there: with SQLAlchemy 2.1 prefect 3.8.8's scheduler failed at each, and none ever began
    waiting = {
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}, "deployment_id": {"any_": [found["retrain"]["id"]]}}
    }
    deadline = time.monotonic() + 240
    while not (runs := served.api.post("flow_runs/filter", waiting)):
        assert time.monotonic() < deadline, "no run of the schedule"
        time.sleep(1)
    assert all(datetime.fromisoformat(run["expected_start_time"]).minute == 30 for run in runs)


def test_parameters_are_typed_described_and_bounded(served: server.Served) -> None:
    schema = served.api.get("deployments/name/pipeline/pipeline")["parameter_openapi_schema"]["properties"]
    assert all(schema[name].get("description") for name in ("repo", "targets", "pull", "timeout", "gpu")), schema
    assert schema["pull"]["type"] == "boolean"
    assert next(kind for kind in schema["timeout"]["anyOf"] if kind["type"] == "number")["exclusiveMinimum"] == 0
    swept = served.api.get("deployments/name/sweep/sweep")["parameter_openapi_schema"]["definitions"][
        "SweepParameters"
    ]["properties"]
    assert swept["best"]["enum"] == ["highest", "lowest"]
    assert (swept["max_points"]["minimum"], swept["max_points"]["maximum"]) == (1, 256)
    assert all(field.get("description") for field in swept.values())


def test_a_figure_that_a_test_does_not_have_is_an_empty_cell(pipeline: Path) -> None:
    """Own rows have no invented terms, say; a key that nothing has is refused."""
    known, unknown = (f"data/evaluate/dpo.json:{key}" for key in ("general.accuracy", "honesty.nothing"))
    found = sweep.figures(pipeline, [unknown, known])
    assert found["honesty.nothing"] is None
    assert 0 <= found["general.accuracy"] <= 1
    with pytest.raises(UserError, match=r"honesty\.nothing: no such figure"):
        sweep.figures(pipeline, [unknown])


@pytest.mark.parametrize(
    ("deployment", "parameters"),
    [
        ("pipeline/pipeline", {"timeout": -1}),
        ("pipeline/pipeline", {"pull": "perhaps"}),
        ("pipeline/pipeline", {"targets": "sft"}),
        ("sweep/sweep", {"parameters": {"best": "middle"}}),
        ("sweep/sweep", {"parameters": {"max_points": 0}}),
        ("sweep/sweep", {"parameters": {"metrics": ["manner.kindness"]}}),
    ],
)
def test_a_wrong_value_is_refused_before_anything_runs(
    served: server.Served, deployment: str, parameters: dict[str, object]
) -> None:
    with pytest.raises(httpx.HTTPStatusError, match=r"409|422"):
        served.run(deployment, **parameters)


def test_a_run_through_the_server(served: server.Served) -> None:
    found = served.run("pipeline/pipeline")
    assert (found["state"]["name"], found["state"]["message"]) == ("Completed", "14 unchanged")
    assert served.api.tasks(found["id"]) == dict.fromkeys(ORDER, ("Cached", "unchanged"))
    report = served.api.artifacts(found["id"])["report"]
    assert (report["type"], report["data"]) == ("markdown", (served.repo / "data/report/report.md").read_text())


def test_a_target_that_is_none_fails_with_one_line(served: server.Served) -> None:
    found = served.run("pipeline/pipeline", targets=["stf"])
    assert found["state"]["message"] == "stf: no such stage in dvc.yaml, did you mean `sft`?"


def test_a_sweep_leaves_the_workspace_and_what_it_ran_is_restored(served: server.Served) -> None:
    parameters = {
        "values": {"report.examples": [3, 10]},
        "targets": ["report"],
        "metrics": ["data/evaluate/dpo.json:kl.to_base", "data/dpo/metrics.json:steps"],
    }
    found = served.run("sweep/sweep", parameters=parameters, seconds=200)
    assert found["state"]["message"] == "2 points, highest kl.to_base first", served.api.logs(found["id"])
    rows = json.loads(served.api.artifacts(found["id"])["sweep"]["data"])
    assert sorted(row["report.examples"] for row in rows) == [3, 10]
    assert [set(row) for row in rows] == [{"report.examples", "kl.to_base", "steps"}] * 2
    assert run("git status --porcelain", served.repo).stdout == ""
    assert run("git worktree list", served.repo).stdout.count("\n") == 1
    points = served.api.post(
        "flow_runs/filter", {"flow_runs": {"name": {"any_": ["report.examples=3", "report.examples=10"]}}}
    )
    messages = {point["name"]: point["state"]["message"] for point in points}
    assert messages == {"report.examples=3": "1 ran, 13 unchanged", "report.examples=10": "14 unchanged"}
    text = (served.repo / "params.yaml").read_text()
    assert "examples: 10" in text
    (served.repo / "params.yaml").write_text(text.replace("examples: 10", "examples: 3"))
    try:
        assert "Stage 'report' is cached - skipping run" in run("dvc repro", served.repo).stdout
    finally:
        (served.repo / "params.yaml").write_text(text)
        run("dvc repro && git status --porcelain", served.repo)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"values": {"dpo.bta": [1.0]}}, "dpo.bta: unknown key, did you mean `beta`?"),
        ({"values": {"dpo.beta": [-1.0]}}, "dpo.beta: expected a number > 0"),
        ({"values": {"dpo.beta": [0.1] * 20}}, "20 points are more than max_points, 16"),
        (
            {"metrics": ["data/dop.json:steps"]},
            "metrics: data/dop.json is no metrics file of these targets; there are ",
        ),
        ({"targets": ["dop"]}, "dop: no such stage in dvc.yaml, did you mean `dpo`?"),
    ],
)
def test_a_sweep_checks_every_point_first(served: server.Served, parameters: dict[str, Any], said: str) -> None:
    found = served.run("sweep/sweep", parameters=parameters)
    assert found["state"]["type"] == "FAILED"
    assert said in found["state"]["message"]


def test_lost_runs_are_ended_by_an_automation(served: server.Served) -> None:
    (found,) = served.api.post("automations/filter", {})
    assert found["enabled"]
    assert found["trigger"]["posture"] == "Proactive"
    assert found["actions"][0]["state"] == "CRASHED"


def test_a_server_that_was_away_is_served_again(
    served: server.Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prefect's runner gives up after some minutes without it; also what fails while the server is well is not tried at once."""
    api, happened, answers = f"{served.api.url}/api", list[object](), [False, True]

    def runner(*chosen: Any, limit: int) -> None:
        happened.append(([deployment.name for deployment in chosen], limit))
        if len(happened) == 1:
            raise httpx.ConnectError("All connection attempts failed")

    def healthy() -> bool:
        happened.append(answers.pop(0))
        return happened[-1] is True

    monkeypatch.setattr(serve, "serve", runner)
    monkeypatch.setattr(serve, "_answers", healthy)
    monkeypatch.setattr(serve, "time", SimpleNamespace(sleep=happened.append))
    with temporary_settings({PREFECT_API_URL: api}):
        assert serve.main(["--limit", "3"]) == 0
    began = (["pipeline", "sweep", "retrain"], 3)
    assert happened == [began, 10, False, 10, True, began]
    assert capsys.readouterr().err == f"serve: All connection attempts failed; waiting for {api}\n"


@pytest.mark.parametrize(
    ("arguments", "env", "said"),
    [
        (["--timezone", "Mars/Olympus"], {}, "No time zone found with key Mars/Olympus"),
        (["--cron", "every night"], {}, "cron"),
        (["--timezone", "Europe"], {}, "Is a directory"),
        (["--limit", "0"], {}, "--limit: expected 1 or more, found 0"),
        (["--start-server", "--port", "99999"], {}, "--port: expected 1 to 65535, found 99999"),
        ([], {"PREFECT_API_URL": ""}, "set PREFECT_API_URL"),
        ([], {"PREFECT_API_URL": "http://127.0.0.1:9/api"}, "can't be used"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, arguments: list[str], env: dict[str, str], said: str) -> None:
    home = {"PREFECT_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = run([sys.executable, "-m", "flows.serve", *arguments], tmp_path, check=False, **(home | env))
    assert done.returncode in (1, 2)
    assert said in done.stdout.splitlines()[-1]
    assert "Traceback" not in done.stdout


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> tuple[server.Server, Path, dict[str, str]]:
    """A server with both pools and what prefect.yaml deploys to them."""
    api = server.start()
    repo = small.make(tmp_path_factory.mktemp("pools") / "repo")
    shutil.copy(ROOT / "prefect.yaml", repo)
    run("git init -q --bare -b main ../origin && git remote add origin ../origin && git push -qu origin main", repo)
    env = {"PYTHONPATH": str(ROOT), "PWD": str(repo), "REFORGE_IMAGE": "registry.example/reforge:1", **api.env}
    run([*PREFECT, "work-pool", "create", "--type", "process", "gpu-process"], repo, **env)
    template = run([*PREFECT, "work-pool", "get-default-base-job-template", "--type", "kubernetes"], repo, **env)
    (repo / "pool.json").write_text(template.stdout)
    code = (ROOT / "docs/schedule.md").read_text().split("<<'PY'\n")[1].split("    PY\n")[0]
    run([sys.executable, "-c", textwrap.dedent(code)], repo)
    create = ["work-pool", "create", "--type", "kubernetes", "--base-job-template", "pool.json", "gpu-kubernetes"]
    run([*PREFECT, *create], repo, **env)
    run([*PREFECT, "--no-prompt", "deploy", "--all"], repo, **env)
    return api, repo, env


class TestPools:
    def test_a_worker_of_the_process_pool_runs_it(self, deployed: tuple[server.Server, Path, dict[str, str]]) -> None:
        api, repo, env = deployed
        name = "pipeline/pipeline-process"
        change = "echo pushed > in && git -c user.name=t -c user.email=t@example.org commit -qam theirs && git push -q"
        run(f"git clone -q origin other && cd other && {change}", repo.parent)
        run([*PREFECT, "deployment", "run", name, "--param", "pull=false"], repo, **env)
        worker = small.start([*PREFECT, "worker", "start", "--pool", "gpu-process", "--run-once"], repo, **env)
        output = small.finish(worker)
        found = api.newest()
        assert (found["state"]["name"], found["state"]["message"]) == ("Completed", "5 ran"), output
        assert found["work_pool_name"] == "gpu-process"
        assert (repo / "one").read_text() == "pushed\n"  # what somebody else had pushed meanwhile
        assert api.get("deployments/name/retrain/retrain-process")["parameters"] == {"params": {"gpu": "gpu-process"}}
        assert api.get("v2/concurrency_limits/gpu-process")["limit"] == 1

    def test_kubernetes_as_far_as_without_a_cluster(self, deployed: tuple[server.Server, Path, dict[str, str]]) -> None:
        """The pool takes every variable that prefect.yaml sets, and its job template renders with them."""
        api, _, _ = deployed
        deployment = api.get("deployments/name/pipeline/pipeline-kubernetes")
        pool = api.get("work_pools/gpu-kubernetes")
        variables = pool["base_job_template"]["variables"]["properties"]
        assert set(deployment["job_variables"]) <= set(variables)
        assert deployment["job_variables"]["image"] == "registry.example/reforge:1"
        manifest = pool["base_job_template"]["job_configuration"]["job_manifest"]
        assert manifest["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 1}
        wanted = json.dumps(pool["base_job_template"]["job_configuration"]["job_manifest"])
        assert all("{{ " + name + " }}" in wanted for name in ("image", "image_pull_policy", "finished_job_ttl", "env"))
        assert deployment["pull_steps"] == [
            {"prefect.deployments.steps.set_working_directory": {"directory": "/reforge"}}
        ]


def test_prefect_yaml_names_flows_that_are_there() -> None:
    for deployment in YAML(typ="safe").load(ROOT / "prefect.yaml")["deployments"]:
        module, _, name = deployment["entrypoint"].rpartition(".")
        assert f"def {name}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()


def test_a_cancel_on_the_page_ends_a_served_run(tmp_path: Path) -> None:
    """Through the runner, which terminates the flow's process."""
    api = server.start()
    repo = fork(small.make(tmp_path / "one"), tmp_path / "repo")
    process = small.start([sys.executable, "-m", "flows.serve"], repo, **api.env, SLOW_SECONDS="60", GRANDCHILD="1")
    try:
        small.until(lambda: {d["name"] for d in api.post("deployments/filter", {})} >= {"pipeline"}, what="not served")
        served = server.Served(api, repo, process)
        name = api.get("deployments/name/pipeline/pipeline")["id"]
        found = api.post(
            f"deployments/{name}/create_flow_run", {"parameters": {"gpu": "cancelled"}, "state": {"type": "SCHEDULED"}}
        )
        pids = small.pids(repo)
        api.post(f"flow_runs/{found['id']}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
        assert served.ended(found["id"])["state"]["name"] == "Cancelled"
        small.until(lambda: not any(small.alive(pid) for pid in pids), 20, "the training was orphaned")
    finally:
        serve._end(process)  # Prefect's runner has once paused its deployments and not ended at the first signal
        small.finish(process, 30)


@server.needs_ss
def test_the_server_of_make_ui_asks_for_a_password_and_ends_with_it(tmp_path: Path) -> None:
    port = server.free_port()
    repo = small.make(tmp_path / "repo")
    command = [sys.executable, "-m", "flows.serve", "--start-server", "--port", str(port)]
    secret = {"PREFECT_SERVER_API_AUTH_STRING": "admin:long", "PREFECT_API_AUTH_STRING": "admin:long"}
    process = small.start(command, repo, PREFECT_HOME=str(tmp_path / "home"), PREFECT_API_URL="", **secret)
    try:
        server.wait_healthy(f"http://127.0.0.1:{port}", process)
        env = {"PYTHONPATH": str(ROOT), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
        flow = [sys.executable, "-m", "flows.pipeline", "first"]
        for password in ("", "admin:wrong"):
            refused = run(flow, repo, check=False, **env, PREFECT_API_AUTH_STRING=password)
            assert refused.returncode == 1
            assert "401 Unauthorized" in refused.stdout.splitlines()[-1]
            assert "Traceback" not in refused.stdout
        assert "1 ran" in run(flow, repo, **env, PREFECT_API_AUTH_STRING="admin:long").stdout
        taken = run(command, repo, check=False, PREFECT_HOME=str(tmp_path / "home"), PYTHONPATH=str(ROOT))
        assert f"port {port} is taken" in taken.stdout.splitlines()[-1]
        process.terminate()
        assert process.wait(60) in (130, 143)
        assert (
            subprocess.run(["ss", "-ltn", f"sport = :{port}"], capture_output=True, text=True).stdout.count("\n") == 1
        )
    finally:
        small.finish(process, 30)


def test_a_closed_terminal_ends_the_server_of_make_ui(tmp_path: Path) -> None:
    """It has a session of its own, and would go on, with the port and the database."""
    port = server.free_port()
    repo = small.make(tmp_path / "repo")
    command = [sys.executable, "-m", "flows.serve", "--start-server", "--port", str(port)]
    kept = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under `nohup` children ignore it too
    process = small.start(command, repo, PREFECT_HOME=str(tmp_path / "home"), PREFECT_API_URL="")
    signal.signal(signal.SIGHUP, kept)
    try:
        server.wait_healthy(f"http://127.0.0.1:{port}", process)
        os.killpg(process.pid, signal.SIGHUP)
        assert process.wait(150) in (130, 143)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}/api/health")
    finally:
        for other in psutil.process_iter():  # if it fails
            with contextlib.suppress(psutil.Error):
                if other.environ().get("PREFECT_HOME") == str(tmp_path / "home"):
                    other.kill()
        small.finish(process, 30)


@pytest.mark.parametrize(("ignored", "code"), [(0, -signal.SIGTERM), (1, 3), (9, -signal.SIGKILL)])
def test_who_does_not_hear_the_first_signal_is_ended_all_the_same(ignored: int, code: int) -> None:
    deaf = (
        "import signal, sys, time; left = [{}]\n"
        "def heard(*_):\n    left[0] -= 1\n    if left[0] < 0: sys.exit(3)\n"
        "if left[0]: signal.signal(signal.SIGTERM, heard)\n"
        "print('ready', flush=True)\nwhile True: time.sleep(0.05)"
    )
    with subprocess.Popen([sys.executable, "-c", deaf.format(ignored)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        serve._end(process, patience=1)
    assert process.returncode == code


class Gate(BaseHTTPRequestHandler):
    """A server behind a proxy that asks for a header."""

    def do_GET(self) -> None:
        self.send_response(200 if self.headers.get("X-Team") == "ours" else 403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_whether_the_server_answers_is_asked_with_prefects_settings() -> None:
    gate = ThreadingHTTPServer(("127.0.0.1", 0), Gate)
    threading.Thread(target=gate.serve_forever, daemon=True).start()
    url = {PREFECT_API_URL: f"http://127.0.0.1:{gate.server_port}/api"}
    try:
        with temporary_settings(url):
            assert not serve._answers()
        with temporary_settings({**url, PREFECT_CLIENT_CUSTOM_HEADERS: {"X-Team": "ours"}}):
            assert serve._answers()
    finally:
        gate.shutdown()
        gate.server_close()
    with temporary_settings({**url, PREFECT_CLIENT_MAX_RETRIES: 0}):
        assert not serve._answers()


def test_prefects_server_imports_with_the_locked_fastapi() -> None:
    """fastapi 0.151 took `min_items` out of Body(), with which prefect 3.8.8 neither serves nor runs embedded."""
    run([sys.executable, "-c", "import prefect.server.api.server"], ROOT)
