"""HEAD with some parameters changed, in a git worktree of its own that shares this repository's DVC cache and run cache.

`flows.sweep` and `flows.experiments` run their points in these. Why not DVC's queue: docs/decisions/0007-flow.md.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from configobj import ConfigObj  # type: ignore[import-untyped]  # of dvc, which writes its config with it
from ruamel.yaml import YAML

from tasks.params import UserError

# options of a DVC remote that are paths, which DVC reads relative to its config file (Config._map_dirs)
PATHS = (
    "url", "gdrive_user_credentials_file", "gdrive_service_account_json_file_path", "credentialpath", "configpath",
    "keyfile", "cert_path", "key_path",
)  # fmt: skip


# no hooks: `dvc install` leaves one that `git worktree add` runs, and DVC does not yet work there
GIT = ("git", "-c", f"core.hooksPath={os.devnull}")


def settings(repo: Path) -> Any:
    """params.yaml of HEAD, unchecked: what a point without any change runs with."""
    return YAML(typ="safe", pure=True).load(command(["git", "show", "HEAD:params.yaml"], repo))


def change(raw: Any, values: Mapping[str, Any]) -> None:
    """Set dotted keys (`dpo.beta`, `ingest.sources.0.terms`, `quantization`) in the content of a params.yaml.

    Raises:
        UserError: naming the key that has no place there.
    """
    for key, value in values.items():
        *parents, leaf = key.split(".")
        node = raw
        for parent in parents:
            place = _place(node, parent, key)
            node = node.get(place) if isinstance(node, dict) else node[place]
        node[_place(node, leaf, key)] = value


def _place(node: Any, part: str, key: str) -> str | int:
    if isinstance(node, dict):
        return part
    if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
        return int(part)
    raise UserError(f"{key}: params.yaml has no section that holds `{part}`")


@contextlib.contextmanager
def worktree(repo: Path, folder: Path, values: Mapping[str, Any]) -> Iterator[Path]:
    """A checkout of HEAD at `folder` with `values` in its params.yaml; it stays if the body fails, and is taken up again.

    What was begun for another HEAD goes on too: a checkpoint is found only by a run with the same inputs.

    Raises:
        UserError: git or DVC refuses.
    """
    head = command(["git", "rev-parse", "HEAD"], repo)
    command(["git", "worktree", "prune"], repo)
    found = _head(repo, folder)
    kept = folder.with_name(f"{folder.name}.checkpoints")
    if found is None:
        if (folder / ".checkpoints").is_dir() and not kept.exists():
            (folder / ".checkpoints").rename(kept)
        shutil.rmtree(folder, ignore_errors=True)
        command([*GIT, "worktree", "add", "--detach", str(folder), head], repo)
    elif found != head:
        command([*GIT, "checkout", "--force", "--detach", head], folder)
        for event in folder.glob("data/*/event*.json"):  # of runs that dvc.lock no longer speaks of
            event.unlink()
    if kept.is_dir() and not (folder / ".checkpoints").exists():
        kept.rename(folder / ".checkpoints")
    cache = command([sys.executable, "-m", "dvc", "cache", "dir"], repo)
    write_config(local_config(repo, folder), folder)
    command([sys.executable, "-m", "dvc", "cache", "dir", "--local", cache], folder)
    # what stages read but none makes; what is not in the cache here is what the pipeline makes or pulls
    subprocess.run([sys.executable, "-m", "dvc", "checkout", "-q"], cwd=folder, capture_output=True)
    yaml = YAML()
    yaml.preserve_quotes = True
    raw = yaml.load(folder / "params.yaml")
    change(raw, values)
    yaml.dump(raw, folder / "params.yaml")
    yield folder
    command(["git", "worktree", "remove", "--force", str(folder)], repo)


def _head(repo: Path, folder: Path) -> str | None:
    """The commit of a worktree of `repo` at `folder`; None if there is none, or it is one of another place.

    Of a repository that was moved or copied, worktrees still name the old place: git knows none of them there any more, or
    works in those of the original.
    """
    words = ["git", "rev-parse", "--path-format=absolute", "--git-common-dir"]
    if not (folder / ".git").exists():
        return None
    try:
        common, head = command([*words, "HEAD"], folder).splitlines()
    except (UserError, ValueError):
        return None
    return head if os.path.samefile(common, command(words, repo)) else None


def local_config(repo: Path, tree: Path) -> Any:
    """`.dvc/config.local` for a worktree of `repo`: its own, with remotes and credentials, and paths that would mean another
    place there."""
    home = repo / ".dvc"
    local = config(home / "config.local")
    for source in (config(tree / ".dvc" / "config"), config(home / "config.local")):
        for name, section in source.items():
            for option in PATHS if name.strip("'").startswith("remote ") else ():
                value = section.get(option)
                if isinstance(value, str) and value and not re.match(r"\w+://|~", value) and not os.path.isabs(value):
                    own = local.setdefault(name, {})
                    if option not in own or own[option] == value:
                        own[option] = os.path.normpath(home / value)
    return local


def write_config(local: Any, tree: Path) -> None:
    """For nobody else to read: credentials are in it."""
    local.filename = str(tree / ".dvc" / "config.local")
    Path(local.filename).touch(mode=0o600)
    local.write()


def config(path: Path) -> Any:
    """A DVC config file, as far as it is there; quoted as DVC does, for a path may hold `#` or a comma."""
    return ConfigObj(str(path), interpolation=False, encoding="utf-8")


def edited(repo: Path, more: Sequence[str] = ("data/raw",)) -> str:
    """What differs from HEAD of the files that a run reads, by name; a worktree of HEAD does not have it."""
    paths = ["params.yaml", "dvc.yaml", "tasks", "data/model", "data/harness", *more]
    lines = command(["git", "-c", "core.quotePath=false", "status", "--porcelain", "--", *paths], repo).splitlines()
    names = [line.strip().partition(" ")[2].strip() for line in lines]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def command(words: list[str], cwd: Path) -> str:
    """What git or dvc prints.

    Raises:
        UserError: it refuses, in its own words.
    """
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True)  # noqa: S603  (git and dvc)
    if done.returncode != 0:
        raise UserError(f"{' '.join(words[-4:])}: {' '.join(done.stderr.split())[:300]}")
    return done.stdout.strip()
