"""What a retrain takes from a checkout and what it refuses, on a plain git repository."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import retrain
from flows.retrain import Place
from tasks.params import UserError
from tests.conftest import commit, run


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A checkout of main with one file of data, committed."""
    folder = tmp_path / "repo"
    (folder / "data/raw").mkdir(parents=True)
    run("git init -q -b main && git config user.name t && git config user.email t@example.org", folder)
    (folder / "params.yaml").write_text("seed: 1\n")
    (folder / "data/raw/a.txt").write_text("one\n")
    commit(folder, "one")
    return folder


def data(repo: Path, name: str, text: str) -> Path:
    """A file that came an hour ago."""
    path = repo / "data/raw" / name
    path.write_text(text)
    aged(path)
    return path


def aged(path: Path) -> None:
    os.utime(path, (time.time() - 3600,) * 2)


def elsewhere(repo: Path, name: str, text: str) -> str:
    """A commit with another text of this file, on a branch that is not checked out."""
    run("git switch -q -c theirs", repo)
    (repo / "data/raw" / name).write_text(text)
    commit(repo, "theirs")
    run("git switch -q main", repo)
    return run("git rev-parse theirs", repo).stdout.strip()


def take(repo: Path, tip: str = "HEAD") -> tuple[list[str], list[str]]:
    """(what is taken for a run on `tip`, what is said), in a worktree of its own."""
    tree, lines = Path(tempfile.mkdtemp(dir=repo.parent)), list[str]()
    run(f"git worktree add -q --detach {tree} {tip}", repo)
    taken = retrain._take(Place(repo, tree, retrain.DEFAULTS, None, lines.append), tip)
    assert all((tree / path).read_bytes() == (repo / path).read_bytes() for path in taken)
    return taken, lines


class Clock:
    """Time that passes only while somebody sleeps, and what happens meanwhile."""

    def __init__(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        self.now = 1_000_000_000.0
        self.slept: list[float] = []
        self.meanwhile = meanwhile

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        self.meanwhile()


def test_new_and_edited_files_are_taken_and_a_deletion_is_not(repo: Path) -> None:
    data(repo, "c.txt", "three\n")
    commit(repo, "three")
    data(repo, "a.txt", "edited\n")
    data(repo, "b.txt", "new\n")
    (repo / "data/raw/c.txt").unlink()
    assert take(repo) == (["data/raw/a.txt", "data/raw/b.txt"], ["new data: data/raw/a.txt, data/raw/b.txt"])


@pytest.mark.parametrize("name", ["a.txt", "b.txt"], ids=["edited by both", "added by both"])
def test_conflicts_are_refused(repo: Path, name: str) -> None:
    elsewhere(repo, name, "theirs\n")
    (repo / "data/raw" / name).write_text("mine\n")
    commit(repo, "mine")
    assert run("git merge theirs", repo, check=False).returncode == 1
    aged(repo / "data/raw" / name)
    with pytest.raises(UserError, match=rf"^data/raw/{name}: has merge conflicts; resolve them first$"):
        take(repo)


@pytest.mark.parametrize("name", ["file.txt", "folder"])
def test_a_link_is_refused(repo: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("away\n")
    aged(tmp_path / "file.txt")
    (repo / "data/raw" / name).symlink_to(tmp_path / name)
    with pytest.raises(UserError, match=rf"^data/raw/{name}: a link, which others can't follow; use `dvc import-url`"):
        take(repo)


def test_what_is_too_large_for_git_is_refused(repo: Path) -> None:
    path = data(repo, "b.txt", "")
    os.truncate(path, 50 * 2**20)
    aged(path)
    assert take(repo)[0] == ["data/raw/b.txt"]
    os.truncate(path, 50 * 2**20 + 1)
    aged(path)
    with pytest.raises(
        UserError, match=r"^data/raw/b\.txt: 50 MiB are too much for git; use `dvc add data/raw/b\.txt`"
    ):
        take(repo)


@pytest.mark.parametrize(
    ("age", "slept"),
    [(3600, []), (5, []), (4.95, [0.1]), (2, [3.0]), (0, [5.0]), (-60, [65.0]), (-61, [])],
)
def test_a_file_that_just_came_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float, slept: list[float]
) -> None:
    """Of a clock that runs ahead by more than a minute nothing is believed."""
    clock = Clock()
    monkeypatch.setattr(retrain, "time", clock)
    path = tmp_path / "b.txt"
    path.touch()
    os.utime(path, (clock.now - age,) * 2)
    assert retrain._is_quiet(path)
    assert clock.slept == slept


def test_a_file_that_is_being_written_is_left_for_the_next_run(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = data(repo, "b.txt", "half of it\n")
    clock = Clock(lambda: os.utime(path, (clock.now,) * 2))
    clock.meanwhile()
    monkeypatch.setattr(retrain, "time", clock)
    assert take(repo) == ([], ["data/raw/b.txt: still being written, left for the next run"])
    assert clock.slept == [5.0] * 12
    clock.meanwhile = lambda: None  # it is done
    assert take(repo) == (["data/raw/b.txt"], ["new data: data/raw/b.txt"])


def test_a_file_that_is_written_to_while_it_is_read_is_refused(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copyfile(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:-1])

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    data(repo, "b.txt", "new\n")
    with pytest.raises(UserError, match=r"^data/raw/b\.txt: was written to while it was read; start the run again$"):
        take(repo)


@pytest.mark.parametrize("name", ["a.txt", "b.txt"], ids=["edited there", "added there"])
def test_an_edit_of_an_older_file_than_the_branchs_is_refused(repo: Path, name: str) -> None:
    tip = elsewhere(repo, name, "theirs\n")
    data(repo, name, "mine\n")
    with pytest.raises(
        UserError, match=rf"^data/raw/{name}: changed here and on main; commit it or take it back, then merge$"
    ):
        take(repo, tip)
    data(repo, name, "theirs\n")  # what the branch has already
    assert take(repo, tip) == ([], [])
