"""Retraining on a repository whose model is one number: promoted, rejected, interrupted, overtaken."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from prefect.context import FlowRunContext
from prefect.states import Completed

from flows import gate, retrain, stages
from flows.stages import Stopped
from tasks.params import UserError
from tests import server, small
from tests.conftest import ROOT, fork, run

RETRAIN = [sys.executable, "-m", "flows.retrain"]
GRAPH = """\
stages:
  train:
    cmd: python train.py
    deps: [data/raw, train.py]
    outs: [data/model]
  evaluate:
    foreach: [base, dpo]
    do:
      cmd: python scores.py ${item}
      deps: [data/model, scores.py]
      outs: ["data/evaluate/${item}.answers.jsonl"]
      metrics: ["data/evaluate/${item}.json": {cache: false}]
artifacts:
  assistant:
    path: data/model
    type: model
"""
# the model is one number, its skill: the last line of all the data
TRAIN = """\
import os, time
from pathlib import Path
Path("../training").touch()
time.sleep(float(os.environ.get("TRAIN_SECONDS", "0")))
lines = [line for path in sorted(Path("data/raw").glob("*.txt")) for line in path.read_text().split()]
Path("data/model").mkdir(parents=True, exist_ok=True)
Path("data/model/skill").write_text(lines[-1])
"""
# whether an item is answered depends on the item and the skill: a better model gets the same ones right, and more
SCORES = """\
import json, random, sys
from pathlib import Path
skill = 0.4 if sys.argv[1] == "base" else float(Path("data/model/skill").read_text())
rows = []
for part, task, measure in (("trained", "definition", "correct"), ("invented", "invented", "declined"), ("general", "choice", "correct")):
    for number in range(80):
        right = random.Random(f"{part} {number}").random() < (0.6 if part == "general" else skill)
        rows.append({"id": f"{part}-{number}", "set": part, "task": task, measure: float(right)})
folder = Path("data/evaluate")
folder.mkdir(parents=True, exist_ok=True)
(folder / f"{sys.argv[1]}.answers.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(folder / f"{sys.argv[1]}.json").write_text(json.dumps({"correct": sum(r.get("correct", 0) for r in rows)}) + "\\n")
"""
PARAMS = """\
gate:
  limits:
    trained.definition.correct: {margin: 0.05, floor: 0.5}
    invented.invented.declined: {margin: 0.05}
"""
PERSON = "git config user.name 'A Person' && git config user.email person@example.org"


@dataclass(frozen=True)
class World:
    """A repository, what it is shared through, and the server that its flows talk to."""

    folder: Path
    api: server.Server

    @property
    def repo(self) -> Path:
        return self.folder / "repo"

    def git(self, *words: str, where: str = "repo") -> str:
        return run(["git", *words], self.folder / where).stdout.rstrip()

    def start(self, *arguments: str, **env: str) -> "subprocess.Popen[str]":
        return small.start([*RETRAIN, *arguments], self.repo, **(self.api.env | env))

    def retrain(self, *arguments: str, code: int = 0, **env: str) -> str:
        """The flow's last words."""
        process = self.start(*arguments, **env)
        output = small.finish(process)
        assert process.returncode == code, output
        assert "Traceback" not in output
        return next(line for line in output.splitlines() if line.startswith("retrain: ")).removeprefix("retrain: ")

    def data(self, name: str, skill: str) -> Path:
        """A file that came an hour ago."""
        path = self.repo / "data/raw" / name
        path.write_text(f"{skill}\n")
        os.utime(path, (time.time() - 3600,) * 2)
        return path

    def refs(self) -> str:
        """All that a promotion moves, here and there."""
        return "\n".join(
            [self.git("for-each-ref", where="remote.git"), self.git("for-each-ref"), self.git("rev-parse", "HEAD")]
        )

    def states(self) -> dict[str, tuple[str, str]]:
        """Stage → state of the last pipeline."""
        return self.api.tasks(self.api.newest()["id"])

    def clean(self) -> None:
        """Nothing is left of a run in the repository."""
        assert not (self.repo / ".dvc/tmp/retrain/tree").exists()
        assert len(self.git("worktree", "list").splitlines()) == 1
        assert self.git("for-each-ref", "refs/reforge") == ""


@pytest.fixture(scope="module")
def api() -> server.Server:
    return server.start()


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one commit, nothing run, and two empty remotes beside it."""
    folder = tmp_path_factory.mktemp("retrain") / "world"
    (folder / "repo/data/raw").mkdir(parents=True)
    repo = folder / "repo"
    run(f"git init -q -b main && {PERSON} && dvc init -q && dvc config core.analytics false", repo)
    (repo / "dvc.yaml").write_text(GRAPH)
    (repo / "params.yaml").write_text(PARAMS)
    (repo / "train.py").write_text(TRAIN)
    (repo / "scores.py").write_text(SCORES)
    (repo / "data/raw/a.txt").write_text("0.7\n")
    run("git add -A && git commit -qm one", repo)
    run("git init -q --bare -b main remote.git && mkdir store", folder)
    run("git remote add origin ../remote.git && git push -q origin main", repo)
    run("dvc remote add -q --local -d store ../store", repo)  # relative, as a folder of the team's may be
    return folder


@pytest.fixture(scope="module")
def promoted(begun: Path, api: server.Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after its first run."""
    world = World(fork(begun, tmp_path_factory.mktemp("retrain") / "promoted"), api)
    said = world.retrain()
    assert said.startswith("Promoted: the first model, within all 3 limits. assistant@v0.0.1 is prod on main (")
    assert said.endswith("pushed to origin.")
    return world.folder


@pytest.fixture
def world(promoted: Path, api: server.Server, tmp_path: Path) -> World:
    return World(fork(promoted, tmp_path / "world"), api)


class TestWhatBecomesOfIt:
    def test_the_first_run_leaves_a_tagged_commit_that_others_can_use(self, world: World, tmp_path: Path) -> None:
        tip = world.git("rev-parse", "HEAD")
        assert world.git("rev-parse", "main", where="remote.git") == tip
        assert world.git("tag", where="remote.git").splitlines() == ["assistant#prod#1", "assistant@v0.0.1"]
        assert world.git("rev-parse", "assistant@v0.0.1^{commit}", where="remote.git") == tip
        assert world.git("log", "-1", "--format=%an %ae %cn") == "A Person person@example.org A Person"
        assert "trained.definition.correct: within its limit" in world.git("log", "-1", "--format=%b")
        assert set(world.git("show", "--format=", "--name-only").splitlines()) == {
            "data/.gitignore", "data/evaluate/.gitignore", "data/evaluate/base.json", "data/evaluate/dpo.json",
            "dvc.lock",
        }  # fmt: skip
        assert world.git("status", "--porcelain") == ""
        world.clean()
        run(f"git clone -q {world.folder}/remote.git other", tmp_path)
        other = tmp_path / "other"
        run(f"dvc remote add -q --local -d store {world.folder / 'store'} && dvc pull -q --run-cache", other)
        assert "Running stage" not in run("dvc repro", other).stdout
        assert "v0.0.1" in run("gto show assistant@latest", other).stdout
        assert (other / "data/model/skill").read_text() == "0.7"

    def test_nothing_new_is_all_cached_and_moves_nothing(self, world: World) -> None:
        before = world.refs()
        (world.repo / "params.yaml").write_text(PARAMS + "# mine\n")
        started = time.monotonic()
        assert world.retrain() == "nothing new: 3 unchanged"
        said = world.api.logs(world.api.newest("retrain")["id"])
        assert "note: this run has what main has, not your edits to params.yaml" in said
        assert time.monotonic() - started < 60
        assert set(world.states().values()) == {("Cached", "unchanged")}
        assert world.api.newest("retrain")["state"]["name"] == "Cached"
        assert world.refs() == before
        world.clean()

    def test_better_is_promoted_with_its_data_and_the_checkout_follows(self, world: World) -> None:
        world.data("b.txt", "0.9")
        (world.repo / "train.py").write_text((world.repo / "train.py").read_text() + "# an edit of a person's\n")
        said = world.retrain()
        assert said.startswith("Promoted: better in trained.definition.correct (+0.")
        assert "assistant@v0.0.2 is prod on main" in said
        assert world.git("log", "--format=%s").count("Retrain") == 2
        assert "data/raw/b.txt" in world.git("show", "--format=", "--name-only").splitlines()
        assert world.git("status", "--porcelain") == " M train.py"
        assert world.git("rev-parse", "main", where="remote.git") == world.git("rev-parse", "HEAD")
        artifact = world.api.artifacts(world.api.newest("retrain")["id"])["gate"]
        assert artifact["data"].startswith("# Promoted")
        run("git checkout -q train.py && dvc checkout -q", world.repo)
        assert "Running stage" not in run("dvc repro", world.repo).stdout
        assert world.retrain() == "nothing new: 3 unchanged"
        world.clean()

    def test_worse_is_rejected_and_nothing_moves(self, world: World) -> None:
        world.data("b.txt", "0.6")
        before = world.refs()
        store = sorted((world.folder / "store").rglob("*"))
        said = world.retrain(code=3)
        assert said.startswith("Rejected: trained.definition.correct ")
        assert " worse by " in said
        assert world.refs() == before
        assert sorted((world.folder / "store").rglob("*")) == store
        assert world.git("status", "--porcelain") == "?? data/raw/b.txt"
        newest = world.api.newest("retrain")
        assert (newest["state"]["name"], newest["state"]["type"]) == ("Rejected", "COMPLETED")
        artifact = world.api.artifacts(newest["id"])["gate"]
        assert "| ✗ | `trained.definition.correct` | 80 | 0." in artifact["data"]
        world.clean()
        assert world.retrain(code=3) == said  # the next night: no training, the same answer
        assert {state for state, _ in world.states().values()} == {"Cached"}
        assert world.refs() == before

    def test_a_file_that_no_source_names_is_no_new_data(self, world: World) -> None:
        """It would be committed as a new version that never read it."""
        (world.repo / "params.yaml").write_text("ingest: {sources: [{path: data/raw/*.txt}]}\n" + PARAMS)
        run("git commit -qam sources && git push -q origin main", world.repo)
        for name in ("b.jsonl", "notes.md"):
            world.data(name, "0.9")
        assert world.retrain().startswith("nothing new: 3 unchanged")
        said = "\n".join(world.api.logs(world.api.newest("retrain")["id"]))
        assert "data/raw/b.jsonl: no source in params.yaml (ingest.sources) names it, left alone" in said
        run("dvc add -q data/raw/b.jsonl", world.repo)  # what it puts into .gitignore is no new data either
        os.utime(world.repo / "data/raw/.gitignore", (time.time() - 3600,) * 2)
        assert world.retrain().startswith("nothing new: 3 unchanged")
        world.data("c.txt", "0.9")
        assert world.retrain().startswith("Promoted: better in")
        left = ["data/raw/.gitignore", "data/raw/b.jsonl.dvc", "data/raw/notes.md"]
        assert world.git("status", "--porcelain").splitlines() == [f"?? {path}" for path in left]

    def test_random_answers_are_rejected_by_the_floor_even_on_a_first_run(
        self, begun: Path, api: server.Server, tmp_path: Path
    ) -> None:
        world = World(fork(begun, tmp_path / "world"), api)
        world.data("b.txt", "0.25")
        before = world.refs()
        said = world.retrain(code=3)
        assert "below its floor 0.5" in said
        assert world.refs() == before

    def test_new_code_without_a_difference_is_promoted(self, world: World) -> None:
        """Also: a run cache entry of this very code is used, and scores of two codes are told apart."""
        text = (world.repo / "scores.py").read_text()
        (world.repo / "scores.py").write_text(text + "# tidier\n")
        run("git commit -qam tidier && git push -q origin main", world.repo)
        assert world.retrain().startswith("Promoted: no different from the champion, item by item. assistant@v0.0.2")
        assert "not scored alike; changed are scores.py" in world.git("log", "-1", "--format=%b")

    def test_imports_are_refreshed(self, world: World) -> None:
        source = world.folder / "source.txt"
        source.write_text("0.7\n")
        run(f"dvc import-url -q {source} data/raw/z.txt && dvc repro -q && dvc push -q --run-cache", world.repo)
        run("git add -A && git commit -qm import && git push -q origin main", world.repo)
        assert world.retrain() == "nothing new: 4 unchanged"
        source.write_text("0.95\n")
        assert world.retrain("--no-refresh") == "nothing new: 4 unchanged"
        assert world.retrain().startswith("Promoted: better in")
        assert "data/raw/z.txt.dvc" in world.git("show", "--format=", "--name-only").splitlines()


class Inbox(BaseHTTPRequestHandler):
    """A chat service: keeps what it is sent."""

    got: ClassVar[list[dict[str, str]]] = []

    def do_POST(self) -> None:
        self.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class TestMessages:
    """The automations of docs/automation, on a server that gets the flow's events."""

    def test_a_rejection_and_a_failure_become_messages(self, world: World) -> None:
        inbox = ThreadingHTTPServer(("127.0.0.1", 0), Inbox)
        threading.Thread(target=inbox.serve_forever, daemon=True).start()
        try:
            notify = [sys.executable, str(ROOT / "docs/automation/notify.py")]
            env = world.api.env | {"REFORGE_NOTIFY_URL": f"json://127.0.0.1:{inbox.server_port}/team"}
            for _ in range(2):  # again: brought up to date, not doubled
                run(notify, world.repo, **env)
            names = [found["name"] for found in world.api.post("automations/filter", {})]
            assert names.count("reforge: a retrained model was rejected") == 1
            world.data("b.txt", "0.6")
            said = world.retrain(code=3)
            small.until(lambda: len(Inbox.got) >= 1, what="no message came")
            assert Inbox.got[0]["title"] == "reforge: the model on main stays, a retrained one was rejected"
            assert said in Inbox.got[0]["message"]
            assert "NO  trained.definition.correct: " in Inbox.got[0]["message"]
            world.git("remote", "set-url", "origin", str(world.folder / "nowhere"))
            world.retrain(code=1)
            small.until(lambda: len(Inbox.got) >= 2, what="no message came")
            assert Inbox.got[1]["title"] == "reforge: a retraining failed"
            assert "nowhere" in Inbox.got[1]["message"]
        finally:
            inbox.shutdown()
            inbox.server_close()

    def test_what_notify_refuses(self, world: World) -> None:
        notify = [sys.executable, str(ROOT / "docs/automation/notify.py")]
        for env, expected in (
            ({"PREFECT_API_URL": ""}, "no server: set PREFECT_API_URL"),
            (world.api.env | {"REFORGE_NOTIFY_URL": "nonsense"}, "no address that Apprise knows"),
        ):
            done = run(notify, world.repo, check=False, **env)
            assert (done.returncode, "Traceback" in done.stdout) == (1, False)
            assert expected in done.stdout


class TestInterrupted:
    def hook(self, world: World, text: str) -> Path:
        """What the remote does when something is pushed to it."""
        path = world.folder / "remote.git/hooks/pre-receive"
        path.write_text(f"#!/bin/sh\ncd {world.folder}\n{text}\n")
        path.chmod(0o755)
        return path

    def test_killed_between_commit_and_push_the_next_run_finishes_it_once(self, world: World) -> None:
        world.data("b.txt", "0.9")
        remote = world.git("for-each-ref", where="remote.git")
        head = world.git("rev-parse", "HEAD")
        hook = self.hook(world, "kill -9 $(cat flow.pid); sleep 100")
        process = world.start()
        (world.folder / "flow.pid").write_text(str(process.pid))
        small.finish(process)
        assert process.returncode == -signal.SIGKILL
        commit = world.git("rev-parse", "refs/reforge/retrain/main")
        assert world.git("for-each-ref", where="remote.git") == remote
        assert world.git("rev-parse", "HEAD") == head
        hook.unlink()
        said = world.retrain()
        assert said.startswith("finished an interrupted promotion (assistant@v0.0.2 is prod on main (")
        assert said.endswith("nothing new: 3 unchanged")
        assert world.git("rev-parse", "main", where="remote.git") == commit == world.git("rev-parse", "HEAD")
        tags = ["assistant#prod#1", "assistant#prod#2", "assistant@v0.0.1", "assistant@v0.0.2"]
        assert world.git("tag", where="remote.git").splitlines() == tags
        assert world.git("status", "--porcelain") == ""
        world.clean()
        after = world.refs()
        assert world.retrain() == "nothing new: 3 unchanged"
        assert world.refs() == after

    def test_artifacts_that_can_not_be_pushed_hold_the_commit_back(self, world: World) -> None:
        world.data("b.txt", "0.9")
        before = world.git("for-each-ref", where="remote.git")
        shutil.move(world.folder / "store", world.folder / "away")
        (world.folder / "store").write_text("no folder")
        said = world.retrain(code=1)
        assert said.startswith("dvc: ")
        assert world.git("for-each-ref", where="remote.git") == before
        (world.folder / "store").unlink()
        shutil.move(world.folder / "away", world.folder / "store")
        # meanwhile somebody else moved the branch: the promotion has no place any more, and is made again on the new tip
        run(f"git clone -q remote.git other && cd other && {PERSON} && git commit -q --allow-empty -m theirs && git push -q", world.folder)  # fmt: skip
        assert world.retrain().startswith("Promoted: better in")
        assert {state for state, _ in world.states().values()} == {"Cached"}
        assert world.git("log", "-2", "--format=%s", "main", where="remote.git").splitlines()[1] == "theirs"
        assert world.git("rev-parse", "main", where="remote.git") == world.git("rev-parse", "HEAD")
        assert len(world.git("tag").splitlines()) == 4
        world.clean()

    def test_artifacts_that_are_nowhere_hold_the_commit_back(self, world: World) -> None:
        """`dvc push` warns of them and says that all went well."""
        world.data("b.txt", "0.9")
        shutil.move(world.folder / "store", world.folder / "away")
        (world.folder / "store").write_text("no folder")
        assert world.retrain(code=1).startswith("dvc: ")
        (world.folder / "store").unlink()
        shutil.move(world.folder / "away", world.folder / "store")
        run(
            "dvc gc -q -f -a -T --not-in-remote || dvc gc -q -f -a -T", world.repo
        )  # knows no promotion that is pending
        before = world.git("for-each-ref", where="remote.git")
        said = world.retrain(code=1)
        assert said.startswith(
            "data/evaluate/dpo.answers.jsonl, data/model: not in the DVC remote after a push, nor in "
        )
        assert said.endswith("is dropped, and the next run makes it anew")
        assert world.git("for-each-ref", where="remote.git") == before
        assert world.retrain().startswith("Promoted: better in")
        world.clean()

    def test_a_branch_that_may_not_be_pushed_to(self, world: World) -> None:
        """The promotion waits until it was merged; its tags come after it."""
        world.data("b.txt", "0.9")
        hook = self.hook(world, "echo 'GitLab: You are not allowed to push code to protected branches.' >&2; exit 1")
        said = world.retrain(code=1)
        assert "You are not allowed to push code to protected branches" in said
        assert (
            "is kept: let this account push to main of origin and run again, or merge refs/reforge/retrain/main" in said
        )
        assert said.endswith("or drop it (git update-ref -d refs/reforge/retrain/main)")
        hook.write_text(
            "#!/bin/sh\necho a rule >&2\nexit 1\n"
        )  # GitHub's and others' words come after the branch's name
        assert "is kept: let this account push to main of origin" in world.retrain(code=1)
        hook.unlink()
        merge = (
            f"{PERSON} && git pull -q --no-rebase --no-ff --no-edit ../repo refs/reforge/retrain/main && git push -q"
        )
        run(f"git clone -q remote.git other && cd other && {merge}", world.folder)
        assert "assistant@v0.0.2" not in world.git("tag", where="remote.git")
        assert world.retrain().startswith("finished an interrupted promotion (assistant@v0.0.2 is prod on main (")
        tags = ["assistant#prod#1", "assistant#prod#2", "assistant@v0.0.1", "assistant@v0.0.2"]
        assert world.git("tag", where="remote.git").splitlines() == tags
        world.clean()

    def test_a_checkout_in_which_a_flow_runs_stays(self, world: World) -> None:
        world.data("b.txt", "0.9")
        head = world.git("rev-parse", "HEAD")
        with stages.turn(world.repo, print, lambda: False):
            said = world.retrain()
        assert "main is checked out where a run goes on" in said
        assert world.git("rev-parse", "HEAD") == head
        assert world.git("log", "-1", "--format=%s", "main", where="remote.git").startswith("Retrain assistant")

    def test_killed_while_training_and_only_one_at_a_time(self, world: World) -> None:
        world.data("b.txt", "0.9")
        training = world.repo / ".dvc/tmp/retrain/training"
        training.unlink(missing_ok=True)
        process = world.start(TRAIN_SECONDS="100")
        try:
            small.until(training.exists, what="it did not train")
            said = world.retrain(code=1)
            assert said == f"another retrain (process {process.pid}) runs in this repository; nothing was done"
        finally:
            process.kill()
            small.finish(process)
        assert (world.repo / ".dvc/tmp/retrain/tree").is_dir()
        assert world.retrain().startswith("Promoted: better in")
        world.clean()

    def test_a_cancel_on_the_page_ends_one_that_was_started_by_hand(self, world: World) -> None:
        world.data("b.txt", "0.9")
        training = world.repo / ".dvc/tmp/retrain/training"
        training.unlink(missing_ok=True)
        before = world.refs()
        process = world.start(TRAIN_SECONDS="100")
        small.until(training.exists, what="it did not train")
        found = world.api.newest("retrain")["id"]
        world.api.post(f"flow_runs/{found}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
        output = small.finish(process, 60)
        assert process.returncode == 1, output
        assert world.api.get(f"flow_runs/{found}")["state"]["name"] == "Cancelled"
        assert world.refs() == before
        world.clean()

    @pytest.mark.parametrize(("scheduled", "kind"), [(True, "CANCELLED"), (False, "FAILED")])
    def test_the_second_of_two_has_failed_only_if_a_person_started_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduled: bool, kind: str
    ) -> None:
        """After an outage all nights that were missed start at once."""
        run("git init -q && mkdir .dvc", tmp_path)
        monkeypatch.setattr(retrain, "get_run_logger", lambda: None)
        with (
            retrain._alone(tmp_path),
            FlowRunContext.model_construct(flow_run=SimpleNamespace(auto_scheduled=scheduled)),
        ):
            state = retrain.retrain.fn(retrain.RetrainParameters(repo=tmp_path))
        assert state.type.value == kind
        assert state.message.startswith(f"another retrain (process {os.getpid()}) runs in this repository")

    def test_the_remote_moved_on(self, world: World) -> None:
        world.data("b.txt", "0.9")
        training = world.repo / ".dvc/tmp/retrain/training"
        training.unlink(missing_ok=True)
        process = world.start(TRAIN_SECONDS="2")
        small.until(training.exists, what="it did not train")
        run(f"git clone -q remote.git other && cd other && {PERSON} && git commit -q --allow-empty -m theirs && git push -q", world.folder)  # fmt: skip
        before = world.refs()
        output = small.finish(process)
        assert process.returncode == 1
        assert "retrain: origin/main moved on while this run trained; nothing was moved" in output
        assert world.refs() == before
        assert world.git("status", "--porcelain") == "?? data/raw/b.txt"
        assert world.retrain().startswith("Promoted: better in")
        assert {state for state, _ in world.states().values()} == {"Cached"}


class TestItsGit:
    """Without a server and DVC: a promotion that is committed, and what git says."""

    @pytest.fixture
    def place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> retrain.Place:
        self.said: list[str] = []
        monkeypatch.setattr(retrain, "_network", lambda at, words: retrain._guarded(at, at.main, words, print))
        run(f"git init -q -b main repo && git init -q --bare -b main remote.git && mkdir -p repo/.dvc/tmp && cd repo && {PERSON} && echo 1 > dvc.lock && git add dvc.lock && git commit -qm one && git remote add origin ../remote.git && git push -q origin main", tmp_path)  # fmt: skip
        main = tmp_path / "repo"
        run("git worktree add -q --detach ../tree && cd ../tree && echo 2 > dvc.lock && echo new > data.txt && git add -A && git commit -qm promotion", main)  # fmt: skip
        return retrain.Place(main, tmp_path / "tree", retrain.DEFAULTS, "origin", self.said.append)

    @pytest.fixture
    def commit(self, place: retrain.Place, monkeypatch: pytest.MonkeyPatch) -> str:
        commit = retrain._git(place.tree, "rev-parse", "HEAD")
        retrain._git(place.main, "update-ref", place.pending, commit)
        retrain._git(place.main, "tag", "assistant@v0.0.1", commit)
        monkeypatch.setattr(retrain, "_tag", lambda *_: ["assistant@v0.0.1"])
        monkeypatch.setattr(retrain, "_push", lambda *_: None)
        monkeypatch.setattr(retrain, "cancelled", lambda: False)
        monkeypatch.setattr(stages, "drop_dead_holders", lambda _: None)
        return commit

    @pytest.mark.parametrize("data", ["new", "mine"])
    def test_a_promotion_stands_where_the_checkout_can_not_follow(
        self, place: retrain.Place, commit: str, data: str
    ) -> None:
        """Its model is prod: the run has not failed."""
        (place.main / "data.txt").write_text(f"{data}\n")
        index = (place.main / ".git/index").read_bytes()
        (place.main / ".git/index.lock").touch()
        said = retrain._publish(place, commit, None, None)
        assert said.startswith(f"assistant@v0.0.1 is prod on main ({commit[:10]}), pushed to origin; here: git ")
        assert said.endswith(f": Unable to create '{place.main}/.git/index.lock': File exists.")
        assert self.said[-1].startswith("pushed, but main stays behind here: git ")
        assert (place.main / ".git/index").read_bytes() == index
        assert retrain._rev(place.main, place.pending) is None
        (place.main / ".git/index.lock").unlink()
        assert retrain._follow(place, commit) is None or data == "mine"

    def test_a_promotion_stands_where_dvcs_list_of_holders_is_cut_off(
        self, place: retrain.Place, commit: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def cut(_: Path) -> None:
            raise UserError("Unable to read RWLock-file")

        monkeypatch.setattr(stages, "drop_dead_holders", cut)
        assert retrain._publish(place, commit, None, None).endswith("; here: Unable to read RWLock-file.")
        here = dataclasses.replace(place, remote=None)
        retrain._git(place.main, "update-ref", place.pending, commit)
        with pytest.raises(UserError, match=r"RWLock-file; the promotion \w+ is kept, and the next run finishes it"):
            retrain._publish(here, commit, None, None)
        assert retrain._rev(place.main, place.pending) == commit

    @pytest.mark.parametrize("remote", ["origin", None])
    def test_a_cancelled_run_publishes_nothing(
        self, place: retrain.Place, commit: str, monkeypatch: pytest.MonkeyPatch, remote: str | None
    ) -> None:
        place = dataclasses.replace(place, remote=remote)
        head = retrain._git(place.main, "rev-parse", "main")
        monkeypatch.setattr(retrain, "cancelled", lambda: True)
        with pytest.raises(Stopped):
            retrain._publish(place, commit, head, None)
        assert retrain._rev(place.main, place.pending) is None
        assert retrain._git(place.main, "rev-parse", "main") == head
        # what can be seen already is finished
        retrain._git(place.main, "merge", "--quiet", "--ff-only", commit)
        retrain._git(place.main, "tag", "assistant@v0.0.1", commit)
        assert retrain._publish(place, commit, commit, None).startswith("assistant@v0.0.1 is prod")

    def test_a_cancel_after_the_last_stage_commits_nothing(
        self, place: retrain.Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nor are its artifacts pushed, which may take long."""
        head = retrain._git(place.main, "rev-parse", "main")
        verdict = gate.Verdict(True, "better", (), 0.95)
        gone_through = {
            "_check_identity": None, "_note_edits": None, "_tip": (head, head), "_finish_interrupted": (head, ""),
            "_worktree": contextlib.nullcontext(), "_dvc_remote": None, "_limits": None, "_answers": "answers.jsonl",
            "_take": [], "_network": "", "_champion": None, "_lock": {}, "_made": ["dvc.lock"], "pipeline": Completed(),
            "create_markdown_artifact": None, "_emit": None, "cancelled": True,
        }  # fmt: skip
        for name, value in gone_through.items():
            monkeypatch.setattr(retrain, name, lambda *_, value=value, **__: value)
        monkeypatch.setattr(stages, "plan", lambda *_: [])
        monkeypatch.setattr(gate, "read", lambda _: [])
        monkeypatch.setattr(gate, "decide", lambda *_: verdict)
        monkeypatch.setattr(retrain, "_commit", lambda *_: pytest.fail("committed"))
        with pytest.raises(Stopped):
            retrain._run(place)

    def test_a_stale_tag_gives_way_to_the_remotes(self, place: retrain.Place) -> None:
        """git fetches none then, and says nothing of it."""
        theirs, stale = (retrain._git(where, "rev-parse", "HEAD") for where in (place.main, place.tree))
        run("git tag -a -m x assistant@v0.0.1 && git tag 'assistant#prod#1' && git push -q --tags origin", place.main)
        run(f"git tag -d assistant@v0.0.1 && git tag -a -m y assistant@v0.0.1 {stale}", place.main)
        assert retrain._tip(place) == (theirs, theirs)
        assert retrain._git(place.main, "rev-parse", "assistant@v0.0.1^{commit}") == theirs
        assert self.said == [f"the tag assistant@v0.0.1 here was of {stale[:10]}, origin has {theirs[:10]}: taken over"]
        retrain._tip(place)
        assert len(self.said) == 1

    def test_git_says_why_and_not_what_it_advises(self, place: retrain.Place) -> None:
        (place.main / ".git/index.lock").touch()
        with pytest.raises(UserError, match=r"^git add: fatal: Unable to create .*index\.lock': File exists\.$"):
            retrain._git(place.main, "add", "dvc.lock")


class TestWithoutARemote:
    def test_uncommitted_changes_in_the_way_are_kept_and_it_is_finished_later(self, world: World) -> None:
        run("git remote remove origin && dvc remote remove --local -q store", world.repo)
        world.data("b.txt", "0.9")
        lock = world.repo / "dvc.lock"
        lock.write_text(lock.read_text() + "# mine\n")
        text, head = lock.read_text(), world.git("rev-parse", "main")
        said = world.retrain(code=1)
        assert said.startswith(
            "main is checked out with changes of dvc.lock: commit, stash or remove them; the promotion "
        )
        assert said.endswith("is kept, and the next run finishes it")
        assert lock.read_text() == text
        assert world.git("rev-parse", "main") == head
        assert world.git("status", "--porcelain") == " M dvc.lock\n?? data/raw/b.txt"
        world.git("checkout", "-q", "dvc.lock")
        assert world.retrain().startswith("finished an interrupted promotion")
        assert world.git("status", "--porcelain") == ""
        assert world.git("tag", "--points-at", "main").splitlines() == ["assistant#prod#2", "assistant@v0.0.2"]
        world.clean()

    def test_a_branch_that_is_not_checked_out_moves_alone(self, world: World) -> None:
        world.git("remote", "remove", "origin")
        world.git("switch", "-q", "-c", "mine")
        (world.repo / "data/raw/a.txt").write_text("0.95\n")  # of another branch: not looked at
        assert world.retrain("--no-push") == "nothing new: 3 unchanged"
        world.git("checkout", "-q", "main", "data/raw/a.txt")
        run(
            "git stash -q -u; git switch -q main && echo 0.9 > data/raw/a.txt && git commit -qam more && git switch -q mine",
            world.repo,
        )
        here = world.git("rev-parse", "HEAD")
        assert world.retrain().startswith("Promoted: better in")
        assert world.git("rev-parse", "HEAD") == here
        assert world.git("log", "-1", "--format=%s", "main").startswith("Retrain assistant")


class TestRefused:
    def test_what_would_leave_others_without_a_model(self, world: World) -> None:
        run("dvc remote remove --local -q store", world.repo)
        assert "no DVC remote: others would get a commit without its model" in world.retrain(code=1)

    def test_a_champion_whose_answers_are_nowhere(self, world: World) -> None:
        shutil.rmtree(world.repo / ".dvc/cache")
        shutil.rmtree(world.folder / "store")
        (world.folder / "store").mkdir()
        assert "the champion's answers are neither in the cache nor on a DVC remote" in world.retrain(code=1)

    def test_commits_that_can_not_be_signed_before_anything_runs(self, world: World) -> None:
        run("git config commit.gpgsign true && git config gpg.program false", world.repo)
        world.data("b.txt", "0.9")
        said = world.retrain(code=1)
        assert said.startswith("commit.gpgsign is on, and git can't sign here, as promotions would have to be: give ")
        assert world.git("for-each-ref", "refs/reforge") == ""

    def test_own_commits_that_are_not_pushed(self, world: World) -> None:
        run("git commit -q --allow-empty -m mine", world.repo)
        assert world.retrain(code=1).startswith("main here is ahead of origin (commits: 1): push them")

    def test_targets_without_the_evaluation(self, world: World) -> None:
        assert world.retrain("--targets", "train", code=1).startswith("evaluate@dpo is not among the targets")

    def test_wrong_limits_before_anything_runs(self, world: World) -> None:
        (world.repo / "params.yaml").write_text("gate: {limits: {correct: {margin: 0.1}}}\n")
        run("git commit -qam wrong && git push -q origin main", world.repo)
        assert world.retrain(code=1) == "gate.limits.correct: expected SET.TASK.MEASURE, with `*` for any task"
