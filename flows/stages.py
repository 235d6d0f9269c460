"""The bridge to DVC: what `dvc repro` would do, one stage of it done in a process of its own, and its metrics.

`plan` asks DVC's own change test, in process, in one pass. `execute` runs one stage as `dvc --wait-for-lock repro
--single-item NAME` and reads from DVC's words which of four things happened. Nothing else of reforge imports dvc.
"""

import contextlib
import copy
import difflib
import fcntl
import functools
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil  # type: ignore[import-untyped]  # of dvc
from dvc.exceptions import DvcException
from dvc.lock import LockError
from dvc.repo import Repo, lock_repo
from dvc.repo.reproduce import get_active_graph, plan_repro
from dvc.rwlock import _edit_rwlock
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from dvc.stage.cache import _can_hash, _get_cache_hash, _get_stage_hash
from dvc.stage.serialize import to_single_stage_lockfile
from dvc.utils.serialize import load_yaml, modify_yaml, parse_yaml
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.meta import Meta
from dvc_data.hashfile.tree import Tree
from pydantic import StringConstraints
from voluptuous import Invalid  # of dvc

from flows import guard
from tasks.params import UserError

Log = Callable[[str], None]
Figure = Annotated[str, StringConstraints(pattern="^[^:]+:[^:]+$")]  # FILE:KEY of a file of metrics
Did = Literal["ran", "restored", "pulled", "unchanged"]
SAID: dict[Did, str] = {
    "ran": "ran",
    "restored": "restored from run cache",
    "pulled": "pulled from remote",
    "unchanged": "unchanged",
}
# What can be gone a minute later. A data check or a wrong parameter is none of these.
TRANSIENT = re.compile(
    r"ConnectionError|Connection (?:refused|reset|aborted|timed out)|ConnectTimeout|ReadTimeout|[Rr]ead timed out"
    r"|EndpointConnectionError|Temporary failure in name resolution|Name or service not known|Max retries exceeded"
    r"|NetworkError|Network is unreachable|SlowDown|Too Many Requests|\b50[0234] (?:Server|Bad|Service|Gateway|Internal)"
)
BUSY = re.compile(r"is busy, it is being blocked by|Unable to acquire lock")
# what DVC advises after every stage
HINT = re.compile(
    r"To track the changes with git, run:|\s+git add |To enable auto staging, run:|\s+dvc config core\.autostage|Use `dvc push` to send"
)
KEPT = 400  # last lines of a command's output
PROGRESS_SECONDS = 5.0  # a progress bar is logged that often, though it is drawn ten times a second


class Stopped(Exception):
    """The flow was cancelled or killed, and with it the stage."""


class StageFailed(UserError):
    """A stage did not come to its end; the message is one line."""


class StageTimedOut(StageFailed):
    """It took longer than its timeout; nothing that it started is left."""


class StageTransient(StageFailed):
    """It failed with the words of a network that may be back later."""


@dataclass(frozen=True)
class Reason:
    """Why DVC would run a stage, in its own words: `status` is modified, deleted, new, not in cache.

    Of a parameter (a section, as dvc.yaml names it), `before` and `after` are what dvc.lock and params.yaml hold; of a
    command, what dvc.lock and dvc.yaml hold.
    """

    kind: Literal["command", "dependency", "parameter", "output", "always"]
    name: str
    status: str = "modified"
    before: Any = field(default=None, compare=False)
    after: Any = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.kind} {self.name} {self.status}" if self.name else f"{self.kind} {self.status}"


@dataclass(frozen=True)
class Planned:
    """A stage of the graph and what DVC thinks of it.

    Attributes:
        name: as `dvc repro` takes it: `sft`, `evaluate@base`, `data/raw/terms.csv.dvc`.
        upstream: names of the stages whose outputs it reads.
        gpu: `meta: {gpu: true}` in dvc.yaml.
        changed: it would run even if all its upstreams were unchanged.
        missing: the only change is that outputs are not here; `dvc pull` would do.
        restorable: the local run cache holds this very run, taking into account what upstreams would be restored to.
        remote: not the local one but the remote's; only `plan(remote=True)` asks.
        settled: neither run nor restored: its inputs are what it was made of, or will be when upstreams are restored.
        imported: it is a download (`dvc import`, `dvc import-url`).
        timeout: seconds, of `meta: {timeout: …}`.
        outputs: files and folders that it makes.
        metrics: those of them that hold metrics.
    """

    name: str
    upstream: tuple[str, ...]
    gpu: bool
    changed: bool
    reasons: tuple[Reason, ...]
    missing: bool
    restorable: bool
    remote: bool
    settled: bool
    imported: bool
    timeout: float | None
    outputs: tuple[str, ...]
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """How a stage ended well; `message` is what a person reads."""

    did: Did
    seconds: float = 0.0
    message: str = field(default="")

    def __post_init__(self) -> None:
        if not self.message:
            object.__setattr__(self, "message", SAID[self.did])


@dataclass(frozen=True)
class Metric:
    """One figure of a stage's metrics, and what it was at HEAD (None: not there)."""

    path: str
    name: str
    value: Any
    head: Any

    @property
    def change(self) -> float | None:
        numbers = [v for v in (self.value, self.head) if isinstance(v, (int, float)) and not isinstance(v, bool)]
        return numbers[0] - numbers[1] if len(numbers) == 2 else None


def plan(repo: Path, targets: Sequence[str] | None = None, *, remote: bool = False) -> list[Planned]:
    """Every stage that `dvc repro TARGETS` would visit, upstreams first, with DVC's own verdict on each.

    Waits for whoever holds DVC's repository lock. A stage that another process is running at this moment counts as
    changed: `execute` waits for that process.

    Args:
        remote: where the local run cache has no answer, ask that of the default remote: a request or two for each stage,
            and one for each of its files.

    Raises:
        UserError: no DVC repository, no such target, a faulty dvc.yaml, or no remote to ask.
    """
    with _opened(repo) as dvc, lock_repo(dvc):
        far = _Far(dvc) if remote else None
        graph = get_active_graph(dvc.index.graph)
        stages = plan_repro(graph, _chosen(dvc, targets) if targets else None)
        restored: dict[str, Mapping[str, Any]] = {}
        same: set[Any] = set()  # stages whose outputs will be what they are, or what `restored` says
        found = []
        for stage in stages:
            reasons, missing = _reasons(dvc, stage)
            upstream = list(graph.successors(stage))
            restorable = distant = False
            if reasons or any(_name(dvc, up) in restored for up in upstream):
                entry = _run_cache(dvc, stage, restored) if all(up in same for up in upstream) else None
                restorable = entry is not None
                if entry is None and far is not None and all(up in same for up in upstream):
                    entry = _run_cache(dvc, stage, restored, far)
                    distant = entry is not None
                if entry is not None:
                    same.add(stage)
                    if _own(reasons, restored) or entry != to_single_stage_lockfile(stage):
                        restored[_name(dvc, stage)] = entry
                    else:  # with its upstreams restored, its inputs are what it was made of
                        restorable = distant = False
            elif all(up in same for up in upstream):
                same.add(stage)
            meta = stage.meta if isinstance(stage.meta, dict) else {}
            found.append(
                Planned(
                    name=_name(dvc, stage),
                    upstream=tuple(_name(dvc, up) for up in upstream),
                    gpu=bool(meta.get("gpu")),
                    changed=bool(reasons),
                    reasons=tuple(reasons),
                    missing=missing,
                    restorable=restorable,
                    remote=distant,
                    settled=stage in same and _name(dvc, stage) not in restored,
                    imported=bool(stage.is_import),
                    timeout=_seconds(_name(dvc, stage), meta.get("timeout")),
                    outputs=tuple(_relative(dvc, out) for out in stage.outs),
                    metrics=tuple(_relative(dvc, out) for out in stage.outs if out.is_metric),
                )
            )
        return found


def execute(
    repo: Path,
    name: str,
    log: Log,
    timeout: float | None = None,
    pull: bool = False,
    stop: threading.Event | None = None,
) -> Outcome:
    """`dvc repro --single-item NAME` in a process group of its own, which never outlives this call or this process.

    Its output goes to `log` line by line as it comes, progress bars every few seconds. It waits for locks, and for another
    `dvc` that works on the same stage.

    Args:
        timeout: seconds of the stage's command, or of what DVC does without running it. Waiting for DVC's lock once the
            command has ended, and recording what it made, are not counted.
        pull: fetch what is missing from the remote instead of computing it.
        stop: when set, everything is ended.

    Raises:
        StageTransient: it failed with the words of a network error.
        StageTimedOut: the timeout passed.
        StageFailed: it failed, or one of its inputs was edited while it ran. DVC hashes inputs after the command
            (dvc 3.67.1), so dvc.lock and the run cache are then put back to what they were before.
        Stopped: `stop` was set.
    """
    started = time.monotonic()
    before = _before(repo, name)
    command = ["--wait-for-lock", "repro", "--single-item", name, *(["--pull"] if pull else [])]
    if pull and before.missing:  # `repro --pull` would first copy every entry of the remote's run cache, for each stage
        done = dvc_command(repo, ["--wait-for-lock", "pull", name], log, timeout, stop)
        if done.code == 0 and not _before(repo, name).missing:
            return Outcome("pulled", time.monotonic() - started)
        if done.code != 0 and TRANSIENT.search(done.output):
            raise StageTransient(f"{name}: {last_words(done.output)}")
        if done.code == 0:  # metrics and curves are in git alone; with --pull DVC would take them for there
            command.remove("--pull")
        log("not on the remote; it will be restored or run")
    done = dvc_command(repo, command, log, timeout, stop)
    if done.code != 0:
        words = f"{name}: {last_words(done.output)}"
        raise (StageTransient if TRANSIENT.search(done.output) else StageFailed)(words)
    did = read(done.output, name)
    if did in ("ran", "restored"):
        _check_inputs(repo, name, before)
    return Outcome(did, time.monotonic() - started)


def read(output: str, name: str) -> Did:
    """What DVC says that it did with a stage; lines of the stage's own come after `Running stage` and decide nothing."""
    did: Did = "ran"  # a changed file under `dvc add` is only hashed, and DVC says "Verifying …"
    for line in output.splitlines():
        if line.startswith(f"Running stage '{name}':") or line.startswith("Importing '"):
            return "ran"
        if line.startswith((f"Stage '{name}' didn't change, skipping", f"'{name}' didn't change, skipping")):
            did = "unchanged"
        elif line.startswith(f"Stage '{name}' is cached - skipping run"):
            did = "restored"
        elif line.startswith("Pulling data for "):
            did = "pulled"
        elif line.startswith("Unable to pull data for "):
            did = "ran"
    return did


@dataclass(frozen=True)
class Done:
    code: int
    output: str  # its last lines


def dvc_command(
    repo: Path, arguments: Sequence[str], log: Log, timeout: float | None = None, stop: threading.Event | None = None
) -> Done:
    """One `dvc` command under the guard, tried again as long as another process holds what it needs.

    Raises:
        StageTimedOut: after `timeout` seconds of one try; see `guarded`.
        Stopped: `stop` was set.
    """
    said = False
    while True:
        done = guarded([sys.executable, "-m", "dvc", *arguments], repo, log, timeout, stop)
        if done.code == 0 or "Running stage '" in done.output or not BUSY.search(done.output):
            return done
        drop_dead_holders(repo)
        if not said:
            log("another dvc works on this: waiting for it")
            said = True
        if (stop or threading.Event()).wait(1.0):
            raise Stopped


def guarded(
    command: Sequence[str],
    cwd: Path,
    log: Log,
    timeout: float | None = None,
    stop: threading.Event | None = None,
    kept: int | None = KEPT,
) -> Done:
    """A command whose whole process group ends with its timeout, with `stop`, or with this process, however it dies.

    Args:
        timeout: seconds; of a stage that `dvc` runs, from the moment in which its command begins, and only until it has ended:
            DVC may have to wait for its lock then, and what was made must not be lost by that.
        kept: lines of its output, the last ones; None: all.
    """
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
        "DVC_NO_ANALYTICS": "1",
    }
    process = subprocess.Popen(  # noqa: S603  (dvc, with names out of dvc.yaml)
        [sys.executable, "-I", "-S", guard.__file__, *command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C in a terminal reaches the flow alone, which then cuts the lifeline
    )
    assert process.stdin is not None
    assert process.stdout is not None
    deadline = time.monotonic() + timeout if timeout else None
    began = False

    def see(line: str) -> None:
        nonlocal began, deadline
        if timeout and not began and line.startswith("Running stage '"):
            began, deadline = True, time.monotonic() + timeout
        log(line)

    lines = Lines(see, kept)
    why: Exception | None = None
    try:
        while True:
            readable = bool(select.select([process.stdout], [], [], 0.1)[0])
            if readable:
                chunk = os.read(process.stdout.fileno(), 65536)
                if not chunk:
                    break
                lines.feed(chunk)
            elif process.poll() is not None:
                break  # somebody that left the group still holds the pipe
            if why is None and stop is not None and stop.is_set():
                why = Stopped()
                process.stdin.close()
            late = why is None and deadline is not None and time.monotonic() > deadline
            if late and not (began and _command_ended(process.pid)):
                why = StageTimedOut(f"not done after {timeout:g} s; it and all that it started were ended")
                process.stdin.close()
        process.wait()
    finally:
        _end(process)
        lines.close()
    if why is not None:
        raise why
    return Done(process.returncode, "\n".join(lines.kept))


def _command_ended(guarding: int) -> bool:
    """Whether the `dvc` under this guard has no process of a stage, so that it waits for its lock or records what was made."""
    try:
        dvc = min(psutil.Process(guarding).children(), key=psutil.Process.create_time)
        return not dvc.children()
    except (psutil.Error, ValueError):  # it has just ended itself
        return True


def _end(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    try:
        process.wait(guard.GRACE + 5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


class Lines:
    """Bytes of a terminal program to log lines: a bar that is redrawn with \\r becomes a line now and then."""

    def __init__(self, log: Log, kept: int | None = KEPT) -> None:
        self.log = log
        self.kept: deque[str] = deque(maxlen=kept)
        self.rest = b""
        self.shown = 0.0
        self.bar = ""  # drawn, but not logged yet

    def feed(self, chunk: bytes) -> None:
        *whole, self.rest = re.split(rb"(?<=[\r\n])", (self.rest + chunk).replace(b"\r\n", b"\n"))
        for part in whole:
            text = part.decode("utf-8", "replace").replace("\x1b[A", "").rstrip()
            if part.endswith(b"\r"):
                self.bar = text if text.strip() else self.bar
                if time.monotonic() - self.shown >= PROGRESS_SECONDS:
                    self.flush()
            else:
                self.finish(text)

    def finish(self, text: str) -> None:
        """A whole line; a bar's own last state takes the place of the one that waits."""
        if "%|" in text:
            self.bar = ""
        if text.strip():
            self.kept.append(text)
            if not HINT.match(text):
                self.log(text)

    def flush(self) -> None:
        if self.bar:
            self.shown = time.monotonic()
            self.kept.append(self.bar)
            self.log(self.bar)
            self.bar = ""

    def close(self) -> None:
        self.flush()
        if self.rest.strip():
            self.finish(self.rest.decode("utf-8", "replace").rstrip())


@contextlib.contextmanager
def turn(repo: Path, log: Log, stopped: Callable[[], bool], name: str = "flow") -> Iterator[None]:
    """One `name` at a time in a workspace: the others wait. The kernel frees it, however the holder ends.

    Raises:
        UserError: no DVC repository there.
        Stopped: `stopped` said so while it waited.
    """
    if not (repo / ".dvc").is_dir():
        raise UserError(f"{repo}: no DVC repository here (no .dvc); run from the repository's top folder")
    folder = repo / ".dvc" / "tmp"
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.lock").open("w") as handle:
        said = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not said:
                    log(f"another {name} runs in this workspace: waiting for its end")
                    said = True
                if stopped():
                    raise Stopped from None
                time.sleep(0.5)
        yield


def busy(repo: Path) -> bool:
    """Whether DVC has somebody down as reading or writing something of this workspace; see `drop_dead_holders`."""
    path = repo / ".dvc/tmp/rwlock"
    held = json.loads(path.read_text()) if path.is_file() else {}
    return any(held.get("write", {}).values()) or any(held.get("read", {}).values())


def metrics(repo: Path, paths: Sequence[str]) -> list[Metric]:
    """Every figure of these metrics files, with its value at HEAD: the content of `dvc metrics diff HEAD`."""
    if not paths:
        return []
    with _opened(repo) as dvc:
        wanted = [os.path.join(dvc.root_dir, path) for path in paths]
        if dvc.scm.no_commits:
            shown = {"workspace": next(iter(dvc.metrics.show(targets=wanted).values()))}
        else:
            shown = dvc.metrics.show(targets=wanted, revs=["HEAD", "workspace"], hide_workspace=False)
    old, new = (
        {path: dict(flat(found.get("data", {}))) for path, found in shown.get(rev, {}).get("data", {}).items()}
        for rev in ("HEAD", "workspace")
    )
    return [
        Metric(path, name, value, old.get(path, {}).get(name))
        for path, figures in sorted(new.items())
        for name, value in figures.items()
    ]


def flat(value: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def whole(lock: object) -> bool:
    """What a dvc.lock holds is what DVC takes for one, with its stages: none is cut off, at the end of a line either."""
    try:
        COMPILED_LOCKFILE_SCHEMA(lock)
    except Invalid:
        return False
    return isinstance(lock, dict) and {"schema", "stages"} <= lock.keys()


def _seconds(stage: str, given: object) -> float | None:
    if given is None:
        return None
    with contextlib.suppress(ValueError):
        if isinstance(given, int | float | str) and (seconds := float(given)) > 0:
            return seconds
    raise UserError(f"{stage}: meta.timeout: expected seconds above 0, found {given!r}")


def _chosen(dvc: Any, targets: Sequence[str]) -> list[Any]:
    """The stages of these names; the name of a `foreach` means all its instances."""
    by_name = {_name(dvc, stage): stage for stage in dvc.index.stages}
    found = []
    for target in targets:
        names = [name for name in by_name if name == target or name.startswith(f"{target}@")]
        if not names:
            close = difflib.get_close_matches(target, by_name, n=1)
            raise UserError(f"{target}: no such stage in dvc.yaml" + (f", did you mean `{close[0]}`?" if close else ""))
        found += [by_name[name] for name in names]
    return found


@contextlib.contextmanager
def _opened(repo: Path) -> Iterator[Any]:
    """A `Repo` that waits for locks; faults of the user's as one line.

    `Repo` is not made for threads, hence the one lock.
    """
    with _one_at_a_time:
        try:
            with Repo(str(repo), _wait_for_lock=True) as dvc:
                yield dvc
        except DvcException as error:
            raise UserError(" ".join(str(error).split())) from error


_one_at_a_time = threading.RLock()


def _name(dvc: Any, stage: Any) -> str:
    """`stage.addressing` as seen from the repository's top, wherever this process is."""
    path = str(os.path.relpath(stage.path, dvc.root_dir))
    name = getattr(stage, "name", None)
    if name is None:
        return path
    return str(name) if path == "dvc.yaml" else f"{path}:{name}"


def _relative(dvc: Any, out: Any) -> str:
    return str(os.path.relpath(out.fs_path, dvc.root_dir)) if out.protocol == "local" else str(out.def_path)


def _reasons(dvc: Any, stage: Any) -> tuple[list[Reason], bool]:
    """Why `dvc repro` would run this stage (none: it would not), and whether only its data is missing."""
    try:
        if not stage.changed():
            return [], False
        if getattr(stage, "name", None) and _locked_entry(stage) is None:
            return [Reason("command", "", "never run", after=stage.cmd)], False
        found = [_command(stage)] if stage.changed_stage() else []
        if stage.is_callback or stage.always_changed:
            found.append(Reason("always", "", "changed"))
        for item in () if stage.frozen else stage.deps:
            found += _status(dvc, item, "dependency")
        for item in stage.outs:
            found += _status(dvc, item, "output")
        return found or [Reason("always", "", "changed")], not stage.changed(True)
    except LockError:
        return [Reason("output", "", "being written by another dvc")], False


def _command(stage: Any) -> Reason:
    entry = _locked_entry(stage) if getattr(stage, "name", None) else None
    return Reason("command", "", before=(entry or {}).get("cmd"), after=stage.cmd)


def _status(dvc: Any, item: Any, kind: Literal["dependency", "output"]) -> list[Reason]:
    out = []
    for found in item.status().values():
        if isinstance(found, dict):
            before, after = item.hash_info.value or {}, item.read_params()
            out += [
                Reason("parameter", str(key), str(status), before.get(key), after.get(key))
                for key, status in found.items()
            ]
        else:
            out.append(Reason(kind, _relative(dvc, item), str(found)))
    return out


def _own(reasons: Sequence[Reason], restored: Mapping[str, Mapping[str, Any]]) -> list[Reason]:
    """The reasons that do not go away when upstreams are restored."""
    made = [out["path"] for entry in restored.values() for out in entry["outs"]]
    return [r for r in reasons if r.kind != "dependency" or not any(f"{r.name}/".startswith(f"{out}/") for out in made)]


class _Far:
    """The default remote as a place where runs and their outputs may be; reads only.

    Raises:
        UserError: there is no remote, or it keeps no run cache (HTTP, a cloud-versioned one).
    """

    def __init__(self, dvc: Any) -> None:
        if not dvc.config["core"].get("remote"):
            raise UserError("no DVC remote is set here: `dvc remote add -d NAME URL`")
        self.outputs = dvc.cloud.get_remote_odb(command="plan")
        self.runs = dvc.cloud.get_remote_odb(command="plan", hash_name="md5-dos2unix")

    def load(self, stage: Any) -> Mapping[str, Any] | None:
        """A run of this stage with these inputs (`StageCache._load`, for a remote)."""
        key, fs = _get_stage_hash(stage), self.runs.fs
        folder = fs.join(self.runs.path, "runs", key[:2], key)
        for path in fs.find(folder) if fs.exists(folder) else ():
            with fs.open(path, "r") as handle:
                found: Mapping[str, Any] = parse_yaml(handle.read(), path)
            return found
        return None


def _run_cache(
    dvc: Any, stage: Any, restored: Mapping[str, Mapping[str, Any]], far: _Far | None = None
) -> Mapping[str, Any] | None:
    """The run that `dvc repro` would restore instead of running: out of dvc.lock or the run cache (`StageCache.restore`).

    Args:
        restored: what upstreams would be restored to, so that a change undone is foreseen however deep the graph.
        far: look there instead of into the local cache.
    """
    cache = far.outputs if far else dvc.cache.local
    known = {out["path"]: out for entry in restored.values() for out in entry["outs"]}
    recorded = to_single_stage_lockfile(stage) if stage.cmd and all(out.hash_info for out in stage.outs) else None
    stage = copy.copy(stage)
    stage.deps = [copy.copy(dep) for dep in stage.deps]
    try:
        for dep in stage.deps:
            parent = next((path for path in known if f"{dep.def_path}/".startswith(f"{path}/")), None)
            if parent is None:
                dep.save()
                continue
            dep.hash_info = HashInfo("md5", known[parent]["md5"])
            if parent != dep.def_path:  # a file below an output that is a folder
                tree = _tree(dvc, far, dep.hash_info)
                leaf = tree.get(Path(dep.def_path).relative_to(parent).parts)
                if leaf is None:
                    return None
                dep.hash_info = leaf[1]
            dep.meta = Meta()  # that of dvc.lock would bring the old hash along
            dep.get_hash = functools.partial(copy.copy, dep.hash_info)  # not that of the file, which may not be there
        if stage.frozen or not _can_hash(stage):
            return None
        now = to_single_stage_lockfile(stage)
        same = recorded is not None and _key(now) == _key(recorded)
        entry: Mapping[str, Any] | None = recorded if same else (far.load if far else dvc.stage_cache._load)(stage)
        # `dvc pull` brings what dvc.lock names; a metric that is kept in git need not be in a cache then
        here = {out.def_path for out in stage.outs if far and same and not out.use_cache and not out.status()}
        found = entry is not None and all(
            _in_cache(cache, out["md5"]) for out in entry["outs"] if out["path"] not in here
        )
        return entry if found else None
    except (DvcException, OSError, TypeError, KeyError):
        return None  # an input that is not there, a folder that is not in the cache


def _tree(dvc: Any, far: _Far | None, of: HashInfo) -> Tree:
    """What a folder's hash stands for; an upstream's folder may be here although this stage's run is not."""
    try:
        return Tree.load(dvc.cache.local, of)
    except OSError:
        if far is None:
            raise
        return Tree.load(far.outputs, of)


def _in_cache(cache: Any, md5: str) -> bool:
    found = HashInfo("md5", md5)
    if not found.isdir:
        return bool(cache.exists(md5))
    return all(cache.exists(inner.value) for _, _, inner in Tree.load(cache, found))


def _key(entry: dict[str, Any]) -> str:
    """What the run cache files an entry of dvc.lock under: all of it but the hashes of the outputs."""
    return str(_get_cache_hash(copy.deepcopy(entry), key=True))


@dataclass(frozen=True)
class _Inputs:
    """What a stage's inputs are, and what dvc.lock and the run cache knew of it, before it ran."""

    hashes: dict[str, Any]  # path → hash, params file → values
    entry: dict[str, Any] | None  # of dvc.lock
    missing: bool
    moment: float


def _find(dvc: Any, name: str) -> Any:
    for stage in dvc.index.stages:
        if _name(dvc, stage) == name:
            return stage
    raise UserError(f"{name}: no such stage in dvc.yaml")


def _lock_path(stage: Any) -> Path:
    return Path(stage.path).with_suffix(".lock")


def _locked_entry(stage: Any) -> dict[str, Any] | None:
    path = _lock_path(stage)
    entry = load_yaml(str(path)).get("stages", {}).get(stage.name) if path.is_file() else None
    return entry


def _before(repo: Path, name: str) -> _Inputs:
    with _opened(repo) as dvc, lock_repo(dvc):
        stage = _find(dvc, name)
        hashes = {}
        for dep in () if stage.is_import else stage.deps:
            with contextlib.suppress(DvcException, OSError):  # what is not there yet, DVC itself complains about
                found = dep.get_hash()
                if found:
                    hashes[dep.def_path] = copy.deepcopy(found.value)
        entry = _locked_entry(stage) if getattr(stage, "name", None) else None
        return _Inputs(hashes, entry, _reasons(dvc, stage)[1], time.time())


def _check_inputs(repo: Path, name: str, before: _Inputs) -> None:
    """Undo what DVC recorded if an input is not what it was when the stage began.

    Raises:
        StageFailed: naming the inputs.
    """
    with _opened(repo) as dvc, lock_repo(dvc):
        stage = _find(dvc, name)
        if stage.is_import or getattr(stage, "name", None) is None:
            return
        recorded = {dep.def_path: dep.hash_info.value for dep in stage.deps if dep.hash_info}
        edited = sorted(path for path, value in before.hashes.items() if recorded.get(path) != value)
        if not edited:
            return
        if _can_hash(stage):
            value = _get_cache_hash(to_single_stage_lockfile(stage))
            cached = Path(dvc.stage_cache._get_cache_path(_get_stage_hash(stage), value))
            if cached.is_file() and cached.stat().st_mtime >= before.moment - 1:
                cached.unlink()
                with contextlib.suppress(OSError):  # there are others; but dvc 3.67.1 falls over an empty folder
                    cached.parent.rmdir()
        with modify_yaml(str(_lock_path(stage))) as data:
            if before.entry is None:
                data["stages"].pop(stage.name, None)
            else:
                data["stages"][stage.name] = before.entry
    raise StageFailed(f"{name}: {', '.join(edited)} was edited while it ran; nothing was recorded, start it again")


def drop_dead_holders(repo: Path) -> None:
    """Take processes that are gone out of DVC's list of who reads and writes what.

    DVC asks only whether a process of that number exists. After a restart of a container another one often has it.
    """

    def gone(holder: dict[str, Any]) -> bool:
        try:
            words = psutil.Process(int(holder["pid"])).cmdline()
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False
        return not _started_as(holder["cmd"], words)

    with _opened(repo) as dvc, contextlib.suppress(LockError):
        hard = dvc.config["core"].get("hardlink_lock", False)
        with _edit_rwlock(dvc.tmp_dir, dvc.fs, hard) as lock:
            lock["write"] = {path: holder for path, holder in lock["write"].items() if not (holder and gone(holder))}
            lock["read"] = {path: [h for h in holders if not gone(h)] for path, holders in lock["read"].items()}


def _started_as(command: str, words: Sequence[str]) -> bool:
    """Whether a process with these arguments calls itself `command`, its `sys.argv` with blanks between: a path may hold some."""
    for i in range(1, len(words) + 1):
        name, tail = words[i - 1], " ".join(words[i:])
        module = name.replace(".", "/")
        program = command[: len(command) - len(tail)].rstrip()
        known = program == name or program.endswith((f"/{Path(name).name}", f"/{module}/__main__.py", f"/{module}.py"))
        if command.endswith(tail) and known:
            return True
    return " " not in command  # no argument tells it from another


def last_words(output: str) -> str:
    """The line that says most about a failure: the last of the stage's own before DVC sums up."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    own = [
        line
        for line in lines
        if not line.startswith(("ERROR: failed to reproduce", "Running stage", "> ", "WARNING:")) and "%|" not in line
    ]
    said = [line for line in own if not line.startswith("ERROR:")]
    return (said or own or lines or ["it failed without a word"])[-1][:500]
