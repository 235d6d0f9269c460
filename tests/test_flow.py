"""The flow `pipeline` against a real server: what it runs, skips, shows, and how it ends."""

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.context import FlowRunContext
from prefect.futures import PrefectConcurrentFuture
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled, Cancelling, Completed, Failed, Running

from flows import pipeline, stages, sweep, worktrees
from flows.stages import Stopped
from tests import server, small
from tests.conftest import ORDER, ROOT, edit, fork, ran, run

FLOW = [sys.executable, "-m", "flows.pipeline"]


@pytest.fixture(scope="module")
def api() -> server.Server:
    return server.start()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, api: server.Server) -> Path:
    """A small repository which the flow ran from nothing, committed."""
    repo = small.make(tmp_path_factory.mktemp("flow") / "repo")
    flow(api, repo)
    run("git add -A && git -c user.name=t -c user.email=t@example.org commit -qm ran", repo)
    return repo


@pytest.fixture
def repo(done: Path, tmp_path: Path) -> Path:
    copy = fork(done, tmp_path / "repo")
    for name in ("log", "slow.times", "a.times", "b.times"):
        (copy / name).unlink(missing_ok=True)
    return copy


def flow(api: server.Server, repo: Path, *arguments: str, check: bool = True, **env: str) -> str:
    """Output of the flow on a command line."""
    return run([*FLOW, *arguments], repo, check=check, PYTHONPATH=str(ROOT), **(api.env | env)).stdout


def begin(api: server.Server, repo: Path, *arguments: str, **env: str) -> "subprocess.Popen[str]":
    return small.start([*FLOW, *arguments], repo, **(api.env | env))


class TestWhatRuns:
    def test_from_nothing_everything_ran_and_is_shown(self, api: server.Server, tmp_path: Path) -> None:
        repo = small.make(tmp_path / "repo")
        output = flow(api, repo, SLOW_SECONDS="6.5", MEET="00")
        assert output.splitlines()[-1] == "pipeline: 5 ran"
        found = api.newest()
        assert (found["state"]["name"], found["state"]["message"]) == ("Completed", "5 ran")
        assert api.tasks(found["id"]) == dict.fromkeys(
            ("first", "slow", "each@a", "each@b", "report"), ("Completed", "ran")
        )
        log = small.log(repo)
        assert sorted(log) == ["a", "b", "first", "report", "slow"]
        assert log.index("first") < log.index("slow") < log.index("report")
        assert small.overlap(small.times(repo / "a.times")[0], small.times(repo / "b.times")[0])
        assert run("dvc status -q", repo, check=False).returncode == 0
        artifacts = api.artifacts(found["id"])
        assert set(artifacts) == {"first-metrics", "slow-progress", "report"}
        assert artifacts["slow-progress"]["data"] == 100
        assert json.loads(artifacts["first-metrics"]["data"]) == [
            {"metric": "size", "value": "1.5", "HEAD": "", "change": ""}
        ]
        assert artifacts["report"]["data"] == "input\ninput\n"
        lines = api.logs(found["id"])
        assert "Running stage 'slow':" in lines
        assert any("%|" in line for line in lines)

    def test_again_all_is_cached(self, api: server.Server, repo: Path) -> None:
        assert flow(api, repo).splitlines()[-1] == "pipeline: 5 unchanged"
        assert set(api.tasks(api.newest()["id"]).values()) == {("Cached", "unchanged")}
        assert small.log(repo) == []
        assert run("git status --porcelain", repo).stdout == ""
        assert set(api.artifacts(api.newest()["id"])) == {"report"}

    @pytest.mark.parametrize(
        ("path", "before", "after", "expected"),
        [
            ("in", "input", "other", {"first", "slow", "each@a", "each@b", "report"}),
            ("slow.py", "import json", "import  json", {"slow"}),
        ],
    )
    def test_exactly_what_depends_on_a_change_runs_and_a_revert_restores(
        self, api: server.Server, repo: Path, path: str, before: str, after: str, expected: set[str]
    ) -> None:
        text, lock = (repo / path).read_text(), (repo / "dvc.lock").read_bytes()
        (repo / path).write_text(text.replace(before, after))
        flow(api, repo)
        tasks = api.tasks(api.newest()["id"])
        assert {name for name, (state, _) in tasks.items() if state == "Completed"} == expected
        assert {said for state, said in tasks.values() if state == "Cached"} <= {"unchanged"}
        assert sorted(small.log(repo)) == sorted(name.removeprefix("each@") for name in expected)
        (repo / path).write_text(text)
        flow(api, repo)
        tasks = api.tasks(api.newest()["id"])
        assert {name for name, (_, said) in tasks.items() if said == "restored from run cache"} == expected
        assert len(small.log(repo)) == len(expected)
        assert (repo / "dvc.lock").read_bytes() == lock

    def test_pull(self, api: server.Server, repo: Path, tmp_path: Path) -> None:
        run(f"dvc remote add -q -d store {tmp_path / 'store'} && dvc push -q", repo)
        run("rm -rf .dvc/cache one two a.out b.out report.md", repo)
        assert flow(api, repo, "--pull").splitlines()[-1] == "pipeline: 5 pulled from remote"
        assert small.log(repo) == []
        # a figure is in git alone: pulling what belongs to it does not bring it back
        run("rm one first.json", repo)
        flow(api, repo, "--pull")
        assert (repo / "first.json").is_file()
        assert small.log(repo) == ["first"]

    def test_only_a_target(self, api: server.Server, repo: Path) -> None:
        (repo / "in").write_text("other\n")
        assert flow(api, repo, "each@a").splitlines()[-1] == "pipeline: 2 ran"
        assert small.log(repo) == ["first", "a"]


class TestHowItEnds:
    def test_a_failure_is_one_line_and_is_not_tried_again(self, api: server.Server, repo: Path) -> None:
        (repo / "params.yaml").write_text("slow: 2\n")
        output = flow(api, repo, check=False, FAIL="slow: row 3: a check failed")
        assert output.splitlines()[-1] == "pipeline: slow: slow: row 3: a check failed; not run: report"
        assert "Traceback" not in output
        assert small.log(repo) == ["slow"]
        tasks = api.tasks(api.newest()["id"])
        assert tasks["slow"][0] == "Failed"
        assert tasks["report"][0] == "NotReady"
        assert tasks["each@a"] == ("Cached", "unchanged")

    def test_a_lost_network_is_tried_again(self, api: server.Server, repo: Path) -> None:
        (repo / "params.yaml").write_text("slow: 2\n")
        output = flow(api, repo, FAIL_ONCE="ConnectionError: nobody there")
        assert output.splitlines()[-1] == "pipeline: 1 ran, 4 unchanged"
        assert small.log(repo) == ["slow", "slow"]

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["slo"], "did you mean `slow`"),
            (["--timeout", "-1"], "expected seconds above 0"),
            (["--nonsense"], "unrecognized"),
        ],
    )
    def test_a_mistake_is_one_line(self, api: server.Server, repo: Path, arguments: list[str], said: str) -> None:
        done = run([*FLOW, *arguments], repo, check=False, PYTHONPATH=str(ROOT), **api.env)
        assert done.returncode != 0
        assert said in done.stdout.splitlines()[-1]
        assert "Traceback" not in done.stdout

    def test_no_repository(self, api: server.Server, tmp_path: Path) -> None:
        done = run(FLOW, tmp_path, check=False, PYTHONPATH=str(ROOT), **api.env)
        assert done.returncode == 1
        assert "no DVC repository here" in done.stdout.splitlines()[-1]
        assert "Traceback" not in done.stdout

    def test_nobody_at_the_servers_address(self, repo: Path) -> None:
        env = {"PYTHONPATH": str(ROOT), "PREFECT_API_URL": "http://127.0.0.1:9/api"}
        done = run(FLOW, repo, check=False, **env)
        assert done.returncode == 1
        assert "pipeline: Failed to reach API at http://127.0.0.1:9/api" in done.stdout.splitlines()[-1]
        assert "Traceback" not in done.stdout

    def test_a_timeout_ends_the_whole_group(self, api: server.Server, repo: Path) -> None:
        (repo / "params.yaml").write_text("slow: 2\n")
        process = begin(api, repo, "--timeout", "4", SLOW_SECONDS="60", GRANDCHILD="1")
        pids = small.pids(repo)
        output = small.finish(process)
        assert process.returncode == 1
        assert "slow: not done after 4 s" in output.splitlines()[-1]
        assert api.tasks(api.newest()["id"])["slow"][0] == "TimedOut"
        assert not any(small.alive(pid) for pid in pids)

    @pytest.mark.parametrize("how", ["TERM", "INT", "KILL", "cancel"])
    def test_nothing_survives_it_and_the_next_goes_on(self, api: server.Server, repo: Path, how: str) -> None:
        (repo / "params.yaml").write_text("slow: 2\n")
        # a slot of its own: that of a killed flow is free after `pipeline.LEASE`
        process = begin(api, repo, "--gpu", f"before-{how}", SLOW_SECONDS="30", GRANDCHILD="1")
        pids = small.pids(repo)
        small.until(lambda: (repo / "checkpoint").exists())
        if how == "cancel":
            body = {"state": {"type": "CANCELLING", "name": "Cancelling"}, "force": False}
            api.post(f"flow_runs/{api.newest()['id']}/set_state", body)
        else:
            process.send_signal(getattr(signal, f"SIG{how}"))
        output = small.finish(process)
        assert process.returncode != 0
        small.until(lambda: not any(small.alive(pid) for pid in pids), 20, "the training was orphaned")
        state = api.newest()["state"]["name"]
        assert state == {"KILL": "Running", "cancel": "Cancelled"}.get(how, "Crashed"), output
        output = flow(api, repo, "--gpu", f"after-{how}", SLOW_SECONDS="0.1")
        assert output.splitlines()[-1] == "pipeline: 1 ran, 4 unchanged"
        assert " 0/10" not in output  # it went on from its checkpoint

    def test_an_edited_input_fails_the_flow(self, api: server.Server, repo: Path) -> None:
        (repo / "params.yaml").write_text("slow: 2\n")
        lock = (repo / "dvc.lock").read_bytes()
        with small.held(repo):
            process = begin(api, repo)
            small.pids(repo)
            (repo / "params.yaml").write_text("slow: 3\n")
        output = small.finish(process)
        assert "params.yaml was edited while it ran; nothing was recorded" in output.splitlines()[-1]
        assert (repo / "dvc.lock").read_bytes() == lock

    def test_a_lock_file_that_a_kill_cut_off_is_put_right(self, api: server.Server, repo: Path) -> None:
        lock = (repo / "dvc.lock").read_text()
        (repo / "dvc.lock").write_text(lock[: lock.index("outs:") + 3])
        assert "is invalid" in run("dvc repro", repo, check=False).stdout  # dvc 3.67.1: if it mends that itself one day
        assert flow(api, repo).splitlines()[-1].startswith("pipeline: ")
        assert (repo / "dvc.lock").read_text() == lock


class TestTurns:
    def test_two_flows_of_one_workspace_run_each_stage_once(self, api: server.Server, repo: Path) -> None:
        (repo / "in").write_text("other\n")
        both = [begin(api, repo, SLOW_SECONDS="2") for _ in range(2)]
        outputs = [small.finish(process) for process in both]
        assert sorted(output.splitlines()[-1] for output in outputs) == ["pipeline: 5 ran", "pipeline: 5 unchanged"]
        assert sorted(small.log(repo)) == ["a", "b", "first", "report", "slow"]
        assert any("another flow runs in this workspace" in output for output in outputs)

    def test_a_cancel_is_seen_while_it_waits(self, api: server.Server, repo: Path) -> None:
        (repo / "in").write_text("other\n")
        running = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}
        before = {found["id"] for found in api.post("flow_runs/filter", running)}  # of killed ones
        with stages.turn(repo, print, lambda: False):
            process = begin(api, repo)
            small.until(lambda: {each["id"] for each in api.post("flow_runs/filter", running)} - before)
            found = api.newest()["id"]
            api.post(f"flow_runs/{found}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
            output = small.finish(process)
        assert output.splitlines()[-1] == "pipeline: cancelled while it waited; nothing was begun", output
        assert api.get(f"flow_runs/{found}")["state"]["name"] == "Cancelled"
        assert small.log(repo) == []

    @pytest.mark.parametrize("slots", [1, 2])
    def test_two_workspaces_share_the_slots(self, api: server.Server, repo: Path, tmp_path: Path, slots: int) -> None:
        name = f"gpu-{slots}"
        if slots == 2:  # as set on the page; where it is missing, the flow makes it with one slot
            api.post("v2/concurrency_limits/", {"name": name, "limit": 2})
        other = fork(repo, tmp_path / "other")
        for folder in (repo, other):
            (folder / "params.yaml").write_text("slow: 2\n")
        with small.held(*((repo, other) if slots == 2 else ())):
            both = [begin(api, folder, "--gpu", name, SLOW_SECONDS="5") for folder in (repo, other)]
            if slots == 2:
                for folder in (repo, other):
                    small.pids(folder)
        outputs = [small.finish(process) for process in both]
        assert all(output.splitlines()[-1] == "pipeline: 1 ran, 4 unchanged" for output in outputs), outputs
        (one,), (two,) = small.times(repo / "slow.times"), small.times(other / "slow.times")
        assert small.overlap(one, two) is (slots == 2)

    def test_beside_a_dvc_repro(self, api: server.Server, repo: Path) -> None:
        (repo / "in").write_text("other\n")
        repro = small.start(["dvc", "repro"], repo, SLOW_SECONDS="3")
        small.pids(repo)
        output = flow(api, repo)
        small.finish(repro)
        assert output.splitlines()[-1].startswith("pipeline: ")
        assert sorted(small.log(repo)) == ["a", "b", "first", "report", "slow"]


@pytest.fixture(scope="module")
def real(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fork(pipeline, tmp_path_factory.mktemp("real") / "repo")


class TestRealPipeline:
    @server.needs_ss
    def test_with_nothing_started_before(self, real: Path, tmp_path: Path) -> None:
        """As `make flow`: Prefect's own server for as long as it takes; nothing of it stays."""
        out = run(FLOW, real, PREFECT_HOME=str(tmp_path / "home"), PREFECT_API_URL="").stdout
        assert out.splitlines()[-1].startswith("pipeline: 14 unchanged") or "pipeline: 14 unchanged" in out
        port = re.search(r"127\.0\.0\.1:(\d+)", out)
        assert port
        small.until(lambda: run(f"ss -ltn | grep -c :{port[1]}", real, check=False).stdout.strip() in ("0", ""))

    def test_beta_runs_four_stages_to_the_same_lock_as_dvc_repro(
        self, api: server.Server, real: Path, tmp_path: Path
    ) -> None:
        other = fork(real, tmp_path / "other")
        lock, text = (real / "dvc.lock").read_bytes(), (real / "params.yaml").read_text()
        for folder in (real, other):
            edit(folder, "dpo", "beta", 0.21)
        flow(api, real)
        found = api.newest()
        tasks = api.tasks(found["id"])
        assert set(tasks) == set(ORDER)
        expected = {"dpo", "merge", "evaluate@dpo", "report"}
        assert {name for name, (state, _) in tasks.items() if state == "Completed"} == expected
        assert {said for name, (_, said) in tasks.items() if name not in expected} == {"unchanged"}
        assert set(ran(run("dvc repro", other).stdout)) == expected
        assert (real / "dvc.lock").read_bytes() == (other / "dvc.lock").read_bytes() != lock
        artifacts = api.artifacts(found["id"])
        assert {"dpo-metrics", "dpo-progress", "merge-metrics", "evaluate-dpo-metrics", "report"} <= set(artifacts)
        assert artifacts["report"]["data"] == (real / "data/report/report.md").read_text()
        assert {"steps", "loss_last"} <= {row["metric"] for row in json.loads(artifacts["dpo-metrics"]["data"])}
        (real / "params.yaml").write_text(text)
        started = time.monotonic()
        assert "10 unchanged" in flow(api, real).splitlines()[-1]
        print(f"restored in {time.monotonic() - started:.1f} s")
        assert (real / "dvc.lock").read_bytes() == lock

    def test_code_data_and_template_run_their_own_stages_and_a_revert_restores(
        self, api: server.Server, real: Path
    ) -> None:
        """Edits that change no output: DVC runs the stages that read them, and stops where the bytes are the same."""
        edits = {
            "tasks/evaluate.py": {"evaluate@base", "evaluate@sft", "evaluate@dpo"},
            "data/raw/advice.jsonl": {"ingest"},
            "tasks/template.py": {"template"},
        }
        kept = {path: (real / path).read_bytes() for path in (*edits, "dvc.lock")}
        for path in edits:
            (real / path).write_bytes(kept[path] + (b"\n" if path.endswith(".jsonl") else b"# an edit\n"))
        flow(api, real)
        tasks = api.tasks(api.newest()["id"])
        expected = set.union(*edits.values())
        assert {name for name, (state, _) in tasks.items() if state == "Completed"} == expected
        assert {said for name, (_, said) in tasks.items() if name not in expected} == {"unchanged"}
        for path in edits:
            (real / path).write_bytes(kept[path])
        flow(api, real)
        tasks = api.tasks(api.newest()["id"])
        assert {name for name, (_, said) in tasks.items() if said == "restored from run cache"} == expected
        assert (real / "dvc.lock").read_bytes() == kept["dvc.lock"]


@pytest.mark.filterwarnings("ignore:Artifact creation outside:FutureWarning")
def test_a_server_that_is_away_ends_no_training() -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        progress = pipeline.Progress("sft")
        progress.see(" 35%|###5      | 42/120 [00:31<00:55,  1.40it/s]")
        progress.done()
    future: PrefectConcurrentFuture[Any] = PrefectConcurrentFuture(uuid4(), Future())
    threading.Timer(2 * pipeline.POLL + 1, future.wrapped_future.set_result, [Completed()]).start()
    stop = threading.Event()
    flow_run: Any = SimpleNamespace(id=uuid4())
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}),
        FlowRunContext.model_construct(flow_run=flow_run),
    ):
        assert pipeline._wait({"sft": future}, stop)["sft"].is_completed()
    assert not stop.is_set()


def test_a_slot_is_waited_for_and_given_back_without_a_server(api: server.Server) -> None:
    stop, lines = threading.Event(), list[str]()
    logger = SimpleNamespace(
        info=lambda *said: lines.append(said[0] % said[1:]), warning=lambda *said: lines.append(said[0] % said[1:])
    )
    away = {PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}
    with temporary_settings(away):
        threading.Timer(1, stop.set).start()
        with pytest.raises(Stopped), pipeline._slot("away", stop, logger):
            pass
    assert lines[0].startswith("waiting for Prefect's server: ")
    with temporary_settings({PREFECT_API_URL: f"{api.url}/api"}):
        slot = pipeline._slot("back", threading.Event(), logger)
        slot.__enter__()
        with temporary_settings(away):
            slot.__exit__(None, None, None)  # a training that succeeded has not failed by this
    assert lines[-1].startswith("the slot of back could not be given back: ")
    assert api.get("v2/concurrency_limits/back")["active_slots"] == 1


def test_a_server_that_goes_away_in_the_moment_of_the_slot_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect then raises an exception of another kind, which failed the stage."""
    monkeypatch.setattr(SyncPrefectClient, "read_global_concurrency_limit_by_name", lambda *_: SimpleNamespace(limit=1))
    stop, lines = threading.Event(), list[str]()
    logger = SimpleNamespace(info=lambda *said: lines.append(said[0] % said[1:]))
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}):
        threading.Timer(2, stop.set).start()
        with pytest.raises(Stopped), pipeline._slot("gone", stop, logger):
            pass
    assert lines[0].startswith("waiting for Prefect's server: Unable to acquire concurrency slots on ['gone']: ")


@pytest.mark.parametrize("slots", [1, 2])
def test_a_run_that_lost_its_slot_keeps_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slots: int) -> None:
    """A server that was away for longer than a lease lasts gives the slot to the next flow."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(pipeline, "concurrency", lambda *_, **__: contextlib.nullcontext())
    limit = SimpleNamespace(limit=slots)
    monkeypatch.setattr(SyncPrefectClient, "read_global_concurrency_limit_by_name", lambda *_: limit)
    stop, lines = threading.Event(), list[str]()
    logger = SimpleNamespace(info=lambda *said: lines.append(said[0] % said[1:]))
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}):
        with contextlib.ExitStack() as held:
            for _ in range(slots):
                held.enter_context(pipeline._slot("gpu", stop, logger))
            with pipeline._slot("another", stop, logger):
                assert lines == []
            threading.Timer(0.5, stop.set).start()
            with pytest.raises(Stopped), pipeline._slot("gpu", stop, logger):
                pass
        assert lines == ["waiting for a run on this machine that lost its slot of gpu while the server was away"]
        with pipeline._slot("gpu", threading.Event(), logger):
            assert len(lines) == 1


def test_a_machine_without_a_place_for_seats_trains_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    lines = list[str]()
    seat = pipeline._seat("gpu", 1, SimpleNamespace(warning=lambda *said: lines.append(said[0] % said[1:])))
    assert seat is not None
    assert lines[0].startswith("only the server's slot of gpu is held, none of this machine: ")


def test_a_run_is_cancelled_with_the_one_that_it_is_a_part_of() -> None:
    outer, inner = uuid4(), uuid4()
    states = {outer: Running(), inner: Running()}

    def read_flow_run(run: Any) -> Any:
        return SimpleNamespace(state=states[run], parent_task_run_id=uuid4() if run == inner else None)

    client: Any = SimpleNamespace(
        read_flow_run=read_flow_run, read_task_run=lambda _: SimpleNamespace(flow_run_id=outer)
    )
    assert not pipeline._is_cancelled(client, inner)
    states[outer] = Cancelling()
    assert pipeline._is_cancelled(client, inner)
    states.update({outer: Running(), inner: Cancelled()})
    assert pipeline._is_cancelled(client, inner)
    assert not pipeline._is_cancelled(client, outer)
    assert not pipeline.cancelled()  # outside of a flow


def test_the_slot_of_a_killed_flow_and_its_server_is_free_again(done: Path, tmp_path: Path) -> None:
    """With the server that Prefect starts where there is none, which does not look for leases that ended."""
    repo, home = fork(done, tmp_path / "repo"), tmp_path / "home"
    (repo / "params.yaml").write_text("slow: 2\n")
    env = {"PREFECT_HOME": str(home), "PREFECT_API_URL": ""}
    process = small.start(FLOW, repo, SLOW_SECONDS="60", **env)
    pids = small.pids(repo)
    process.kill()
    for other in psutil.process_iter():  # the server outlives it
        with contextlib.suppress(psutil.Error):
            if other.environ().get("PREFECT_HOME") == str(home):
                other.kill()
    small.finish(process)
    small.until(lambda: not any(small.alive(pid) for pid in pids), 20, "the training was orphaned")
    (lease,) = (home / "concurrency_leases").glob("*-*.json")
    past = "2020-01-01T00:00:00+00:00"  # instead of a minute
    lease.write_text(json.dumps(json.loads(lease.read_text()) | {"expiration": past}))
    (home / "concurrency_leases/expirations.json").write_text(json.dumps({lease.stem: past}))
    output = run(FLOW, repo, PYTHONPATH=str(ROOT), SLOW_SECONDS="0.1", **env).stdout
    assert "pipeline: 1 ran, 4 unchanged" in output.splitlines()
    assert "waiting for a slot of the concurrency limit gpu" in output


SCORE = """\
import json, yaml
beta = yaml.safe_load(open("params.yaml"))["dpo"]["beta"]
found = {"beta": beta} if beta == 0.5 else {"beta": beta, "figure": round(1 - beta, 1)}
open("score.json", "w").write(json.dumps(found))
"""


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of one stage, whose figure falls as β rises; of β 0.5 there is none."""
    repo = tmp_path_factory.mktemp("sweep") / "repo"
    repo.mkdir()
    run("git init -q -b main && dvc init -q && dvc config core.analytics false", repo)
    shutil.copy(ROOT / "params.yaml", repo)
    (repo / "score.py").write_text(SCORE)
    add = "dvc stage add -q -n score -p dpo.beta -d score.py -M score.json 'python score.py'"
    run(f"{add} && git add -A && git -c user.name=t -c user.email=t@example.org commit -qm one", repo)
    return repo


@pytest.mark.parametrize(
    ("values", "best", "order"),
    [
        ("0.5,0.3,0.1", "highest", [("0.1", "0.9"), ("0.3", "0.7"), ("0.5", "None")]),
        ("0.1,0.3", "lowest", [("0.3", "0.7"), ("0.1", "0.9")]),
    ],
)
def test_a_sweep_puts_the_best_point_first(
    api: server.Server, scored: Path, values: str, best: str, order: list[tuple[str, str]]
) -> None:
    """And one that has no such figure last."""
    command = [sys.executable, "-m", "flows.sweep", f"dpo.beta={values}", "--target", "score", "--best", best]
    command += ["--metric", "score.json:figure", "--metric", "score.json:beta"]
    output = run(command, scored, PYTHONPATH=str(ROOT), **api.env).stdout
    assert re.findall(r"dpo\.beta=(\S+)  figure=(\S+)  beta=\1$", output, re.MULTILINE) == order, output
    table = json.loads(api.artifacts(api.newest("sweep")["id"])["sweep"]["data"])
    assert [(str(row["dpo.beta"]), str(row["figure"])) for row in table] == order


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("dpo.loss_type=[sigmoid,sft]", "expected plain values between commas"),
        ("dpo.beta", "expected SECTION.KEY=VALUE"),
    ],
)
def test_what_can_be_no_value_of_a_sweep_is_one_line(pair: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweep.main([pair])
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_two_figures_of_one_key_have_columns_of_their_own() -> None:
    assert sweep._columns(["a.json:x", "b.json:y"]) == ["x", "y"]
    assert sweep._columns(["a.json:x", "b.json:x", "b.json:y"]) == ["a.json:x", "b.json:x", "y"]


class TestPointsOfASweep:
    """Without a server: what becomes of the sweep when a point, or the sweep, is cancelled."""

    @pytest.fixture(autouse=True)
    def alone(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.ended: list[Any] = []
        self.cancel_after = 9
        ends = iter([Completed(), Cancelled(message="cancelled"), Failed(message="a fault")])

        def point(**_: Any) -> Any:
            self.ended.append(next(ends))
            return self.ended[-1]

        def said(line: str, *values: object) -> None:
            print(line % values)

        monkeypatch.chdir(tmp_path)
        (tmp_path / ".dvc/tmp").mkdir(parents=True)
        monkeypatch.setattr(sweep, "get_run_logger", lambda: SimpleNamespace(info=said, error=said, warning=said))
        monkeypatch.setattr(sweep, "expand", lambda *_: [{"dpo.beta": beta} for beta in (0.1, 0.2, 0.3)])
        monkeypatch.setattr(worktrees, "edited", lambda *_: "")
        monkeypatch.setattr(worktrees, "worktree", lambda *_: contextlib.nullcontext(tmp_path))
        monkeypatch.setattr(sweep, "pipeline", SimpleNamespace(with_options=lambda **_: point))
        monkeypatch.setattr(sweep, "figures", lambda *_: {"figure": 1.0})
        monkeypatch.setattr(sweep, "cancelled", lambda: len(self.ended) >= self.cancel_after)
        monkeypatch.setattr(sweep, "create_table_artifact", lambda rows, **_: None)

    def test_a_cancelled_point_has_not_failed(self, capsys: pytest.CaptureFixture[str]) -> None:
        state = sweep.sweep.fn(sweep.SweepParameters())
        assert state.type.value == "CANCELLED"
        assert state.message == (
            "cancelled after 2 of 3 points; what was begun goes on next time; 1 of 3 points failed: dpo.beta=0.3"
        )
        assert "dpo.beta=0.1  figure=1.0\n" in capsys.readouterr().out  # what was found is seen all the same

    def test_a_cancelled_sweep_begins_no_other_point(self) -> None:
        self.cancel_after = 1
        state = sweep.sweep.fn(sweep.SweepParameters())
        assert len(self.ended) == 1
        assert (state.type.value, state.message) == (
            "CANCELLED", "cancelled after 1 of 3 points; what was begun goes on next time",
        )  # fmt: skip

    def test_a_sweep_that_waits_for_another_sees_its_cancel(self, tmp_path: Path) -> None:
        self.cancel_after = 0
        with stages.turn(tmp_path, print, lambda: False, "sweep"):
            state = sweep.sweep.fn(sweep.SweepParameters())
        assert self.ended == []
        assert (state.type.value, state.message) == (
            "CANCELLED", "cancelled after 0 of 3 points; what was begun goes on next time",
        )  # fmt: skip

    def test_a_server_that_is_away_at_the_end_costs_no_table(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def away(*_: Any, **__: Any) -> None:
            raise httpx.ConnectError("nobody there")

        monkeypatch.setattr(sweep, "create_table_artifact", away)
        monkeypatch.setattr(sweep, "expand", lambda *_: [{"dpo.beta": 0.1}])
        state = sweep.sweep.fn(sweep.SweepParameters(metrics=["a.json:figure"]))
        assert state.is_completed()
        assert state.data == [{"dpo.beta": 0.1, "figure": 1.0}]


@pytest.mark.parametrize("whose", ["point", "sweep"])
def test_a_cancel_on_the_page_ends_what_a_sweep_runs(
    api: server.Server, scored: Path, tmp_path: Path, whose: str
) -> None:
    """Started by hand: no runner watches over it."""
    repo = fork(scored, tmp_path / "repo")
    (repo / "score.py").write_text("import time; open('../began', 'a').write('x'); time.sleep(60)\n" + SCORE)
    run("git -c user.name=t -c user.email=t@example.org commit -qam slow", repo)
    command = [
        sys.executable,
        "-m",
        "flows.sweep",
        "dpo.beta=0.1,0.3",
        "--target",
        "score",
        "--metric",
        "score.json:beta",
    ]
    process = small.start(command, repo, **api.env)
    began = repo / ".dvc/tmp/sweep/began"
    small.until(began.exists, what="no point began")
    flow_run = api.newest("sweep" if whose == "sweep" else "pipeline")["id"]
    api.post(f"flow_runs/{flow_run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    if whose == "point":  # the next one begins
        small.until(lambda: began.read_text() == "xx", what="the next point did not begin")
        api.post(
            f"flow_runs/{api.newest('sweep')['id']}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}}
        )
    output = small.finish(process)
    assert output.splitlines()[-1] == "sweep: cancelled after 0 of 2 points; what was begun goes on next time", output
    assert api.newest("sweep")["state"]["name"] == "Cancelled"
    assert began.read_text() == ("xx" if whose == "point" else "x")
