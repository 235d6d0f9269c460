"""Retraining that can be left alone: fresh data, the pipeline, the gate, and a promotion or nothing.

    python -m flows.retrain [--branch main] [--no-push] [--no-refresh] …

Everything happens in a git worktree of the branch's tip, below `.dvc/tmp`, which shares DVC's cache with this repository. A
challenger that passes the gate (see docs/gate.md) is committed, tagged and pushed, its artifacts first; otherwise nothing
moves, and the reason is an artifact and an event. Exit code: 0 promoted or nothing new, 3 rejected, 1 an error.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.events import emit_event
from prefect.states import Cancelled, Completed, Failed
from pydantic import BaseModel, ConfigDict, Field
from ruamel.yaml import YAML

from flows import gate, stages, worktrees
from flows.pipeline import UNREACHABLE, cancelled, finish, pipeline
from flows.stages import StageTransient, Stopped
from tasks.params import Gate, UserError

SUBJECT, BASE = "evaluate@dpo", "evaluate@base"  # whose answers the gate reads
ARTIFACT, STAGE = "assistant", "prod"  # of dvc.yaml, and the stage that GTO assigns
RAW = "data/raw"
LARGEST = 50 * 2**20  # bytes; a larger file belongs to DVC, not into git
QUIET = 5.0  # seconds without a write after which a file counts as complete
NETWORK_SECONDS = 600.0  # for git; artifacts may take as long as they need
SECRET = re.compile(r"secret|password|token|access_key|account_key|sas|connection_string|passphrase|custom_auth_header")
GIT_TRANSIENT = re.compile(
    r"Could not resolve host|Failed to connect|Connection (?:refused|reset|timed out)|early EOF|RPC failed"
)
# a remote that does not let this account push there: GitHub, GitLab, Gitea, Bitbucket, or a hook
REFUSED = re.compile(r"protected branch|hook declined|push declined|rule violations", re.IGNORECASE)
# git's own words, no question that nobody answers, and no hooks: those are for people at work
GIT = (
    "env", "LC_ALL=C", "GIT_TERMINAL_PROMPT=0", "git", "-c", f"core.hooksPath={os.devnull}", "-c", "core.quotePath=false",
)  # fmt: skip


class RetrainParameters(BaseModel):
    """What a run of `retrain` can be told; a remote is given by its name, never by an address with a password in it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    repo: Path | None = Field(None, description="folder of the repository; empty: where the flow runs")
    branch: str = Field(
        "main",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$",
        description="branch that the champion is on and a promoted model goes to",
    )
    refresh: bool = Field(
        True, description="update imports, and take new files below data/raw from the checkout of the branch"
    )
    targets: list[str] | None = Field(
        None, min_length=1, description="stages to bring up to date, `evaluate` among them; empty: every stage"
    )
    push: bool = Field(True, description="publish what is promoted, where there are remotes: dvc push, then git push")
    git_remote: str = Field(
        "origin", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the git remote to follow and to push to"
    )
    dvc_remote: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the DVC remote; empty: DVC's default"
    )
    timeout: float | None = Field(
        None, gt=0, description="seconds that one stage may take; empty: its own limit, or none"
    )
    gpu: str = Field("gpu", min_length=1, description="concurrency limit that GPU stages hold")


DEFAULTS = RetrainParameters.model_validate({})


class MovedOn(UserError):
    """Somebody else moved the branch: what was made on its old tip can't go there."""


class Busy(UserError):
    """Another retrain runs in this repository."""


@dataclass(frozen=True)
class Place:
    """Where a run works and where its result goes."""

    main: Path  # the user's repository
    tree: Path  # the worktree
    params: RetrainParameters
    remote: str | None  # of git; None: nothing is fetched or pushed
    write: Callable[[str], None]

    @property
    def branch(self) -> str:
        return self.params.branch

    @property
    def pending(self) -> str:
        """Points to a promotion from its commit until it is where it belongs, so that an interrupted run is finished."""
        return f"refs/reforge/retrain/{self.branch}"

    def redact(self, text: str) -> str:
        """`text` without what could open a door: passwords in addresses, secrets of DVC's local config."""
        text = re.sub(r"://[^/@\s]+@", "://***@", text)
        for section in worktrees.config(self.main / ".dvc" / "config.local").values():
            for option, value in section.items() if isinstance(section, dict) else ():
                for word in value if isinstance(value, list) else [value]:
                    if SECRET.search(option) and isinstance(word, str) and len(word) > 3:
                        text = text.replace(word, "***")
        return text

    def log(self, line: str) -> None:
        self.write(self.redact(line))


@flow(name="retrain", validate_parameters=True)
def retrain(params: RetrainParameters = DEFAULTS) -> Any:
    """Bring the branch's model up to date with data and code, and promote it if the gate lets it through.

    Ends *Promoted*, *Rejected* or *Cached* (nothing new), all of type Completed, or *Failed* with one line.
    """
    logger = get_run_logger()
    place: Place | None = None
    try:
        main = _top(params.repo)
        with _alone(main):
            names = _git(main, "remote").split()
            remote = params.git_remote if params.push and params.git_remote in names else None
            if params.push and params.git_remote not in names and params.git_remote != DEFAULTS.git_remote:
                raise UserError(f"{params.git_remote}: no such git remote; there are: {', '.join(names) or 'none'}")
            tree = main / ".dvc" / "tmp" / "retrain" / "tree"
            place = Place(main, tree, params, remote, logger.info)
            return _run(place)
    except Stopped:
        return Cancelled(message="stopped; what was running has been ended, nothing was moved")
    except Busy as error:
        # After an outage all nights that were missed start at once. (A concurrency limit of the deployment would cancel them
        # too, but ends the run that holds it when the server is away for some seconds, prefect 3.8.8.)
        context = FlowRunContext.get()
        scheduled = context is not None and context.flow_run is not None and context.flow_run.auto_scheduled
        return (Cancelled if scheduled else Failed)(message=str(error))
    except UserError as error:
        return Failed(message=place.redact(str(error)) if place else str(error))


def _run(place: Place) -> State[Any]:
    _check_identity(place.main)
    _note_edits(place)
    tip, published = _tip(place)
    tip, finished = _finish_interrupted(place, tip, published)
    if finished and published:
        published = tip
    with _worktree(place, tip):
        shared = _dvc_remote(place)
        limits = _limits(place.tree)
        graph = {planned.name: planned for planned in stages.plan(place.tree, place.params.targets)}
        paths = {name: _answers(graph, name) for name in (SUBJECT, BASE)}
        taken: list[str] = []
        if place.params.refresh:
            taken = _take(place, tip)
            if imports := [name for name, planned in graph.items() if planned.imported]:
                _network(place, ["dvc", "--wait-for-lock", "update", *imports])
        _network(place, ["dvc", "--wait-for-lock", "checkout", "--quiet", "--allow-missing"])
        if shared and any(planned.changed for planned in stages.plan(place.tree, place.params.targets)):
            _network(place, ["dvc", "--wait-for-lock", "pull", "--run-cache", "--allow-missing"])
        champion = _champion(place.tree, paths[SUBJECT])
        before = _lock(place.tree)
        done: Any = pipeline(
            repo=place.tree,
            targets=place.params.targets,
            pull=shared is not None,
            timeout=place.params.timeout,
            gpu=place.params.gpu,
            return_state=True,
        )
        if not done.is_completed():
            return (Cancelled if done.is_cancelled() else Failed)(message=done.message)
        made = _made(place, taken)
        if not made:
            return Completed(
                name="Promoted" if finished else "Cached", message=f"{finished}nothing new: {done.message}"
            )
        challenger, base = (gate.read(place.tree / paths[name]) for name in (SUBJECT, BASE))
        verdict = gate.decide(champion, challenger, base, limits)
        verdict = dataclasses.replace(verdict, notes=(*verdict.notes, *_scored_differently(before, _lock(place.tree))))
        with contextlib.suppress(*UNREACHABLE):  # the verdict holds all the same
            create_markdown_artifact(verdict.markdown(), key="gate", description=verdict.sentence)
        if not verdict.promoted:
            _emit(place, "rejected", tip, verdict)
            return Completed(name="Rejected", message=finished + verdict.sentence, data=verdict)
        if cancelled():
            raise Stopped
        commit = _commit(place, made, verdict)
        said = _publish(place, commit, published, shared)
        _emit(place, "promoted", commit, verdict)
        return Completed(name="Promoted", message=f"{finished}{verdict.sentence} {said}", data=verdict)


def _emit(place: Place, what: str, commit: str, verdict: gate.Verdict) -> None:
    emit_event(
        f"reforge.retrain.{what}",
        resource={
            "prefect.resource.id": f"reforge.branch.{place.branch}",
            "prefect.resource.name": f"{place.main.name} {place.branch}",
        },
        payload={
            "branch": place.branch,
            "commit": commit,
            "sentence": verdict.sentence,
            "limits": [dataclasses.asdict(row) for row in verdict.rows],
            "markdown": verdict.markdown(),
        },
    )


# --- the repository, and who works in it


def _top(repo: Path | None) -> Path:
    folder = (repo or Path.cwd()).resolve()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    top = Path(_git(folder, "rev-parse", "--show-toplevel"))
    if not (top / ".dvc").is_dir():
        raise UserError(f"{top}: no DVC repository here (no .dvc)")
    return top


@contextlib.contextmanager
def _alone(main: Path) -> Iterator[None]:
    """The only retrain in this repository and its worktrees. The kernel frees the lock, however the holder ends.

    Raises:
        Busy: another one runs.
    """
    common = Path(_git(main, "rev-parse", "--path-format=absolute", "--git-common-dir"))
    with (common / "reforge-retrain.lock").open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise Busy(
                f"another retrain (process {handle.read() or 'unknown'}) runs in this repository; nothing was done"
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def _check_identity(main: Path) -> None:
    """A run of hours must not fail at its commit."""
    for who in ("AUTHOR", "COMMITTER"):
        for name in ("name", "email"):
            if not _git(main, "config", f"user.{name}", check=False) and not os.environ.get(
                f"GIT_{who}_{name.upper()}"
            ):
                raise UserError(
                    f"git knows no user.{name}: set it (git config user.{name} …), promotions are committed with it"
                )
    if _git(main, "config", "--type=bool", "commit.gpgsign", check=False) == "true":
        try:
            _git(main, "commit-tree", "-S", "-m", "whether it can be signed", _git(main, "mktree"))
        except UserError as error:
            raise UserError(
                "commit.gpgsign is on, and git can't sign here, as promotions would have to be: give this account a key that "
                f"asks nobody, or switch it off in this clone (git config commit.gpgsign false); {error}"
            ) from None


def _note_edits(place: Place) -> None:
    """Say what of the checkout this run does not have."""
    if _git(place.main, "symbolic-ref", "--quiet", "--short", "HEAD", check=False) == place.branch:
        edited = worktrees.edited(place.main, [] if place.params.refresh else [RAW])
        if edited:
            place.log(f"note: this run has what {place.branch} has, not your edits to {edited}")


@contextlib.contextmanager
def _worktree(place: Place, commit: str) -> Iterator[None]:
    """`place.tree` holds `commit` and uses the cache, the remotes and the credentials of the repository."""
    _remove_worktree(place)
    place.tree.parent.mkdir(parents=True, exist_ok=True)
    _git(place.main, "worktree", "add", "--quiet", "--detach", str(place.tree), commit)
    try:
        _configure(place)
        # an interrupted training goes on from its last checkpoint, though its worktree is gone
        checkpoints = place.tree.parent / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (place.tree / ".checkpoints").symlink_to(checkpoints)
        yield
    finally:
        _remove_worktree(place)


def _remove_worktree(place: Place) -> None:
    """Also one that a killed run left, whose last processes may need a moment to end."""
    deadline = time.monotonic() + 15
    while place.tree.exists():
        shutil.rmtree(place.tree, ignore_errors=time.monotonic() < deadline)
        if place.tree.exists():
            time.sleep(0.2)
    _git(place.main, "worktree", "prune")


def _configure(place: Place) -> None:
    """The worktree's `.dvc/config.local`: the repository's own, its cache, and paths that would mean another place here."""
    local = worktrees.local_config(place.main, place.tree)
    cache = _guarded(place, place.main, ["dvc", "cache", "dir"], lambda line: None).splitlines()[-1]
    local.setdefault("cache", {})["dir"] = cache
    if place.params.dvc_remote:
        local.setdefault("core", {})["remote"] = place.params.dvc_remote
    worktrees.write_config(local, place.tree)


def _dvc_remote(place: Place) -> str | None:
    """The remote that artifacts are shared through.

    Raises:
        UserError: commits would be pushed whose artifacts are nowhere.
    """
    done = stages.guarded(["dvc", "config", "core.remote"], place.tree, lambda line: None)
    name = done.output.strip().splitlines()[-1] if done.code == 0 and done.output.strip() else None
    if name is None and place.remote:
        raise UserError(
            f"there is a git remote ({place.remote}) but no DVC remote: others would get a commit without its model; "
            "set one up (dvc remote add --default …), or switch push off"
        )
    return name


def _limits(tree: Path) -> Gate:
    raw = YAML(typ="safe", pure=True).load((tree / "params.yaml").read_text(encoding="utf-8")) or {}
    try:
        limits = Gate.model_validate(raw.get("gate") or {})
    except pydantic.ValidationError as error:
        faults = (f"{'.'.join(map(str, ('gate', *e['loc'])))}: {e['msg'].lower()}" for e in error.errors())
        raise UserError(f"params.yaml: {'; '.join(faults)}") from None
    gate.check(limits)
    artifacts = YAML(typ="safe", pure=True).load((tree / "dvc.yaml").read_text(encoding="utf-8")).get("artifacts") or {}
    if ARTIFACT not in artifacts:
        raise UserError(f"dvc.yaml: no artifact `{ARTIFACT}` that a promotion could be registered as")
    return limits


def _answers(graph: dict[str, stages.Planned], name: str) -> str:
    """Where this stage writes the scores of every item.

    Raises:
        UserError: the stage is not brought up to date by this run, or writes none.
    """
    if name not in graph:
        raise UserError(f"{name} is not among the targets (or not in dvc.yaml), so that the gate has nothing to go by")
    for path in graph[name].outputs:
        if path.endswith(".answers.jsonl"):
            return path
    raise UserError(f"dvc.yaml: {name} has no output *.answers.jsonl for the gate to read")


# --- which commit to start from


def _tip(place: Place) -> tuple[str, str | None]:
    """The commit that the champion is on, and what the remote has of the branch (None: no remote, or no such branch there)."""
    local = _rev(place.main, f"refs/heads/{place.branch}")
    published = None
    if place.remote:
        theirs = _listed(place)
        published = theirs.get(f"refs/heads/{place.branch}")
        _forget_tags(place, theirs)
        if published:
            fetched = (
                f"+refs/heads/{place.branch}:refs/remotes/{place.remote}/{place.branch}",
                f"+refs/tags/{ARTIFACT}*:refs/tags/{ARTIFACT}*",
            )
            _network(place, [*GIT, "fetch", "--quiet", "--no-tags", place.remote, *fetched])
    if published is None:
        if local is None:
            raise UserError(f"{place.branch}: no such branch")
        return local, None
    if local and not _contains(place.main, published, local):
        ahead = _git(place.main, "rev-list", "--count", f"{published}..{local}")
        raise UserError(
            f"{place.branch} here is ahead of {place.remote} (commits: {ahead}): "
            "push them with their artifacts and tags (dvc push --run-cache, git push --follow-tags), or switch push off"
        )
    return published, published


def _listed(place: Place) -> dict[str, str]:
    """ref → commit of the branch and the model's tags, as the remote has them now."""
    wanted = (f"refs/heads/{place.branch}", f"refs/tags/{ARTIFACT}*")
    out = _network(place, [*GIT, "ls-remote", "--quiet", str(place.remote), *wanted])
    found: dict[str, str] = {}
    for line in out.splitlines():
        commit, _, ref = line.partition("\t")
        if ref.startswith("refs/") and re.fullmatch(r"[0-9a-f]{40,64}", commit):
            found[ref.removesuffix("^{}")] = commit  # the peeled line of an annotated tag comes last
    return found


def _forget_tags(place: Place, theirs: dict[str, str]) -> None:
    """Tags of an interrupted promotion that the remote lacks, or has with another commit: they are made anew.

    Others that the remote has with another commit will be the remote's, and that is said: its versions are those of all.
    """
    pending = _rev(place.main, place.pending)
    for tag in _tags(place.main, pending) if pending else []:
        if theirs.get(f"refs/tags/{tag}") != pending:
            _git(place.main, "tag", "--delete", tag)
    for ref, commit in theirs.items():  # without force git fetches none of them, and with --quiet does not say why
        here = _rev(place.main, ref) if ref.startswith("refs/tags/") else None
        if here not in (None, commit):
            place.log(
                f"the tag {ref.removeprefix('refs/tags/')} here was of {here[:10]}, {place.remote} has {commit[:10]}: taken over"
            )


def _finish_interrupted(place: Place, tip: str, published: str | None) -> tuple[str, str]:
    """Publish what an earlier run had committed, or drop it if the branch moved on; the new tip, and what to say."""
    pending = _rev(place.main, place.pending)
    if pending is None:
        return tip, ""
    parent = _git(place.main, "rev-parse", f"{pending}^")
    if tip != parent and not _contains(place.main, tip, pending):
        _drop(place, pending)
        place.log(f"{place.branch} moved on since promotion {pending[:10]} was interrupted: it is dropped")
        return tip, ""
    with _worktree(place, pending):
        said = _publish(place, pending, published, _dvc_remote(place))
    return (pending if tip == parent else tip), f"finished an interrupted promotion ({said.rstrip('.')}); "


# --- data


def _take(place: Place, tip: str) -> list[str]:
    """New data: files below data/raw that the checkout of the branch has untracked, or changed since its last commit.

    Only what some source of the branch's params.yaml names: a model that never read a file is no new model. What git ignores,
    deletions, and files that are still being written are left alone. A checkout of another branch is not looked at: what lies
    there may belong to that branch.

    Raises:
        UserError: a file that was changed on the branch as well, has conflicts, is a link, or is too large for git.
    """
    here = _git(place.main, "symbolic-ref", "--quiet", "--short", "HEAD", check=False)
    if here != place.branch:
        place.log(f"the checkout is on {here or 'no branch'}, not on {place.branch}: its {RAW} is not looked at")
        return []
    status = _git(
        place.main, "status", "--porcelain", "-z", "--untracked-files=all", "--no-renames", "--", RAW
    )  # fmt: skip
    taken, named = list[str](), _named(place)
    changed = sorted(
        ((entry[:2], entry[3:]) for entry in status.split("\0") if entry), key=lambda e: Path(e[1]).name == ".gitignore"
    )
    for code, path in changed:
        source, target = place.main / path, place.tree / path
        if "U" in code or code in ("AA", "DD"):
            raise UserError(f"{path}: has merge conflicts; resolve them first")
        if source.is_symlink():
            raise UserError(f"{path}: a link, which others can't follow; use `dvc import-url`, or copy the file")
        if not source.is_file():
            continue
        if Path(path).name == ".gitignore":  # goes with what `dvc add` put into it
            if not any(name.endswith(".dvc") and Path(name).parent == Path(path).parent for name in taken):
                continue
        elif not named(path):
            place.log(f"{path}: no source in params.yaml (ingest.sources) names it, left alone")
            continue
        if source.stat().st_size > LARGEST:
            raise UserError(
                f"{path}: {source.stat().st_size / 2**20:.0f} MiB are too much for git; use `dvc add {path}`"
            )
        if not _is_quiet(source):
            place.log(f"{path}: still being written, left for the next run")
            continue
        head, there = _blob(place.main, "HEAD", path), _blob(place.main, tip, path)
        ours = _git(place.main, "hash-object", "--", path)
        if ours == there:
            continue
        if there != head:
            raise UserError(f"{path}: changed here and on {place.branch}; commit it or take it back, then merge")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        if _git(place.tree, "hash-object", "--", path) != ours:
            raise UserError(f"{path}: was written to while it was read; start the run again")
        taken.append(path)
    if taken:
        place.log(f"new data: {', '.join(taken)}")
    return taken


def _named(place: Place) -> Callable[[str], bool]:
    """Whether a source of the branch's params.yaml names a file below data/raw, or the file that DVC keeps in its stead."""
    given = worktrees.settings(place.tree).get("ingest")
    if given is None:  # another pipeline than reforge's
        return lambda _: True
    patterns = [source["path"] for source in given.get("sources") or [] if source.get("path")]
    files = [file for pattern in patterns for file in (place.main / pattern, *place.main.glob(pattern))]
    # macOS writes a name's letters apart, see tasks/ingest.py
    found = {unicodedata.normalize("NFC", file.relative_to(place.main).as_posix()) for file in files}

    def named(path: str) -> bool:
        data = unicodedata.normalize("NFC", path).removesuffix(".dvc")  # of a file or of a folder
        return any(one == data or one.startswith(f"{data}/") for one in found)

    return named


def _is_quiet(path: Path) -> bool:
    """Nobody has written to it for `QUIET` seconds; a file that just came is waited for."""
    for _ in range(12):
        age = time.time() - path.stat().st_mtime
        if age >= QUIET or age < -60:  # a clock that runs ahead says nothing
            return True
        time.sleep(max(0.1, QUIET - age))
    return False


def _champion(tree: Path, path: str) -> list[dict[str, Any]] | None:
    """The scores of the model that is recorded at the tip; None if none is: a first run.

    Raises:
        UserError: they are recorded, but nowhere to be had.
    """
    recorded = {out["path"] for entry in _lock(tree).values() for out in entry.get("outs", [])}
    if path not in recorded:
        return None
    if not (tree / path).is_file():
        raise UserError(
            f"{path}: the champion's answers are neither in the cache nor on a DVC remote, so nothing can be compared; "
            "get them with `dvc pull`, or make them with `dvc repro` in a checkout of the branch and commit dvc.lock"
        )
    return gate.read(tree / path)


def _lock(tree: Path) -> dict[str, Any]:
    path = tree / "dvc.lock"
    if not path.is_file():
        return {}
    return dict((YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")) or {}).get("stages") or {})


def _scored_differently(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A note if code or settings of the evaluation changed, which a difference of scores may come from."""
    if SUBJECT not in before:
        return []
    made = {out["path"] for entry in after.values() for out in entry.get("outs", [])}

    def settings(entry: dict[str, Any]) -> dict[str, Any]:
        inputs = {dep["path"]: dep.get("md5") for dep in entry.get("deps", []) if dep["path"] not in made}
        for values in entry.get("params", {}).values():
            inputs |= values
        return inputs

    old, new = settings(before[SUBJECT]), settings(after[SUBJECT])
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return [f"Champion and challenger were not scored alike; changed are {', '.join(changed)}."] if changed else []


# --- promotion


def _made(place: Place, taken: Sequence[str]) -> list[str]:
    """Paths of the worktree that a promotion commits: what the stages made that git tracks, dvc.lock, and new data."""
    outputs = [out for planned in stages.plan(place.tree) for out in planned.outputs]
    status = _git(place.tree, "status", "--porcelain", "-z", "--untracked-files=all", "--no-renames")
    made, other = [], []
    for path in (entry[3:] for entry in status.split("\0") if entry):
        known = path in taken or any(f"{path}/".startswith(f"{out}/") for out in outputs)
        if known or path.endswith((".dvc", ".gitignore")) or Path(path).name == "dvc.lock":
            made.append(path)
        elif path != ".checkpoints":
            other.append(path)
    if other:
        place.log(f"written by no stage, and not committed: {', '.join(other)}")
    return made


def _commit(place: Place, paths: Sequence[str], verdict: gate.Verdict) -> str:
    """A commit of these paths on top of the tip that no branch points to yet, only `place.pending`."""
    rows = [f"{row.measure}: {row.reason}" for row in verdict.rows]
    subject = f"Retrain {ARTIFACT}: {verdict.sentence}"
    _git(place.tree, "add", "--all", "--pathspec-from-file=-", "--pathspec-file-nul", given="\0".join(paths))
    message = subject + "\n\n" + "\n".join(rows + [f"Note: {note}" for note in verdict.notes])
    _git(place.tree, "commit", "--quiet", "--no-verify", "--file=-", given=message)
    commit = _git(place.tree, "rev-parse", "HEAD")
    _git(place.main, "update-ref", place.pending, commit)
    return commit


def _publish(place: Place, commit: str, published: str | None, shared: str | None) -> str:
    """Bring a committed promotion where it belongs; may be called again after any interruption. Returns what was done.

    Artifacts go first, then commit and tags in one atomic push: nobody ever gets a commit without its model.

    Raises:
        MovedOn: the branch is no longer what the commit was made on; the promotion is dropped, nothing has moved.
        Stopped: somebody cancelled the run before anything was visible; the promotion is dropped.
        UserError: anything else that a later run can finish.
    """
    if shared and place.params.push:
        _network(place, ["dvc", "--wait-for-lock", "push", "--run-cache"])
        _check_pushed(place, commit)
    tip = published if place.remote else _rev(place.main, f"refs/heads/{place.branch}")
    merged = tip is not None and _contains(place.main, tip, commit)
    if not merged and cancelled():
        _drop(place, commit)
        raise Stopped
    if place.remote:
        tags = _tag(place, commit)
        if not merged:
            _push(place, commit, tags, published)
        else:  # somebody merged it: its tags may still be here alone
            refs = [f"refs/tags/{tag}" for tag in tags]
            _network(place, [*GIT, "push", "--quiet", "--no-verify", "--atomic", place.remote, *refs])
        kept = _follow(place, commit)
        if kept:
            place.log(f"pushed, but {place.branch} stays behind here: {kept}")
    else:
        kept = _follow(place, commit)
        if kept:
            raise UserError(f"{kept}; the promotion {commit[:10]} is kept, and the next run finishes it")
        tags = _tag(place, commit)
    _git(place.main, "update-ref", "-d", place.pending)
    version = next(tag for tag in tags if "@" in tag)
    where = f", pushed to {place.remote}" if place.remote else ""
    return f"{version} is {STAGE} on {place.branch} ({commit[:10]}){where}" + (f"; here: {kept}" if kept else "") + "."


def _check_pushed(place: Place, commit: str) -> None:
    """`dvc push` only warns of what is neither here nor there, after a `dvc gc` say.

    Raises:
        UserError: some of it is not in the remote; if it is nowhere, the promotion is dropped, or it would be in the way of
            every later run.
    """
    said = _network(place, ["dvc", "--wait-for-lock", "status", "--cloud", "--json"])
    last = next((line for line in reversed(said.splitlines()) if line.startswith("{")), "{}")
    found: dict[str, str] = json.loads(last)
    # a folder whose list of files is gone is not among them (dvc 3.67.1): it is in a warning, by its hash
    names = {out.get("md5"): out["path"] for entry in _lock(place.tree).values() for out in entry.get("outs", [])}
    folders = {names.get(md5, md5) for md5 in re.findall(r"md5: ([0-9a-f]{32}\.dir)", said)}
    gone = sorted({name for name, state in found.items() if state == "missing"} | folders)
    if gone:
        _drop(place, commit)
        raise UserError(
            f"{', '.join(gone[:3])}: not in the DVC remote after a push, nor in the cache; nothing was published, "
            f"promotion {commit[:10]} is dropped, and the next run makes it anew"
        )
    if unpushed := sorted(name for name, state in found.items() if state == "new"):
        raise UserError(
            f"{', '.join(unpushed[:3])}: not in the DVC remote after a push; nothing was published, promotion "
            f"{commit[:10]} is kept, and the next run finishes it"
        )


def _push(place: Place, commit: str, tags: Sequence[str], published: str | None) -> None:
    refs = [f"{commit}:refs/heads/{place.branch}", *(f"refs/tags/{tag}" for tag in tags)]
    try:
        _network(place, [*GIT, "push", "--quiet", "--no-verify", "--atomic", str(place.remote), *refs])
    except UserError as error:
        now = _listed(place).get(
            f"refs/heads/{place.branch}"
        )  # raises, and all is kept, if the remote can't be reached
        if now == commit:
            return  # it arrived, only the answer did not
        if now != published:
            _drop(place, commit)
            raise MovedOn(
                f"{place.remote}/{place.branch} moved on while this run trained; nothing was moved, and the next run "
                "starts from there"
            ) from None
        if REFUSED.search(str(error)):
            raise UserError(
                f"{error}; the promotion {commit[:10]} is kept: let this account push to {place.branch} of {place.remote} "
                f"and run again, or merge {place.pending} there by a merge commit, or drop it (git update-ref -d {place.pending})"
            ) from None
        raise UserError(f"{error}; the promotion {commit[:10]} is kept, and the next run finishes it") from None


def _tag(place: Place, commit: str) -> list[str]:
    """The model's version and stage at this commit, by GTO: those that are there are kept."""
    if not any("@" in tag for tag in _tags(place.main, commit)):
        _guarded(place, place.tree, ["gto", "register", ARTIFACT, commit], lambda line: None)
    version = next(tag for tag in _tags(place.main, commit) if "@" in tag).partition("@")[2]
    if not any("#" in tag for tag in _tags(place.main, commit)):
        assign = ["gto", "assign", ARTIFACT, "--version", version, "--stage", STAGE]
        _guarded(place, place.tree, assign, lambda line: None)
    return _tags(place.main, commit)


def _tags(main: Path, commit: str) -> list[str]:
    found = _git(main, "tag", "--points-at", commit).splitlines()
    return sorted(tag for tag in found if tag.startswith((f"{ARTIFACT}@", f"{ARTIFACT}#{STAGE}")))


def _drop(place: Place, commit: str) -> None:
    """Forget a promotion that never became visible."""
    for tag in _tags(place.main, commit):
        _git(place.main, "tag", "--delete", tag)
    _git(place.main, "update-ref", "-d", place.pending)


def _follow(place: Place, commit: str) -> str | None:
    """`_move`, where git and DVC may refuse: what is pushed is promoted, whatever stands in the way of a checkout here."""
    try:
        return _move(place, commit)
    except MovedOn:
        raise
    except UserError as error:
        return place.redact(str(error)).rstrip(".")


def _move(place: Place, commit: str) -> str | None:
    """Fast-forward the local branch, and the checkout that it may have; None, or why it stays where it is.

    Files of the checkout that already are what the commit has (the new data that was taken from there) are no obstacle;
    anything else that is not committed and would be overwritten is.

    Raises:
        MovedOn: the branch has other commits, and there is no remote that the promotion went to.
    """
    ref = f"refs/heads/{place.branch}"
    local = _rev(place.main, ref)
    if local is None or _contains(place.main, local, commit):
        return None
    if not _contains(place.main, commit, local):
        if place.remote:
            return f"it has commits of its own, `git pull --rebase {place.remote} {place.branch}` brings both together"
        _drop(place, commit)
        raise MovedOn(f"{place.branch} moved on while this run trained; nothing was moved, start it again")
    checkout = _checkout_of(place)
    if checkout is None:
        _git(place.main, "update-ref", ref, commit, local)
        return None
    try:
        with stages.turn(checkout, lambda _: None, lambda: True):  # it does not wait
            stages.drop_dead_holders(checkout)
            if not stages.busy(checkout):
                return _fast_forward(place, checkout, local, commit)
    except Stopped:
        pass
    return f"{place.branch} is checked out where a run goes on: dvc.lock would change under it; wait for its end"


def _fast_forward(place: Place, checkout: Path, local: str, commit: str) -> str | None:
    """The checkout to `commit`; None, or why it stays where it is."""
    ref = f"refs/heads/{place.branch}"
    index = Path(_git(checkout, "rev-parse", "--path-format=absolute", "--git-path", "index"))
    kept = index.read_bytes()
    changed = _git(checkout, "diff", "--name-only", "-z", "--no-renames", "--diff-filter=AM", local, commit).split("\0")
    same = []  # as `git update-index --index-info` takes it, which enters all or nothing
    for path in changed:
        if (
            path
            and (checkout / path).is_file()
            and _git(checkout, "hash-object", "--", path) == _blob(checkout, commit, path)
        ):
            mode, _, blob = _git(checkout, "ls-tree", commit, "--", path).split("\t")[0].split()
            same.append(f"{mode} {blob}\t{path}\0")
    if same:
        _git(checkout, "update-index", "-z", "--index-info", given="".join(same))
    try:
        _git(checkout, "merge", "--quiet", "--ff-only", commit)
    except UserError as error:
        if _rev(place.main, ref) != local:
            raise
        if same:
            index.write_bytes(kept)
        if "index.lock" in str(error):
            raise
        lines = _git(checkout, "diff", "--name-only", "HEAD").splitlines()
        both = [path for path in lines if path in changed] or ["files that git does not track"]
        return f"{place.branch} is checked out with changes of {', '.join(both[:3])}: commit, stash or remove them"
    return None


def _checkout_of(place: Place) -> Path | None:
    folder: Path | None = None
    for line in _git(place.main, "worktree", "list", "--porcelain").splitlines():
        if line.startswith("worktree "):
            folder = Path(line.removeprefix("worktree "))
        elif line == f"branch refs/heads/{place.branch}":
            return folder
    return None


# --- programs


def _is_transient(_task: Any, _run: Any, state: State[Any]) -> bool:
    return isinstance(state.result(raise_on_failure=False), StageTransient)


@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=2,
    retry_delay_seconds=[5, 30],
    retry_condition_fn=_is_transient,
)
def _command(place: Place, command: Sequence[str]) -> str:
    """A program that may reach over the network, tried again if that failed."""
    if command[0] == "env":  # git
        return _guarded(place, place.main, command, lambda line: None)
    return _guarded(place, place.tree, command, place.log)


def _network(place: Place, command: Sequence[str]) -> str:
    words = [word for word in command[len(GIT) :] if command[: len(GIT)] == list(GIT)] or list(command)
    program = "git" if command[: len(GIT)] == list(GIT) else words.pop(0)
    name = f"{program} {next(word for word in words if not word.startswith('-'))}"
    return str(_command.with_options(name=name, task_run_name=name)(place, list(command)))


def _guarded(place: Place, cwd: Path, command: Sequence[str], log: Callable[[str], None]) -> str:
    """Its output.

    Raises:
        StageTransient: it failed with the words of a network that may be back later.
        UserError: it failed; the message holds its last line.
    """
    if command[0] == "dvc":
        done = stages.dvc_command(cwd, command[1:], log)
    else:
        done = stages.guarded(command, cwd, log, NETWORK_SECONDS, kept=None)  # the branch stands before all tags
    if done.code == 0:
        return done.output
    name = "git" if command[0] == "env" else command[0]
    lines = [line.strip() for line in done.output.splitlines() if line.strip()]
    telling = [line for line in lines if re.match(r"(ERROR|error|fatal|remote|❌)\b|!|❌", line)] or lines
    which = 0 if name == "git" else -1  # git says what is wrong first, and at last what follows from it
    words = place.redact(f"{name}: {telling[which] if telling else 'failed without a word'}")
    if name == "git" and (refused := REFUSED.search(done.output)) and not REFUSED.search(words):
        words += f" ({refused[0]})"
    if stages.TRANSIENT.search(done.output) or (name == "git" and GIT_TRANSIENT.search(done.output)):
        raise StageTransient(words)
    raise UserError(words)


def _git(cwd: Path, *arguments: str, check: bool = True, given: str | None = None) -> str:
    """Output of a git command that stays on this machine.

    Raises:
        UserError: it failed; the message holds the line that says why: behind it git often advises.
    """
    done = subprocess.run(  # noqa: S603  (git, with arguments of this module)
        [*GIT, *arguments], cwd=cwd, input=given or "", capture_output=True, text=True, encoding="utf-8"
    )
    if done.returncode and check:
        words = done.stderr.strip().splitlines()
        why = next((line for line in words if line.startswith(("fatal: ", "error: "))), words[-1] if words else "")
        raise UserError(f"git {arguments[0]}: {why or 'failed without a word'}")
    return done.stdout.rstrip("\n") if done.returncode == 0 else ""


def _rev(cwd: Path, ref: str) -> str | None:
    return _git(cwd, "rev-parse", "--quiet", "--verify", f"{ref}^{{commit}}", check=False) or None


def _blob(cwd: Path, commit: str, path: str) -> str | None:
    return _git(cwd, "rev-parse", "--quiet", "--verify", f"{commit}:{path}", check=False) or None


def _contains(cwd: Path, tip: str, commit: str) -> bool:
    """Whether `commit` is `tip` or one of its ancestors."""
    command = [*GIT, "merge-base", "--is-ancestor", commit, tip]
    return subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0  # noqa: S603


def main(arguments: Sequence[str] | None = None) -> int:
    """The flow from a command line; its options are the fields of `RetrainParameters`."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.retrain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, info in RetrainParameters.model_fields.items():
        more: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if info.annotation is bool else {}
        if name == "targets":
            more = {"nargs": "+", "metavar": "STAGE"}
        default = "" if info.default is None else f" (default: {info.default})"
        parser.add_argument(
            f"--{name.replace('_', '-')}", default=None, help=f"{info.description}{default}".replace("%", "%%"), **more
        )
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    try:
        params = RetrainParameters.model_validate(given)
    except pydantic.ValidationError as error:
        parser.error("; ".join(f"--{e['loc'][0]}: {e['msg'].lower()}, found {e['input']!r}" for e in error.errors()))
    ended: Any = None

    def run() -> Any:
        nonlocal ended
        ended = retrain(params, return_state=True)
        return ended

    code = finish("retrain", run)
    return 3 if ended is not None and ended.name == "Rejected" else code


if __name__ == "__main__":
    sys.exit(main())
