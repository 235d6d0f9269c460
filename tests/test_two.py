"""Two at once: one waits or fails at once with a clear message, and both workspaces end consistent.

Two flows, and a flow beside `dvc repro`, are in tests/test_flow.py.
"""

import hashlib
import re
from pathlib import Path

import pytest

from tests import small
from tests.conftest import ROOT, commit, fork, run

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.ran(tmp_path_factory.mktemp("two") / "repo")


@pytest.fixture
def repo(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return fork(done, tmp_path / "repo")


def sound(folder: Path) -> int:
    """How many objects a cache or a directory remote holds; each has the bytes that its name says."""
    files = [p for p in (folder / "files/md5").glob("??/*") if p.is_file()]
    for path in files:
        wanted = (path.parent.name + path.name).removesuffix(".dir")
        assert hashlib.md5(path.read_bytes()).hexdigest() == wanted, path
    return len(files)


def test_two_repros_in_one_folder(repo: Path) -> None:
    """The second ends at once, names the first, and leaves it alone."""
    (repo / "params.yaml").write_text("slow: 2\n")
    with small.held(repo):
        first = small.start(["dvc", "repro"], repo)
        small.pids(repo)
        second = run("dvc repro", repo, check=False)
        assert second.returncode != 0
        assert "is busy, it is being blocked by" in second.stdout
        assert f"(PID {first.pid})" in second.stdout
        assert "Traceback" not in second.stdout
        assert first.poll() is None
    small.finish(first)
    assert first.returncode == 0
    assert small.log(repo) == ["slow"]
    assert run("dvc status -q", repo, check=False).returncode == 0
    sound(repo / ".dvc/cache")


def test_a_push_during_a_repro(repo: Path, tmp_path: Path) -> None:
    """It pushes what is recorded, not what is half made."""
    run(f"dvc remote add -q -d --local store {tmp_path / 'store'}", repo)
    (repo / "params.yaml").write_text("slow: 2\n")
    with small.held(repo):
        repro = small.start(["dvc", "repro"], repo)
        small.pids(repo)
        run("dvc --wait-for-lock push --run-cache", repo)
        assert repro.poll() is None
        assert sound(tmp_path / "store") > 0
    small.finish(repro)
    assert repro.returncode == 0
    run("dvc push --run-cache", repo)
    sound(tmp_path / "store")
    assert run("dvc status -q -c", repo, check=False).returncode == 0


def test_two_clones_push_to_one_remote(repo: Path, tmp_path: Path) -> None:
    """What both have, and what each has alone; a third finds all of it."""
    other = fork(repo, tmp_path / "other")
    for folder, text in ((repo, "a\n"), (other, "b\n")):
        run(f"dvc remote add -q -d --local store {tmp_path / 'store'}", folder)
        (folder / "in").write_text(text * 2000)
        run("dvc repro -q", folder)
    both = [small.start(["dvc", "push", "--run-cache"], folder) for folder in (repo, other)]
    for process in both:
        said = small.finish(process)
        assert process.returncode == 0, said
    sound(tmp_path / "store")
    for folder in (repo, other):
        assert run("dvc status -q -c", folder, check=False).returncode == 0
        commit(folder, "mine")
        third = tmp_path / f"third-{folder.name}"
        run(f"git clone -q {folder} {third}", tmp_path)
        run(f"dvc remote add -q -d --local store {tmp_path / 'store'} && dvc pull -q --run-cache", third)
        run("dvc repro -q", third)
        assert small.log(third) == []
        assert (third / "report.md").read_bytes() == (folder / "report.md").read_bytes()


def test_two_clones_with_one_cache(repo: Path, tmp_path: Path) -> None:
    """Two `dvc repro` at the same time write the same cache files.

    One may fail: in the moment in which both record the same run, DVC 3.67.1 takes the other's unfinished file of the run cache
    for a damaged one and removes it (`dvc/stage/cache.py`, `_load_cache`); or it says that it will not
    remove an output unasked, seen twice and not traced. Either way the next call has to go on, and nothing may be broken.
    """
    other = fork(repo, tmp_path / "other")
    for folder in (repo, other):
        run(f"dvc cache dir --local {tmp_path / 'cache'}", folder)
        (folder / "in").write_text("both\n" * 2000)
    both = {folder: small.start(["dvc", "repro"], folder) for folder in (repo, other)}
    said = {folder: small.finish(process) for folder, process in both.items()}
    for folder, process in both.items():
        if process.returncode:
            known = (
                r"No such file or directory: '\S+/cache/runs/\S+\.tmp'|unable to remove '\S+' without a confirmation"
            )
            assert re.search(known, said[folder]), said[folder]
            run("dvc repro -q", folder, PYTHONPATH=str(ROOT))
    sound(tmp_path / "cache")
    for folder in (repo, other):
        assert run("dvc status -q", folder, check=False).returncode == 0
    assert (repo / "dvc.lock").read_bytes() == (other / "dvc.lock").read_bytes()
