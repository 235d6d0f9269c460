"""Named experiments over params.yaml: every arm with every seed, and a page that says what they show.

    python -m flows.experiments [NAME …] [--workers N]      # definitions: experiments.yaml; pages: docs/experiments/
    python -m flows.experiments --list
    python -m flows.experiments [NAME …] --page-only        # from what was recorded

A point (an arm with a seed) is `dvc repro` in a git worktree of HEAD with this repository's DVC cache and run cache, so points
share every stage that they have in common, and a call that was killed goes on where it was. A finished point is kept in
.dvc/tmp/experiments and as a DVC experiment (`dvc exp show`). docs/decisions/0010-experiments.md says why.
"""

import argparse
import contextlib
import copy
import difflib
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from flows import findings, stages, worktrees
from flows.findings import Cost, Run
from tasks import compare, params
from tasks.params import Section, UserError

DEFINITIONS = Path("experiments.yaml")
PAGES = Path("docs/experiments")
KEPT = Path(".dvc/tmp/experiments")
ARM = "{arm}"  # in a metric: the arm's label


def _labels(arms: Any) -> Any:
    """A number as a label is what it is called: YAML reads `6e-4:` and `8:` as such."""
    return {str(label): values for label, values in arms.items()} if isinstance(arms, dict) else arms


class Experiment(Section):
    """A question to params.yaml."""

    question: str = Field(description="in one line")
    arms: Annotated[dict[str, dict[str, Any]], BeforeValidator(_labels)] = Field(
        min_length=1, description="label → SECTION.KEY: value; the first one is what the others are compared with"
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=lambda: [42, 43, 44], min_length=1, description="each arm runs with each: the noise"
    )
    targets: list[str] = Field(min_length=1, description="stages that each point runs, with all that they need")
    metrics: list[stages.Figure] = Field(
        min_length=1, description="figures to compare, FILE:KEY; {arm} stands for the arm's label"
    )
    curves: list[str] = Field(default_factory=list, description="files of plots, drawn over each other")


@dataclass(frozen=True)
class Point:
    """params.yaml of HEAD with `values` set. Points with the same settings and targets are one, whatever experiment they are of."""

    key: str  # of all its settings, and of its targets
    name: str  # of the DVC experiment
    values: Mapping[str, Any]  # what differs from HEAD
    targets: tuple[str, ...]
    work: Mapping[str, str]  # stage → key of the stage and its settings, in the order in which they run


Arms = dict[str, dict[int, Point]]  # label → seed → point


def load(path: Path) -> dict[str, Experiment]:
    """Name → experiment.

    Raises:
        UserError: naming the key, what was found and what was expected; all faults at once.
    """
    raw = params.read(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected names of experiments, found {type(raw).__name__}")
    faults: list[str] = []
    found = {str(name): params.typed(str(name), Experiment, given, faults) for name, given in raw.items()}
    for name, experiment in found.items():
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
            faults.append(f"{name}: expected a name of small letters, digits and dashes")
        if experiment and len({*experiment.seeds}) < len(experiment.seeds):
            faults.append(f"{name}.seeds: the same seed comes twice, found {experiment.seeds}")
        if experiment and len({*map(findings.slug, experiment.arms)}) < len(experiment.arms):
            faults.append(f"{name}.arms: labels that differ in letters or digits expected, found {[*experiment.arms]}")
        for label, values in experiment.arms.items() if experiment else ():
            if "seed" in values:
                faults.append(f"{name}.arms.{label}.seed: not settable here, set {name}.seeds")
    if faults:
        raise UserError(f"{path}: " + "; ".join(faults))
    return {name: experiment for name, experiment in found.items() if experiment}


def chosen(every: Mapping[str, Experiment], names: Sequence[str]) -> dict[str, Experiment]:
    """Those of these names, or all.

    Raises:
        UserError: no such name.
    """
    for name in names:
        if name not in every:
            raise UserError(f"{name}: no such experiment in {DEFINITIONS}{_nearest(name, [*every])}")
    return {name: every[name] for name in names or every}


def _nearest(name: str, known: Sequence[str]) -> str:
    if close := difflib.get_close_matches(name, known, n=1):
        return f", did you mean `{close[0]}`?"
    few = known if len(known) <= 5 else difflib.get_close_matches(name, known, n=5, cutoff=0.0)
    return f"; there are {', '.join(few)}" + (f" and {len(known) - len(few)} more" if len(few) < len(known) else "")


def points(repo: Path, name: str, experiment: Experiment) -> Arms:
    """Every point, checked before the first one runs.

    Raises:
        UserError: an arm that makes no valid params.yaml, no such target, or a figure or curve that no stage on the way
            to the targets makes.
    """
    planned = _planned(repo, tuple(experiment.targets))
    made = [out for each in planned for out in each.outputs]
    figures = [path for each in planned for path in each.metrics]
    for metric in experiment.metrics:
        path = metric.partition(":")[0]
        if path not in figures:
            raise UserError(f"{name}.metrics: {path} is no metrics file of these targets{_nearest(path, figures)}")
        if (repo / path).is_file() and ARM not in metric:  # what was made here last says what such a test has
            made_last = json.loads((repo / path).read_text(encoding="utf-8"))
            known = [key for key, _ in stages.flat(made_last)]
            known += [key.removesuffix(".value") for key in known if key.endswith(".value")]
            key = metric.partition(":")[2]
            if key not in known:
                what = f"{name}.metrics: {path} has no figure `{key}` here"
                maker = next(each.name.partition("@")[0] for each in planned if path in each.metrics)
                # the stage's own settings (evaluate.lm_eval) and other rows may bring figures that were not there
                if not any(
                    k.partition(".")[0] in (maker, "ingest", "split") for v in experiment.arms.values() for k in v
                ):
                    raise UserError(what + _nearest(key, [k for k in known if not k.endswith(".value")]))
                print(f"note: {what}; the page needs it of every arm", flush=True)
    for curve in experiment.curves:
        if not any(curve.startswith(f"{out}/") or curve == out for out in made):
            raise UserError(f"{name}.curves: {curve} is no output of these targets{_nearest(curve, made)}")
    head = worktrees.settings(repo)
    found: Arms = {}
    for label, values in experiment.arms.items():
        found[label] = {}
        for seed in experiment.seeds:
            raw = copy.deepcopy(head)
            try:
                worktrees.change(raw, values | {"seed": seed})
                params.check(raw)
            except UserError as error:
                raise UserError(f"{name}.arms.{label}: {str(error).removeprefix('params.yaml: ')}") from None
            found[label][seed] = Point(
                key=_hash([raw, *experiment.targets]),
                name=f"{name}-{findings.slug(label)}-{seed}",
                values={key: value for key, value in (values | {"seed": seed}).items() if _at(head, key) != value},
                targets=tuple(experiment.targets),
                work=_recipes(repo, planned, raw),
            )
    return found


@functools.cache
def _planned(repo: Path, targets: tuple[str, ...]) -> list[stages.Planned]:
    """The stages on the way to `targets`: the graph, which does not change while this runs, not what is up to date."""
    return stages.plan(repo, targets)


def _at(raw: Any, key: str) -> Any:
    for part in key.split("."):
        raw = raw[int(part)] if isinstance(raw, list) else raw.get(part, ...) if isinstance(raw, dict) else ...
    return raw


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _recipes(repo: Path, planned: Sequence[stages.Planned], raw: Mapping[str, Any]) -> dict[str, str]:
    """Stage → a key of its own settings and those of all that it reads from: the same key is the same work."""
    graph = params.read(repo / "dvc.yaml")["stages"]
    keys: dict[str, str] = {}
    for each in planned:
        stage = graph.get(each.name.partition("@")[0], {})
        sections = {str(entry).partition(".")[0] for entry in stage.get("do", stage).get("params", [])}
        keys[each.name] = _hash([each.name, {s: raw.get(s) for s in sections}, [keys[up] for up in each.upstream]])
    return keys


# --- running ---------------------------------------------------------------------------------------------------------


def run(repo: Path, wanted: Sequence[Point], workers: int, stop: threading.Event) -> dict[str, str]:
    """Bring all points up to date, `workers` side by side, and record them. Returns name → why, of those that failed.

    A point that has a stage in common with one that runs waits until that one has made it, and then has it from the run cache.
    """
    waiting = list({point.key: point for point in reversed(wanted)}.values())[::-1]
    total, made, failed = len(waiting), set[str](), dict[str, str]()
    running: dict[Future[None], Point] = {}
    with ThreadPoolExecutor(workers) as pool:
        try:
            while waiting or running:
                for point in list(waiting):
                    busy = {key for other in running.values() for key in other.work.values()} - made
                    if len(running) < workers and busy.isdisjoint(point.work.values()):
                        waiting.remove(point)
                        _say(point, f"{total - len(waiting)} of {total}: {_values(point.values)}")
                        running[pool.submit(_bring, repo, point, made, stop)] = point
                for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                    point = running.pop(future)
                    try:
                        future.result()
                        made.update(point.work.values())
                    except UserError as error:
                        failed[point.name] = str(error)
                        _say(point, f"failed: {error}")
        finally:
            stop.set()  # when this is interrupted: every guard then ends what it started
    return failed


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in values.items()) or "params.yaml as it is"


def _say(point: Point, line: str) -> None:
    print(f"[{point.name}] {line}", flush=True)


_git = threading.Lock()  # `git worktree` and `dvc exp save` write what all worktrees share


def _bring(repo: Path, point: Point, made: set[str], stop: threading.Event) -> None:
    """Run a point and keep it; what it has behind it goes to `made`."""
    order = list(point.work)

    def log(line: str) -> None:
        _say(point, line)
        if (begun := re.match(r"Running stage '([^']+)':", line)) and begun[1] in order:
            made.update(point.work[stage] for stage in order[: order.index(begun[1])])

    with contextlib.ExitStack() as held:
        with _git:
            folder = held.enter_context(worktrees.worktree(repo, repo / KEPT / "worktrees" / point.key, point.values))
        # a point that fails now is missing, whatever other code once made of it
        shutil.rmtree(repo / KEPT / "points" / point.key, ignore_errors=True)
        done = stages.dvc_command(folder, ["--wait-for-lock", "repro", *point.targets], log, stop=stop)
        if done.code != 0:
            raise UserError(stages.last_words(done.output))
        planned = stages.plan(folder, point.targets)
        record(repo, folder, point, planned)
        with _git:
            save = [sys.executable, "-m", "dvc", "exp", "save", "--force", "--name", point.name, *point.targets]
            try:
                worktrees.command(save, folder)
            except UserError as error:  # without git's user.name, say; it is recorded all the same
                _say(point, f"not in `dvc exp show`: {error}")


# --- what is kept of a point -----------------------------------------------------------------------------------------


def record(repo: Path, folder: Path, point: Point, planned: Sequence[stages.Planned]) -> None:
    """Keep what a page needs of a finished point: its metrics, curves, answers, dvc.lock and settings, without models.

    The cost of a stage is kept by its inputs, so that a point which found the stage in the cache still knows it. An event
    lies in a worktree only when the stage really ran there.
    """
    kept = repo / KEPT / "points" / point.key
    fresh = kept.with_name(f"{point.key}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    outputs = [out for each in planned for out in each.outputs]
    in_git = worktrees.command(["git", "ls-files", "-z", "-co", "--exclude-standard", "--", *outputs], folder)
    for path in ["dvc.lock", "params.yaml", *in_git.split("\0"), *(out for out in outputs if out.endswith(".jsonl"))]:
        if path and (folder / path).is_file():
            (fresh / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / path, fresh / path)
    shutil.rmtree(kept, ignore_errors=True)
    fresh.rename(kept)
    events = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("data/*/event*.json"))]
    (repo / KEPT / "costs").mkdir(exist_ok=True)
    entries = params.read(folder / "dvc.lock")["stages"]
    for name, entry in ((each.name, entries[each.name]) for each in planned if each.name in entries):
        words = {*shlex.split(entry["cmd"])}
        for event in events:
            if event["stage"] == name.partition("@")[0] and {*event["arguments"].values()} <= words:
                (repo / KEPT / "costs" / f"{_inputs(entry)}.json").write_text(json.dumps(event, indent=2) + "\n")


def _inputs(entry: Mapping[str, Any]) -> str:
    """What a stage ran with, out of its entry in dvc.lock."""
    return _hash([entry.get(part) for part in ("cmd", "deps", "params")])


def recorded(repo: Path, experiment: Experiment, arms: Arms) -> dict[str, dict[int, Run]]:
    """Label → seed → what was kept; points that never ran on this machine are left out.

    Raises:
        UserError: a figure or a curve is not among what was kept.
    """
    names = [each.name for each in _planned(repo, tuple(experiment.targets))]
    found: dict[str, dict[int, Run]] = {}
    for label, seeds in arms.items():
        found[label] = {}
        for seed, point in seeds.items():
            kept = repo / KEPT / "points" / point.key
            if all((kept / metric.partition(":")[0]).is_file() for metric in experiment.metrics):
                found[label][seed] = _read(repo, kept, label, experiment, names)
    return found


def _read(repo: Path, kept: Path, label: str, experiment: Experiment, names: Sequence[str]) -> Run:
    figures, items = {}, {}
    for metric in experiment.metrics:
        path, _, key = metric.partition(":")
        known = dict(stages.flat(json.loads((kept / path).read_text(encoding="utf-8"))))
        wanted = key.replace(ARM, label)
        value = known.get(wanted, known.get(f"{wanted}.value"))
        if value is None or not compare.finite(value):
            raise UserError(
                f"{path}: no figure `{wanted}`{_nearest(wanted, [k.removesuffix('.value') for k in known])}"
            )
        figures[metric.replace(f"{ARM}.", "")] = float(value)
        answers = (kept / path).with_suffix(".answers.jsonl")
        if answers.is_file():
            items[path] = compare.read(answers)
    curves = {}
    for curve in experiment.curves:
        if not (kept / curve).is_file():
            raise UserError(f"curves: {curve}: no such file among what the point made")
        lines = [line.split("\t") for line in (kept / curve).read_text(encoding="utf-8").splitlines()[1:]]
        curves[curve] = [(float(x), float(y)) for x, y in lines]
    costs: dict[str, Cost] = {}
    entries = params.read(kept / "dvc.lock")["stages"]
    for name, entry in ((name, entries[name]) for name in names if name in entries):
        spent = repo / KEPT / "costs" / f"{_inputs(entry)}.json"
        event = json.loads(spent.read_text(encoding="utf-8")) if spent.is_file() else {}
        costs[name] = Cost(
            inputs=_inputs(entry),
            seconds=None if event.get("resumed_from") else event.get("seconds"),
            peak=event.get("peak_bytes"),
            trains="trainable_parameters" in event,
        )
    return Run(figures, curves, items, costs)


def page(repo: Path, name: str, experiment: Experiment, arms: Arms) -> Path:
    """Write the page and its drawings from what is recorded.

    Raises:
        UserError: nothing is recorded of any arm.
    """
    found = recorded(repo, experiment, arms)
    if not any(found.values()):
        raise UserError(f"{name}: nothing is recorded on this machine; run `python -m flows.experiments {name}`")
    folder = repo / PAGES
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{name}--*.svg"):
        old.unlink()
    written = findings.page(name, experiment.question, experiment.arms, experiment.seeds, found)
    for file, content in written.items():
        (folder / file).write_text(content, encoding="utf-8")
    return folder / f"{name}.md"


# --- the command line ------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every point is up to date and every page written."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments of experiments.yaml; default: all")
    parser.add_argument("--list", action="store_true", help="what there is, and how much of it is recorded")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="points that run side by side (default: 1)")
    parser.add_argument("--page-only", action="store_true", help="write the pages from what is recorded; run nothing")
    given = parser.parse_args(arguments)
    if given.workers < 1:
        parser.error(f"--workers: expected 1 or more, found {given.workers}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    repo, stop = Path.cwd(), threading.Event()
    try:
        experiments = chosen(load(repo / DEFINITIONS), given.names)
        arms = {name: points(repo, name, experiment) for name, experiment in experiments.items()}
        if given.list:
            _list(repo, experiments, arms)
            return 0
        failed: dict[str, str] = {}
        if not given.page_only:
            _warn(repo, given.workers)
            wanted = [point for every in arms.values() for seeds in every.values() for point in seeds.values()]
            with stages.turn(repo, print, stop.is_set, "experiments"):
                failed = run(repo, wanted, given.workers, stop)
        for name, experiment in experiments.items():
            try:
                print(f"experiments: {page(repo, name, experiment, arms[name]).relative_to(repo)}", flush=True)
            except UserError as error:  # of this page: the others are written all the same
                failed[name] = str(error).removeprefix(f"{name}: ")
    except (UserError, stages.Stopped) as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    for name, why in failed.items():
        print(f"experiments: {name}: {why}", file=sys.stderr)
    return 1 if failed else 0


def _list(repo: Path, experiments: Mapping[str, Experiment], arms: Mapping[str, Arms]) -> None:
    for name, experiment in experiments.items():
        try:
            done = sum(map(len, recorded(repo, experiment, arms[name]).values()))
        except UserError as error:  # a record of other figures
            print(f"{name:14}{str(error).removeprefix(f'{name}: ')}")
            continue
        count = f"{len(experiment.arms)} × {len(experiment.seeds)} runs, {done} recorded"
        print(f"{name:14}{count:26}{experiment.question}")


def _warn(repo: Path, workers: int) -> None:
    if edited := worktrees.edited(repo):
        print(f"note: points run HEAD, not your edits to {edited}")
    if workers > 1 and "OMP_NUM_THREADS" not in os.environ:
        print(f"note: each of {workers} workers takes all cores; set OMP_NUM_THREADS")


if __name__ == "__main__":
    sys.exit(main())
