"""The bridge to DVC, on a small repository: what is planned, run, restored, stopped, and never recorded wrongly."""

import fcntl
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from io import StringIO
from pathlib import Path

import pytest
from dvc.config import Config
from ruamel.yaml import YAML

from flows import stages, worktrees
from flows.stages import Outcome, StageFailed, StageTimedOut, StageTransient, Stopped
from tasks.params import UserError
from tests import small
from tests.conftest import ROOT, fork, run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small repository in which all ran, committed."""
    return small.ran(tmp_path_factory.mktemp("small") / "repo")


@pytest.fixture
def repo(ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return fork(ran, tmp_path / "repo")


def state(repo: Path) -> dict[str, tuple[bool, bool]]:
    return {p.name: (p.changed, p.restorable) for p in stages.plan(repo)}


def execute(repo: Path, name: str, **more: object) -> tuple[Outcome, list[str]]:
    lines: list[str] = []
    return stages.execute(repo, name, lines.append, **more), lines  # type: ignore[arg-type]


NAMES = ["first", "slow", "each@a", "report", "each@b"]


class TestPlan:
    def test_all_stages_upstreams_first_from_any_folder(self, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for folder in (repo, repo.parent, Path("/")):
            monkeypatch.chdir(folder)
            found = stages.plan(repo)
            assert sorted(p.name for p in found) == sorted(NAMES)
            seen: set[str] = set()
            for p in found:
                assert set(p.upstream) <= seen
                seen.add(p.name)
            assert not any(p.changed for p in found)
            by_name = {p.name: p for p in found}
            assert set(by_name["report"].upstream) == {"slow", "each@a"}
            assert [p.name for p in found if p.gpu] == ["slow"]
            assert by_name["first"].metrics == ("first.json",)
            assert by_name["report"].outputs == ("report.md",)

    def test_reasons_are_those_of_dvc_status(self, repo: Path) -> None:
        (repo / "in").write_text("other\n")
        (repo / "params.yaml").write_text("slow: 2\n")
        (repo / "report.md").unlink()
        text = (repo / "dvc.yaml").read_text().replace("cat one > ${item}.out;", "cat one > ${item}.out ;")
        (repo / "dvc.yaml").write_text(text)
        found = {p.name: [str(r) for r in p.reasons] for p in stages.plan(repo) if p.changed}
        assert found == {
            "first": ["dependency in modified"],
            "slow": ["parameter slow modified"],
            "each@a": ["command modified"],
            "each@b": ["command modified"],
            "report": ["output report.md deleted"],
        }
        assert set(found) == set(json.loads(run("dvc status --json", repo).stdout.splitlines()[-1]))

    def test_a_change_undone_is_foreseen_as_restored_to_the_last_stage(self, repo: Path) -> None:
        (repo / "in").write_text("other\n")
        assert state(repo)["first"] == (True, False)
        run("dvc repro -q", repo)
        (repo / "in").write_text("input\n")
        assert state(repo) == {
            "first": (True, True),
            "slow": (False, True),
            "each@a": (False, True),
            "each@b": (False, True),
            "report": (False, True),
        }
        (repo / "log").unlink()
        run("dvc repro -q", repo)
        assert small.log(repo) == []
        shutil.rmtree(repo / ".dvc/cache/files")
        (repo / "two").unlink()
        assert state(repo)["slow"] == (True, False)

    def test_targets(self, repo: Path) -> None:
        assert {p.name for p in stages.plan(repo, ["each"])} == {"first", "each@a", "each@b"}
        with pytest.raises(UserError, match=r"slo: no such stage in dvc\.yaml, did you mean `slow`"):
            stages.plan(repo, ["slo"])
        with pytest.raises(UserError, match="DVC"):
            stages.plan(Path("/"))

    @pytest.mark.parametrize(
        ("given", "seconds"), [("7200", 7200.0), ("0.5", 0.5), ("2h", None), ("-1", None), ("0", None), ("[1]", None)]
    )
    def test_a_timeout_is_seconds(self, repo: Path, given: str, seconds: float | None) -> None:
        text = (repo / "dvc.yaml").read_text()
        (repo / "dvc.yaml").write_text(text.replace("  first:\n", f"  first:\n    meta: {{timeout: {given}}}\n"))
        if seconds is None:
            with pytest.raises(UserError, match=r"first: meta\.timeout: expected seconds above 0, found"):
                stages.plan(repo, ["first"])
        else:
            assert [each.timeout for each in stages.plan(repo, ["first"])] == [seconds]

    def test_imports_and_added_files_are_stages(self, repo: Path, tmp_path: Path) -> None:
        (tmp_path / "source").write_text("1\n")
        (repo / "added").write_text("2\n")
        run(f"dvc import-url -q {tmp_path / 'source'} there && dvc add -q added", repo)
        found = {p.name: p for p in stages.plan(repo)}
        assert found["there.dvc"].imported
        assert not found["there.dvc"].changed
        assert not found["added.dvc"].imported
        (repo / "added").write_text("3\n")
        assert {p.name for p in stages.plan(repo) if p.changed} == {"added.dvc"}
        assert execute(repo, "added.dvc")[0].did == "ran"
        assert not any(p.changed for p in stages.plan(repo))


class TestExecute:
    def test_the_words_of_dvc_that_are_read(self, repo: Path, tmp_path: Path) -> None:
        """If DVC words these otherwise one day, this fails, and `stages.read` is what to mend."""
        assert execute(repo, "first")[0].did == "unchanged"
        (repo / "in").write_text("other\n")
        outcome, lines = execute(repo, "first")
        assert outcome.did == "ran"
        assert "Running stage 'first':" in lines
        (repo / "in").write_text("input\n")
        outcome, lines = execute(repo, "first")
        assert (outcome.did, outcome.message) == ("restored", "restored from run cache")
        assert any("is cached - skipping run" in line for line in lines)
        run(f"dvc remote add -q -d store {tmp_path / 'store'} && dvc push -q", repo)
        shutil.rmtree(repo / ".dvc/cache")
        (repo / "one").unlink()
        assert {p.name for p in stages.plan(repo) if p.missing} == set(NAMES)
        outcome, lines = execute(repo, "first", pull=True)
        assert (outcome.did, outcome.message) == ("pulled", "pulled from remote")
        assert small.log(repo) == ["first"]
        shutil.rmtree(repo / ".dvc/cache")
        (repo / "one").unlink()
        done = run("dvc repro --pull -s first", repo)
        assert stages.read(done.stdout, "first") == "pulled"

    def test_what_a_stage_prints_is_not_taken_for_dvc(self) -> None:
        said = "Running stage 'a':\n> x\nStage 'a' is cached - skipping run, checking out outputs\n"
        assert stages.read(said, "a") == "ran"

    def test_same_lock_as_plain_repro(self, repo: Path, tmp_path: Path) -> None:
        other = fork(repo, tmp_path / "other")
        for folder in (repo, other):
            (folder / "in").write_text("other\n")
        run("dvc repro -q", other)
        for planned in stages.plan(repo):
            execute(repo, planned.name)
        assert (repo / "dvc.lock").read_bytes() == (other / "dvc.lock").read_bytes()
        assert run("dvc status -q", repo, check=False).returncode == 0

    def test_a_failure_says_the_last_words_of_the_stage(self, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (repo / "params.yaml").write_text("slow: 2\n")
        lock = (repo / "dvc.lock").read_bytes()
        monkeypatch.setenv("FAIL", "row 3: a bad thing")
        with pytest.raises(StageFailed, match=r"^slow: row 3: a bad thing$") as caught:
            execute(repo, "slow")
        assert not isinstance(caught.value, StageTransient)
        monkeypatch.setenv("FAIL", "requests.exceptions.ConnectionError: nobody there")
        with pytest.raises(StageTransient):
            execute(repo, "slow")
        assert (repo / "dvc.lock").read_bytes() == lock

    def test_output_comes_live_and_bars_are_thinned(self, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (repo / "params.yaml").write_text("slow: 2\n")
        monkeypatch.setenv("SLOW_SECONDS", "2")
        seen: list[tuple[float, str]] = []
        stages.execute(repo, "slow", lambda line: seen.append((time.monotonic(), line)))
        bars = [(moment, line) for moment, line in seen if "%|" in line]
        took = bars[-1][0] - bars[0][0]
        assert took > 1
        assert 2 <= len(bars) <= 2 + took // stages.PROGRESS_SECONDS

    def test_timeout_ends_everything(self, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (repo / "params.yaml").write_text("slow: 2\n")
        monkeypatch.setenv("SLOW_SECONDS", "20")
        monkeypatch.setenv("GRANDCHILD", "1")
        with pytest.raises(StageTimedOut, match="not done after 8 s"):
            execute(repo, "slow", timeout=8)
        assert not any(small.alive(pid) for pid in small.pids(repo))
        monkeypatch.setenv("SLOW_SECONDS", "0")
        assert int((repo / "checkpoint").read_text()) > 0
        assert execute(repo, "slow")[0].did == "ran"

    def test_stop_ends_everything(self, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (repo / "params.yaml").write_text("slow: 2\n")
        monkeypatch.setenv("SLOW_SECONDS", "60")
        monkeypatch.setenv("GRANDCHILD", "1")
        stop = threading.Event()
        threading.Thread(target=lambda: (small.pids(repo), stop.set())).start()
        with pytest.raises(Stopped):
            execute(repo, "slow", stop=stop)
        assert not any(small.alive(pid) for pid in small.pids(repo))

    @pytest.mark.parametrize("before", ["recorded", "never"])
    def test_an_input_edited_while_it_ran_is_not_recorded(self, repo: Path, before: str) -> None:
        if before == "never":
            locked = YAML().load(repo / "dvc.lock")
            del locked["stages"]["slow"]
            modified = StringIO()
            YAML().dump(locked, modified)
            (repo / "dvc.lock").write_text(modified.getvalue())
            run("dvc repro -q -s first", repo)
        (repo / "params.yaml").write_text("slow: 2\n")
        lock = YAML(typ="safe").load(repo / "dvc.lock")
        entries = {p.name: p for p in (repo / ".dvc/cache/runs").rglob("*") if p.is_file()}
        with (
            small.meanwhile(repo, lambda: (repo / "params.yaml").write_text("slow: 3\n")),
            pytest.raises(StageFailed, match=r"params\.yaml was edited while it ran; nothing was recorded"),
        ):
            execute(repo, "slow")
        assert YAML(typ="safe").load(repo / "dvc.lock") == lock
        assert {p.name: p for p in (repo / ".dvc/cache/runs").rglob("*") if p.is_file()} == entries
        (repo / "log").unlink()
        assert execute(repo, "slow")[0].did == "ran"  # not restored from a record of the edited run
        assert small.log(repo) == ["slow"]

    def test_a_lock_held_for_8_seconds_at_its_end(self, repo: Path) -> None:
        """DVC itself gives up after 3 seconds and throws the finished run away."""
        (repo / "params.yaml").write_text("slow: 2\n")
        hold = (
            "import sys, time, zc.lockfile; held = zc.lockfile.LockFile('.dvc/tmp/lock');"
            " print('held', flush=True); time.sleep(8)"
        )
        holders: list[subprocess.Popen[bytes]] = []

        def block() -> None:
            holders.append(subprocess.Popen([sys.executable, "-c", hold], cwd=repo, stdout=subprocess.PIPE))
            assert holders[0].stdout
            assert holders[0].stdout.readline() == b"held\n"

        started = time.monotonic()
        with small.meanwhile(repo, block):
            outcome, _ = execute(repo, "slow")
        holders[0].communicate()
        assert outcome.did == "ran"
        assert time.monotonic() - started > 8
        assert not {p.name for p in stages.plan(repo) if p.changed}

    def test_it_waits_for_a_dvc_repro_that_works_on_the_same_stage(self, repo: Path) -> None:
        (repo / "params.yaml").write_text("slow: 2\n")
        lines: list[str] = []

        def log(line: str) -> None:
            lines.append(line)
            if line == "another dvc works on this: waiting for it":
                (repo / "hold").unlink()

        with small.held(repo):
            other = small.start(["dvc", "repro"], repo)
            small.pids(repo)
            assert state(repo)["slow"] == (True, False)
            outcome = stages.execute(repo, "slow", log, timeout=60)
        small.finish(other)
        assert outcome.did == "unchanged"
        assert not other.returncode
        assert lines.count("another dvc works on this: waiting for it") == 1
        assert small.log(repo).count("slow") == 1

    def test_a_dead_holder_whose_number_lives_on_blocks_nobody(self, repo: Path) -> None:
        (repo / "in").write_text("other\n")
        sleeper = subprocess.Popen(["sleep", "300"])
        dead = {"pid": sleeper.pid, "cmd": "/x/dvc repro"}
        (repo / ".dvc/tmp/rwlock").write_text(json.dumps({"write": {str(repo / "one"): dead}, "read": {}}))
        try:
            assert execute(repo, "first", timeout=60)[0].did == "ran"
        finally:
            sleeper.kill()
            sleeper.wait()


class TestGuard:
    def test_nothing_survives_the_kill_of_whoever_started_it(self, repo: Path) -> None:
        (repo / "params.yaml").write_text("slow: 2\n")
        code = "from pathlib import Path; from flows import stages; stages.execute(Path('.').resolve(), 'slow', print)"
        with small.held(repo):  # or an orphan would end by itself
            process = small.start([sys.executable, "-c", code], repo, SLOW_SECONDS="10", GRANDCHILD="1")
            pids = small.pids(repo)
            small.until(lambda: (repo / "checkpoint").exists())
            process.kill()
            small.finish(process)
            small.until(lambda: not any(small.alive(pid) for pid in pids), 60, "the training was orphaned")
        done = run([sys.executable, "-c", code], repo, SLOW_SECONDS="0.1", GRANDCHILD="", PYTHONPATH=str(ROOT))
        assert not re.search(r"(?<!\d)0/10 ", done.stdout)  # goes on from its checkpoint
        assert stages.plan(repo, ["slow"])[-1].changed is False

    def test_what_it_left_in_the_background_ends_with_it(self, tmp_path: Path) -> None:
        done = stages.guarded(["sh", "-c", "sleep 300 & echo $! > pid; echo done"], tmp_path, print)
        assert (done.code, done.output) == (0, "done")
        small.until(lambda: not small.alive(int((tmp_path / "pid").read_text())), 60)

    def test_a_command_that_has_ended_is_not_timed_out(self, tmp_path: Path) -> None:
        """DVC may have to wait for its lock before and after it; what was made would be lost."""

        def dvc(seconds: float) -> list[str]:
            code = (
                "import subprocess, time; time.sleep(5); print(\"Running stage 'slow':\", flush=True); "
                f"subprocess.run(['sleep', '{seconds}']); time.sleep(5); print('recorded')"
            )
            return [sys.executable, "-c", code]

        done = stages.guarded(dvc(1), tmp_path, print, timeout=8)
        assert done.output.splitlines() == ["Running stage 'slow':", "recorded"]
        with pytest.raises(StageTimedOut, match="not done after 8 s"):
            stages.guarded(dvc(60), tmp_path, print, timeout=8)

    def test_exit_code_is_the_commands(self, tmp_path: Path) -> None:
        assert stages.guarded(["sh", "-c", "exit 7"], tmp_path, print).code == 7
        assert stages.guarded(["sh", "-c", "kill -9 $$"], tmp_path, print).code == 137

    def test_deaf_to_term(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """After the guard's grace it is killed."""
        code = (
            "import signal, time; signal.signal(15, lambda *a: None); open('on', 'w').close()\nwhile 1: time.sleep(1)"
        )
        stop = threading.Event()
        threading.Thread(target=lambda: (small.until((tmp_path / "on").exists), stop.set())).start()
        started = time.monotonic()
        with pytest.raises(Stopped):
            stages.guarded([sys.executable, "-c", code], tmp_path, print, stop=stop)
        assert 9 < time.monotonic() - started < 60


class TestTurn:
    def test_one_after_the_other(self, repo: Path) -> None:
        said: list[str] = []
        stop = threading.Event()
        with (repo / ".dvc/tmp/flow.lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            threading.Timer(1, stop.set).start()
            with pytest.raises(Stopped), stages.turn(repo, said.append, stop.is_set):
                pass
        assert said == ["another flow runs in this workspace: waiting for its end"]
        with stages.turn(repo, said.append, lambda: False):
            pass


def test_metrics_and_their_change_since_head(repo: Path) -> None:
    (repo / "first.json").write_text('{"size": 2.0, "inner": {"new": 3}, "text": "x"}')
    found = stages.metrics(repo, ["first.json"])
    assert [(m.path, m.name, m.value, m.head, m.change) for m in found] == [
        ("first.json", "inner.new", 3, None, None),
        ("first.json", "size", 2.0, 1.5, 0.5),
        ("first.json", "text", "x", None, None),
    ] or sorted((m.name, m.head, m.change) for m in found) == [
        ("inner.new", None, None),
        ("size", 1.5, 0.5),
        ("text", None, None),
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "flows").glob("*.py")), ids=lambda p: p.stem)
def test_layers(path: Path) -> None:
    """Only `stages` imports dvc; nothing loads torch; of tasks only `params`, and what judges and draws."""
    import re

    text = path.read_text()
    if path.stem != "stages":
        assert not re.search(r"^\s*(?:from|import) dvc\b", text, re.MULTILINE)
    for module, names in re.findall(r"^\s*from tasks(?:\.(\w+))? import (.+)$", text, re.MULTILINE):
        assert set([module] if module else names.split(", ")) <= {"params", "compare", "chart", "weights"}
    assert not re.search(r"^\s*import tasks", text, re.MULTILINE)
    code = f"import sys, flows.{path.stem}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    run([sys.executable, "-c", code], ROOT)


def test_the_first_lines_of_a_long_output_are_there_if_asked_for(tmp_path: Path) -> None:
    """`git ls-remote` says the branch first, then a line for each of hundreds of tags."""
    command = [sys.executable, "-c", "for n in range(1000): print(n)"]
    whole = stages.guarded(command, tmp_path, lambda line: None, kept=None).output.split()
    assert whole == [str(n) for n in range(1000)]
    assert stages.guarded(command, tmp_path, lambda line: None).output.split() == whole[-stages.KEPT :]


@pytest.mark.parametrize("cache", ["/home/ann/c#/cache", "/home/a, b/cache", "/home/a b/cache", "/home/법/cache"])
def test_a_config_of_a_worktree_is_read_by_dvc_as_it_was_meant(tmp_path: Path, cache: str) -> None:
    repo = tmp_path / "repo"
    repo.mkdir()
    run("git init -q && dvc init -q", repo)
    local = worktrees.local_config(repo, repo)
    local.setdefault("cache", {})["dir"] = cache
    worktrees.write_config(local, repo)
    assert Config(str(repo / ".dvc"), validate=False)["cache"]["dir"] == cache
