"""A disk that is full, read-only or failing: named in one line, with what to do, and never the start of a wrong result."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests import small
from tests.conftest import ORDER, ROOT, edit, fork, run
from tests.namespaces import mounted
from tests.test_training import flip


@pytest.fixture(scope="module")
def repo(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fork(pipeline, tmp_path_factory.mktemp("disk") / "repo")


def stage_of(repo: Path, name: str) -> dict:
    return YAML(typ="safe").load(repo / "dvc.lock")["stages"][name]


def size_of(path: Path) -> int:
    return sum(p.stat().st_size for p in [path, *path.rglob("*")] if p.is_file())


def test_the_disk_is_full_in_the_middle_of_each_stage(repo: Path) -> None:
    """Room for half of what it writes: no stage ends well, none with a traceback, and each says what to do."""

    def ended(name: str) -> str:
        outs = [Path(out["path"]) for out in stage_of(repo, name)["outs"]]
        room = max(1, sum(size_of(repo / path) for path in outs) // 2 // 4096)
        command = mounted(Path("data", name.split("@")[0]), f"size={4 * room}k", stage_of(repo, name)["cmd"])
        done = run(command, repo, check=False, OMP_NUM_THREADS="1")
        said = f"{name.split('@')[0]}: the disk is full: "
        wrong = done.returncode == 0 or "Traceback" in done.stdout or said not in done.stdout
        return f"{name}: {done.stdout[-2000:]}" if wrong else ""

    before = (repo / "dvc.lock").read_bytes()
    with ThreadPoolExecutor(2) as pool:
        assert [said for said in pool.map(ended, ORDER) if said] == []
    assert (repo / "dvc.lock").read_bytes() == before
    assert run("dvc status -q", repo, check=False).returncode == 0


def test_the_disk_is_full_while_a_checkpoint_is_written(repo: Path) -> None:
    shutil.rmtree(repo / ".checkpoints", ignore_errors=True)  # of the stage that found the disk full above
    (repo / ".checkpoints").mkdir()
    done = run(mounted(Path(".checkpoints"), "size=64k", stage_of(repo, "sft")["cmd"]), repo, check=False)
    (repo / ".checkpoints").rmdir()
    assert done.returncode == 1
    assert "sft: the disk is full: " in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize("name", ["split", "report"])
def test_a_folder_that_is_read_only(repo: Path, name: str) -> None:
    done = run(mounted(Path("data", name), "ro", stage_of(repo, name)["cmd"]), repo, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith(f"{name}: Read-only file system: data/{name}/")
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize("kilobytes", [0, 8, 160, 280])
def test_the_disk_is_full_for_dvc_itself(tmp_path: Path, kilobytes: int) -> None:
    """Before it begins, while it locks, copies into the cache, or writes dvc.lock: with room again, nothing is lost."""
    made = small.make(tmp_path / "made")
    (made / "in").write_bytes(os.urandom(100_000).hex().encode())
    (tmp_path / "repo").mkdir()
    (tmp_path / "script").write_text(f"""
cp -a made/. repo; cd repo
free=$(df --output=avail -k . | tail -1)
head -c $(((free - {kilobytes}) * 1024)) /dev/zero > filler
dvc repro > ../first 2>&1; echo $? >> ../codes
rm filler
python -m flows.mend --quick > ../mended
dvc repro > ../second 2>&1; echo $? >> ../codes
dvc status -q; echo $? >> ../codes
cp -a . ../after
""")
    run(mounted(Path("repo"), "size=16m", "sh script"), tmp_path, PYTHONPATH=str(ROOT))
    first, second, status = (tmp_path / "codes").read_text().split()
    assert first != "0"
    said = (tmp_path / "first").read_text()
    assert "No space left on device" in said or "database or disk is full" in said
    assert (second, status) == ("0", "0"), (tmp_path / "second").read_text()
    other = fork(made, tmp_path / "other")
    run("dvc repro", other, PYTHONPATH=str(ROOT))
    for name in ("dvc.lock", "one", "two", "report.md"):
        assert (tmp_path / "after" / name).read_bytes() == (other / name).read_bytes()


def harmed(repo: Path, path: str) -> None:
    """A file, in the cache and here, as a failing disk leaves it: DVC sees the same time, size and inode."""
    file = repo / path
    before = file.stat()
    flip(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_damaged_input_is_named_and_not_used(repo: Path, tmp_path: Path) -> None:
    here = fork(repo, tmp_path / "repo")
    run("dvc status -q", here)
    lock = (here / "dvc.lock").read_bytes()
    harmed(here, "data/base/model/model.safetensors")
    assert run("dvc status -q", here, check=False).returncode == 0  # while DVC trusts what it remembers
    edit(here, "merge", "prompts", 6)
    done = run("dvc repro", here, check=False)
    assert done.returncode != 0
    assert "merge: data/base/model is not what `base` made: dvc.lock says " in done.stdout
    assert "python -m flows.mend" in done.stdout
    assert "Traceback" not in done.stdout
    assert (here / "dvc.lock").read_bytes() == lock
    said = run("python -m flows.mend", here).stdout
    assert "mend: data/base/model/model.safetensors is not what `base` made: `dvc repro` puts it right" in said
    edit(here, "merge", "prompts", 8)
    run("dvc repro", here)
    assert (here / "dvc.lock").read_bytes() == lock
    for path in ("data/base/model/model.safetensors", "data/merge/model/model.safetensors"):
        assert (here / path).read_bytes() == (repo / path).read_bytes()


@pytest.mark.parametrize("path", ["data/base/model/model.safetensors", "data/dpo/adapter/adapter_model.safetensors"])
def test_weights_that_are_cut_off(repo: Path, tmp_path: Path, path: str) -> None:
    """By hand, without DVC, which would see it."""
    here = fork(repo, tmp_path / "repo")
    os.truncate(here / path, size_of(here / path) - 100)
    done = run(stage_of(here, "merge")["cmd"], here, check=False)
    assert done.returncode == 1
    last = done.stdout.strip().splitlines()[-1]
    assert path in last
    assert ": cut off, or not what it says; remove it and run `dvc repro`" in last
    assert "Traceback" not in done.stdout
