"""What a kill, a full disk or a failing one left behind is found, named and put right."""

import inspect
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from dvc.utils.serialize import _common

from flows import mend, stages
from tasks.params import UserError
from tests import small
from tests.conftest import ROOT, fork, run
from tests.test_training import flip

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small repository in which all ran, committed; a change that was undone since is in its run cache."""
    return small.ran(tmp_path_factory.mktemp("mend") / "repo")


@pytest.fixture
def repo(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return fork(done, tmp_path / "repo")


def mended(repo: Path, **given: bool) -> list[str]:
    said: list[str] = []
    assert mend.mend(repo, said.append, **given) == len(said)
    return said


def entry(repo: Path, text: bytes) -> Path:
    """The file of the cache that holds `text`."""
    return next(p for p in (repo / ".dvc/cache/files").rglob("*") if p.is_file() and p.read_bytes() == text)


def test_make_run_mends_first() -> None:
    said = run(["make", "-n", "-o", "setup", "run"], ROOT, MAKEFLAGS="", MAKELEVEL="0").stdout
    assert said.splitlines() == ["python -m flows.mend --quick", "python -m tasks.params", "dvc repro"]


def test_nothing_is_damaged(repo: Path) -> None:
    files = {p: p.read_bytes() for p in repo.rglob("*") if p.is_file() and ".dvc/tmp" not in str(p)}
    assert mended(repo) == mended(repo, every=True) == []
    assert files == {p: p.read_bytes() for p in repo.rglob("*") if p.is_file() and ".dvc/tmp" not in str(p)}


@pytest.mark.parametrize(("share", "committed"), [(0.0, True), (0.55, True), (0.97, True), (0.3, False)])
def test_a_lock_file_that_is_cut_off(repo: Path, share: float, committed: bool) -> None:
    """`dvc repro` stops at most of these; afterwards nothing is lost, and the file is what it was."""
    whole = (repo / "dvc.lock").read_bytes()
    if not committed:
        run("git rm -q --cached dvc.lock && git -c user.name=t -c user.email=t@example.org commit -qm gone", repo)
    (repo / "dvc.lock").write_bytes(whole[: int(share * len(whole))])
    (said,) = mended(repo, quick=True)
    assert said.startswith("dvc.lock was cut off after ")
    run("dvc repro", repo)
    assert small.log(repo) == []
    assert (repo / "dvc.lock").read_bytes() == whole
    assert not (repo / "dvc.lock.tmp").exists()


@pytest.mark.parametrize("line", ["  slow:", "    deps:", "    outs:", "    params:", "      params.yaml:"])
def test_a_lock_file_that_is_cut_off_at_the_end_of_a_line(repo: Path, line: str) -> None:
    """Valid YAML, whose stages DVC refuses."""
    whole = (repo / "dvc.lock").read_text()
    start = whole.index(f"{line}\n", whole.index("  slow:\n"))
    (repo / "dvc.lock").write_text(f"{whole[:start]}{line}\n")
    assert "'./dvc.lock' validation failed" in run("dvc repro", repo, check=False).stdout
    (said,) = mended(repo)
    assert said.startswith("dvc.lock was cut off after ")
    run("dvc repro", repo)
    assert small.log(repo) == []
    assert (repo / "dvc.lock").read_text() == whole


def test_both_sides_of_a_merge_are_a_persons_to_resolve(repo: Path) -> None:
    text = (repo / "dvc.lock").read_text()
    head, tail = text.split("  slow:\n")
    both = f"{head}<<<<<<< HEAD\n  slow:\n{tail}=======\n  slow:\n{tail}>>>>>>> other\n"
    (repo / "dvc.lock").write_text(both)
    with pytest.raises(UserError, match="both sides of a git merge"):
        mended(repo, quick=True)
    assert (repo / "dvc.lock").read_text() == both


MERGED = """\
stages:
  one:
    cmd: echo one >> log; mkdir -p data; grep one params.yaml > data/one; wc -l < log > data/one.json
    params: [one]
    outs: [data/one]
    metrics: [data/one.json: {cache: false}]
  two:
    cmd: echo two >> log; cat data/one > data/two; grep two params.yaml >> data/two; cp data/two data/two.json
    deps: [data/one]
    params: [two]
    outs: [data/two]
    metrics: [data/two.json: {cache: false}]
"""


def test_what_it_says_of_a_merge_runs_nothing_that_both_sides_have(tmp_path: Path) -> None:
    """`two` alone, which has the other side's `one` and this side's own setting; with `--ours dvc.lock` both ran again."""
    repo = tmp_path / "repo"
    repo.mkdir()
    person = "git config user.name t && git config user.email t@example.org"
    run(f"git init -q -b main && {person} && dvc init -q && dvc remote add -q -d store {tmp_path / 'store'}", repo)
    (repo / "dvc.yaml").write_text(MERGED)
    (repo / ".gitignore").write_text("log\n")
    for branch, text in (("main", "one: 1\ntwo: 1\n"), ("theirs", "one: 2\ntwo: 1\n"), ("ours", "one: 1\ntwo: 2\n")):
        if branch != "main":
            run(f"git switch -q -c {branch} main && dvc checkout -q", repo)
        (repo / "params.yaml").write_text(text)
        run(f"dvc repro -q && git add -A && git commit -qm {branch} && dvc push -q --run-cache", repo)
    (repo / "log").unlink()
    assert "CONFLICT" in run("git merge theirs", repo, check=False).stdout
    with pytest.raises(UserError) as error:
        mended(repo, quick=True)
    take, pull, *_ = re.findall(r"`((?:git|dvc) [^`]+)`", str(error.value))
    run(f"{take} && {pull}", repo)
    assert run("dvc status -q", repo, check=False).returncode == 0
    (repo / "params.yaml").write_text("one: 2\ntwo: 2\n")
    run("dvc repro -q && git add -A && git commit -qm merged", repo)
    assert (repo / "log").read_text() == "two\n"
    assert (repo / "data/two").read_text() == "one: 2\ntwo: 2\n"


@pytest.mark.parametrize(
    ("words", "command", "same"),
    [
        (["/v/python", "/home/Ann Lee/.venv/bin/dvc", "repro"], "/home/Ann Lee/.venv/bin/dvc repro", True),
        (["/v/python", "/v/bin/dvc", "repro", "a b"], "/v/bin/dvc repro a b", True),
        (["/v/python", "-m", "dvc", "repro"], "/v/site-packages/dvc/__main__.py repro", True),
        (["/v/python", "-m", "flows.pipeline", "sft"], "/home/Ann Lee/flows/pipeline.py sft", True),
        (["sleep", "60"], "/v/bin/dvc repro", False),
        (["/v/python", "/v/bin/dvc", "repro"], "/v/bin/dvc repro --force", False),
        (["/v/python", "/v/bin/other", "repro"], "/v/bin/dvc repro", False),
    ],
)
def test_a_process_is_told_by_what_it_was_started_as(words: list[str], command: str, same: bool) -> None:
    assert stages._started_as(command, words) is same


def test_dvc_stops_at_a_lock_file_that_is_cut_off(repo: Path) -> None:
    """While this passes, dvc (3.67.1) writes dvc.lock in place, and `mend` is needed."""
    text = (repo / "dvc.lock").read_bytes()
    (repo / "dvc.lock").write_bytes(text[: text.index(b"hash") + 2])
    assert "dvc.lock' is invalid" in run("dvc repro", repo, check=False).stdout
    assert '"w+"' in inspect.getsource(_common._dump_data)


@pytest.mark.parametrize("text", ["", '{"write": {"/x/one": {"pi'])
def test_a_cut_off_list_of_readers_and_writers(repo: Path, text: str) -> None:
    (repo / "in").write_text("other\n")
    (repo / ".dvc/tmp/rwlock").write_text(text)
    assert "JSON structure is corrupted" in run("dvc repro", repo, check=False).stdout  # while dvc does not mend it
    assert mended(repo, quick=True) == [".dvc/tmp/rwlock was cut off: removed, nobody holds anything"]
    run("dvc repro", repo)


def test_a_dead_holder_whose_number_lives_on(repo: Path) -> None:
    (repo / "in").write_text("other\n")
    sleeper = subprocess.Popen(["sleep", "60"])
    dead = {"pid": sleeper.pid, "cmd": "/x/dvc repro"}
    (repo / ".dvc/tmp/rwlock").write_text(json.dumps({"write": {str(repo / "one"): dead}, "read": {}}))
    try:
        assert "is busy" in run("dvc repro", repo, check=False).stdout  # while dvc looks at the number alone
        assert mended(repo, quick=True) == [".dvc/tmp/rwlock named processes that are gone: removed from it"]
        run("dvc repro", repo)
    finally:
        sleeper.kill()
        sleeper.wait()


def test_an_empty_entry_of_the_run_cache(repo: Path) -> None:
    """DVC makes the folder first and its file afterwards."""
    (repo / "params.yaml").write_text("slow: 2\n")
    run("dvc repro", repo)
    found = {p.parent for p in (repo / ".dvc/cache/runs").rglob("*") if p.is_file()}
    newest = max(found, key=lambda p: p.stat().st_mtime)
    for path in newest.iterdir():
        path.unlink()
    run("git checkout -q dvc.lock", repo)
    (repo / "two").unlink()
    assert run("dvc repro", repo, check=False).returncode != 0  # while dvc falls over it
    assert len(mended(repo, quick=True)) == 1
    run("dvc repro", repo)


def test_a_flipped_bit_in_the_cache(repo: Path) -> None:
    """DVC restores it, takes it for right, and hands it on; `mend` removes it, and the stage makes it again."""
    whole = (repo / "dvc.lock").read_bytes()
    cached = entry(repo, b"input\n")
    cached.chmod(0o644)
    flip(cached)
    cached.chmod(0o444)
    (repo / "one").unlink()
    assert run("dvc repro", repo).stdout.count("is cached - skipping run")
    assert (repo / "one").read_bytes() != b"input\n"
    assert run("dvc status -q", repo, check=False).returncode == 0  # while dvc trusts its cache
    said = mended(repo)
    assert len(said) == 2
    assert said[0].startswith("the cache's copy of ")
    assert "was damaged: removed" in said[0]
    assert said[1] == "one is not what `first` made: `dvc repro` puts it right"
    run("dvc repro", repo)
    assert (repo / "one").read_bytes() == b"input\n"
    assert (repo / "dvc.lock").read_bytes() == whole
    assert "first" in small.log(repo)
    assert mended(repo) == []


def test_a_missing_file_of_the_cache(repo: Path) -> None:
    whole = (repo / "dvc.lock").read_bytes()
    entry(repo, b"input\n").unlink()
    assert mended(repo) == []  # the outputs are there, and right
    (repo / "one").unlink()
    run("dvc repro", repo)
    assert small.log(repo)[0] == "first"
    assert (repo / "dvc.lock").read_bytes() == whole


def test_damage_to_a_former_run(repo: Path) -> None:
    (repo / "in").write_text("former\n")
    run("dvc repro", repo)
    (repo / "in").write_text("input\n")
    run("dvc repro", repo)
    flip_cached = entry(repo, b"former\n")
    flip_cached.chmod(0o644)
    flip(flip_cached)
    assert mended(repo) == []
    (said,) = mended(repo, every=True)
    assert said.startswith("the cache's copy of a former run (")
    assert not flip_cached.exists()


def test_an_output_that_was_damaged_here(repo: Path) -> None:
    """With its time unchanged, as a failing disk leaves it."""
    run("dvc status -q", repo)
    before = (repo / "two").stat()
    flip(repo / "two")
    os.utime(repo / "two", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run("dvc status -q", repo, check=False).returncode == 0
    assert mended(repo) == ["two is not what `slow` made: `dvc repro` puts it right"]
    assert run("dvc repro", repo).stdout.count("is cached - skipping run") == 1
    assert (repo / "two").read_bytes() == b"input\n"


def test_it_keeps_its_hands_off_while_another_dvc_works(repo: Path) -> None:
    (repo / "params.yaml").write_text("slow: 2\n")
    with small.held(repo):
        other = small.start(["dvc", "repro"], repo)
        small.pids(repo)
        with pytest.raises(UserError, match="another dvc works in this folder"):
            mended(repo)
    small.finish(other)
    assert mended(repo) == []


def test_as_a_program(repo: Path, tmp_path: Path) -> None:
    assert run("python -m flows.mend", repo).stdout == "mend: nothing is damaged\n"
    assert run("python -m flows.mend --quick", repo).stdout == ""
    flip(repo / "two")
    said = run("python -m flows.mend", repo).stdout.splitlines()
    assert said == ["mend: two is not what `slow` made: `dvc repro` puts it right", "mend: 1 put right"]
    done = run("python -m flows.mend", tmp_path, check=False)
    assert done.returncode == 1
    assert "no DVC repository here" in done.stdout
    shutil.rmtree(repo / ".dvc/cache")
    run("python -m flows.mend", repo)
