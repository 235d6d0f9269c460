"""mend: find and put right what a kill, a full disk or a failing one left behind, which DVC takes for good or stops at.

    python -m flows.mend            all of dvc.lock: the files that stop DVC, then every output in the cache and here
    python -m flows.mend --quick    only the files that stop DVC: what `make run` begins with
    python -m flows.mend --all      also what the cache holds of former runs

DVC 3.67.1 writes dvc.lock and .dvc/tmp/rwlock in place: killed, or with the disk full, it leaves them cut off, and from then
on stops with "corrupted". A number in rwlock that another process has by now blocks it too, as does an empty folder in the
run cache. And it trusts the files of its cache without reading them: see docs/decisions/0008-damage.md.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from flows import stages
from flows.stages import Log
from tasks.params import UserError

OBJECT = re.compile(r"[0-9a-f]{2}/[0-9a-f]{30}(?:\.dir)?")
BLOCK = re.compile(r"^  \S.*:\n(?:   .*\n)*", re.MULTILINE)  # a stage in dvc.lock


def mend(repo: Path, log: Log, *, quick: bool = False, every: bool = False) -> int:
    """Put right what is damaged and `log` a line for each; returns how much that was.

    Args:
        quick: only what stops DVC; takes no longer than a second.
        every: also the files of the cache that dvc.lock does not name.

    Raises:
        UserError: no DVC repository, or another `dvc` works in it.
    """
    if not (repo / ".dvc").is_dir():
        raise UserError(f"{repo}: no DVC repository here")
    said: list[str] = []
    with _locked(repo):
        said += [*_lock_file(repo), *_holders(repo)]
        if stages.busy(repo):
            raise UserError("another dvc works in this folder: wait for its end, then run this again")
        cache = _cache(repo)
        said += _run_cache(cache)
        if not quick:
            outs = _outs(repo)
            said += [*_objects(cache, outs, every), *_workspace(repo, cache, outs)]
    for line in said:
        log(line)
    return len(said)


@contextlib.contextmanager
def _locked(repo: Path) -> Iterator[None]:
    """DVC's own repository lock, without waiting: it is held while DVC reads and writes, not while a stage runs."""
    (repo / ".dvc/tmp").mkdir(exist_ok=True)
    with (repo / ".dvc/tmp/lock").open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("another dvc works in this folder: wait for its end, then run this again") from None
        yield


def _lock_file(repo: Path) -> Iterator[str]:
    """A dvc.lock that is cut off: its whole stages stay, those cut off come from the last commit or are run anew.

    What is not in it DVC takes from the run cache, if it ran before.
    """
    path = repo / "dvc.lock"
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    if re.search(r"^(<{7}|>{7}) ", text, re.MULTILINE):
        raise UserError(
            "dvc.lock holds both sides of a git merge: take theirs of all that belongs together (`git checkout MERGE_HEAD -- "
            "dvc.lock params.yaml data`, in a rebase `HEAD`), `dvc pull --run-cache`, make your change to params.yaml again, then "
            "`dvc repro`"
        )
    with contextlib.suppress(yaml.YAMLError):
        if text.endswith("\n") and stages.whole(yaml.load(text, yaml.CSafeLoader)):
            return
    git = subprocess.run(["git", "show", "HEAD:./dvc.lock"], cwd=repo, capture_output=True, text=True)  # noqa: S607
    kept = BLOCK.findall(text)[:-1]  # nobody knows whether the last one is whole
    committed = BLOCK.findall(git.stdout) if git.returncode == 0 else []
    names = {_name(block) for block in kept}
    blocks = [*kept, *(block for block in committed if _name(block) not in names)]
    if blocks:
        temporary = path.with_name("dvc.lock.tmp")
        temporary.write_text("schema: '2.0'\nstages:\n" + "".join(blocks), encoding="utf-8")
        temporary.replace(path)
    else:
        path.unlink()
    yield f"dvc.lock was cut off after {len(kept)} stages: put together again, with {len(blocks) - len(kept)} from the last commit"


def _name(block: str) -> str:
    return block.partition(":\n")[0].strip()


def _holders(repo: Path) -> Iterator[str]:
    """Who reads and writes what, of `dvc` processes that are gone."""
    path = repo / ".dvc/tmp/rwlock"
    if not path.is_file():
        return
    try:
        before = json.loads(path.read_text())
    except ValueError:
        path.unlink()
        yield f"{path.relative_to(repo)} was cut off: removed, nobody holds anything"
        return
    stages.drop_dead_holders(repo)
    if json.loads(path.read_text()) != before and (before.get("write") or before.get("read")):
        yield f"{path.relative_to(repo)} named processes that are gone: removed from it"


def _cache(repo: Path) -> Path:
    done = subprocess.run([sys.executable, "-m", "dvc", "cache", "dir"], cwd=repo, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"dvc cache dir: {done.stderr.strip().splitlines()[-1]}")
    return repo / done.stdout.strip()


def _run_cache(cache: Path) -> Iterator[str]:
    for path in sorted((cache / "runs").glob("??/*")):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
            yield f"run cache: the empty entry {path.name[:8]}… is removed"


def _outs(repo: Path) -> dict[str, tuple[str, str]]:
    """path → (MD5, stage) of what dvc.lock records."""
    path = repo / "dvc.lock"
    found = (yaml.load(path.read_text(), yaml.CSafeLoader) or {}) if path.is_file() else {}
    return {
        out["path"]: (out["md5"], name)
        for name, entry in (found.get("stages") or {}).items()
        for out in entry.get("outs", ())
        if "md5" in out
    }


def _objects(cache: Path, outs: dict[str, tuple[str, str]], every: bool) -> Iterator[str]:
    """Files of the cache whose bytes are not those that their name says: removed, so that nothing is restored from them."""
    folder = cache / "files/md5"
    owners: dict[str, str] = {}
    for path, (md5, _) in outs.items():
        owners[md5] = path
        for name, inner in _listing(folder, md5).items():
            owners[inner] = f"{path}/{name}"
    names = {_place(folder, md5) for md5 in owners}
    if every:
        names |= {p for p in folder.glob("??/*") if OBJECT.fullmatch(p.relative_to(folder).as_posix())}
    for file in sorted(names):
        if not file.is_file():
            continue
        md5 = file.parent.name + file.name
        if _md5(file) != md5.removesuffix(".dir"):
            file.unlink()  # of its folder this needs the right, of a colleague's file none
            owner = owners.get(md5, "a former run")
            yield f"the cache's copy of {owner} ({md5[:8]}…) was damaged: removed; `dvc pull` fetches it, or `dvc repro` makes it again"


def _workspace(repo: Path, cache: Path, outs: dict[str, tuple[str, str]]) -> Iterator[str]:
    """Outputs whose bytes are not those of dvc.lock. DVC remembers hashes by time and size: a new time lets it look."""
    for path, (md5, stage) in outs.items():
        listing = _listing(cache / "files/md5", md5) if md5.endswith(".dir") else {"": md5}
        for name, wanted in listing.items():
            file = repo / path / name if name else repo / path
            if file.is_file() and _md5(file) != wanted:
                os.utime(file)
                yield f"{file.relative_to(repo)} is not what `{stage}` made: `dvc repro` puts it right"


def _listing(folder: Path, md5: str) -> dict[str, str]:
    """name → MD5 of the files of a cached folder; {} for a file, and where it can't be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if md5.endswith(".dir"):
            return {entry["relpath"]: entry["md5"] for entry in json.loads(_place(folder, md5).read_bytes())}
    return {}


def _place(folder: Path, md5: str) -> Path:
    return folder / md5[:2] / md5[2:]


def _md5(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def main() -> None:
    doc: Any = __doc__
    parser = argparse.ArgumentParser(
        prog="python -m flows.mend", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only what stops DVC")
    parser.add_argument("--all", action="store_true", help="also what the cache holds of former runs")
    arguments = parser.parse_args()
    try:
        found = mend(
            Path.cwd(), lambda line: print(f"mend: {line}", flush=True), quick=arguments.quick, every=arguments.all
        )
    except UserError as error:
        sys.exit(f"mend: {error}")
    if not arguments.quick:
        print(f"mend: {found} put right" if found else "mend: nothing is damaged")


if __name__ == "__main__":
    main()
