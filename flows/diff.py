"""diff: what changed between two revisions, and whether the models are really better: one page, in Markdown and in HTML.

    python -m flows.diff HEAD~1                     HEAD~1 against the workspace
    python -m flows.diff main my-branch             two revisions; nothing is checked out
    python -m flows.diff HEAD~1 --out tmp/diff.md   the HTML page, with the curves, is written beside: tmp/diff.html

Params, figures and curves are what `dvc params|metrics|plots diff` say, stages are compared by dvc.lock. Measures of the
models are tested, not subtracted: item by item where the answers of both revisions can be had (workspace, cache or remote),
by the intervals in data/evaluate/*.json where they can't. The tests and the words are those of the report: tasks/compare.py,
corrected within each model.
"""

import argparse
import graphlib
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import mistune

from flows.stages import flat
from tasks import chart, compare, params
from tasks.compare import BINARY, MEASURES, SIGNS, Difference, Item, Measure
from tasks.params import Report, UserError

ANSWERS = re.compile(r"(?:.*/)?evaluate/(?P<model>[^/]+)\.answers\.jsonl")
FIGURES = re.compile(r"(?:.*/)?evaluate/(?P<model>[^/]+)\.json")
MODELS = ("dpo", "sft", "base")  # what matters most first; others come after
WORKSPACE = "workspace"
SEED = 42  # of the bootstrap
SHOWN = 12  # rows of a table before the rest is folded; what is significant is never folded
LIMIT = 60_000  # characters of the Markdown: a comment on GitHub takes 65,536
STYLE = Path(__file__).parents[1] / "tasks/page.css"


@dataclass(frozen=True)
class Stage:
    """A stage whose entry in dvc.lock differs: `why` of its own, `after` the stages that changed what it reads."""

    name: str
    why: tuple[str, ...]
    after: tuple[str, ...]
    outs: bool  # its outputs differ too


@dataclass(frozen=True)
class Compared:
    """One measure of one model at both revisions.

    `found` is the paired comparison. Where the answers are not at hand it is none, and the call is by `intervals`, those of the
    two means.
    """

    model: str
    measure: Measure
    before: float
    after: float
    call: str  # better, worse, changed, no different; same: on every item
    found: Difference | None = None
    intervals: tuple[tuple[float, float], tuple[float, float]] | None = None

    @property
    def significant(self) -> bool:
        return self.call in ("better", "worse", "changed")

    @property
    def weight(self) -> tuple[Any, ...]:
        """Rows are sorted by this: worse, better, changed, moved, the same; then by p, or by the share that it moved."""
        moved = abs(self.after - self.before) / max(abs(self.before), abs(self.after), 1e-9)
        order = MODELS.index(self.model) if self.model in MODELS else len(MODELS)
        p = self.found.p_holm if self.found else 1.0
        return (list(SIGNS).index(self.call), p, order, -moved, self.measure.key)


@dataclass(frozen=True)
class Curve:
    """A plot that DVC knows, at both revisions: (x, y) in the order of the file; of bars (label, length)."""

    path: str
    title: str
    x: str
    y: str
    before: tuple[tuple[Any, float], ...]
    after: tuple[tuple[Any, float], ...]
    bar: bool


@dataclass(frozen=True)
class Page:
    """All that the page says. `params` and `figures` are (file or model, name, before, after)."""

    names: tuple[str, str]
    titles: tuple[str, str]  # the revisions, with their subjects
    stages: list[Stage]
    untouched: list[str]
    params: list[tuple[str, Any, Any]]
    params_kept: list[tuple[str, Any]]
    measures: list[Compared]
    figures: list[tuple[str, str, Any, Any]]
    figures_kept: int
    curves: list[Curve]
    curves_kept: int
    alpha: float
    notes: list[str] = field(default_factory=list)

    @property
    def significant(self) -> list[Compared]:
        return [m for m in self.measures if m.significant]


def diff(repo: Path, before: str, after: str | None = None) -> Page:
    """Compare revision `before` with `after` (None: the workspace) of the repository in `repo`. Changes nothing there.

    Raises:
        UserError: no such revision, or DVC can't read one of them.
    """
    report: Report = params.load(repo / "params.yaml")["report"]
    titles = (_title(repo, before), _title(repo, after) if after else "the workspace")
    locks = _lock(repo, before), _lock(repo, after)
    revisions = [before, *([after] if after else [])]
    with ThreadPoolExecutor(4) as pool, tempfile.TemporaryDirectory() as folder:
        asked = {
            "params": pool.submit(_dvc, repo, "params", "diff", "--all", "--json", *revisions),
            "metrics": pool.submit(_dvc, repo, "metrics", "diff", "--all", "--json", *revisions),
            "plots": pool.submit(_dvc, repo, "plots", "diff", "--json", "--split", "--out", folder, *revisions),
        }
        if after is None:
            asked["status"] = pool.submit(_dvc, repo, "status", "--json")
        items, notes = _answers(repo, (before, after), locks, pool)
        said = {name: future.result() for name, future in asked.items()}
    if stale := said.get("status"):
        notes.insert(0, f"Not up to date in the workspace, so its figures may be of another run: {', '.join(stale)}.")
    for name, lock in zip((before, after or WORKSPACE), locks, strict=True):
        if not lock:
            notes.insert(0, f"{name} has no dvc.lock: no stage had run there.")
    changed, untouched = stages_between(*locks)
    notes += _ruler(changed)
    measures, figures, kept = _measures(said["metrics"], items, report, notes)
    found = [(name, v.get("old"), v.get("new")) for file in said["params"].values() for name, v in file.items()]
    curves = list(_curves(said["plots"].get("data", {}), before, after or WORKSPACE))
    drawn = sorted((c for c in curves if c.before != c.after), key=_first_losses)
    return Page(
        names=(before, after or WORKSPACE),
        titles=titles,
        stages=changed,
        untouched=untouched,
        params=sorted((row for row in found if row[1] != row[2]), key=lambda row: row[0]),
        params_kept=sorted((row[0], row[1]) for row in found if row[1] == row[2]),
        measures=sorted(measures, key=lambda m: m.weight),
        figures=sorted(figures, key=_moved),
        figures_kept=kept,
        curves=drawn,
        curves_kept=len(curves) - len(drawn),
        alpha=report.alpha,
        notes=notes,
    )


# --- what the revisions hold -----------------------------------------------------------------------------------------


def _git(repo: Path, *arguments: str) -> str | None:
    """Its output; None if it failed."""
    done = subprocess.run(["git", *arguments], cwd=repo, capture_output=True, text=True)  # noqa: S603, S607
    return done.stdout if done.returncode == 0 else None


def _title(repo: Path, revision: str) -> str:
    """
    Raises:
        UserError: no such revision.
    """
    commit = _git(repo, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if commit is None:
        raise UserError(f"{revision}: no such revision here; `git log` shows them, `git fetch` brings those of others")
    short, _, subject = (_git(repo, "log", "-1", "--format=%h %s", commit.strip()) or "").strip().partition(" ")
    return f"{revision} ({short}, {subject})"


def _lock(repo: Path, revision: str | None) -> dict[str, Any]:
    """The stages of dvc.lock, by name; {} if there is none.

    Raises:
        UserError: it was cut off, or holds both sides of a merge.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    path = repo / "dvc.lock"
    text = _git(repo, "show", f"{revision}:./dvc.lock") if revision else path.read_text() if path.is_file() else None
    try:
        return dict((YAML(typ="safe").load(text) or {}).get("stages") or {}) if text else {}
    except (YAMLError, AttributeError):
        raise UserError(
            f"{revision or 'here'}: dvc.lock is no YAML, or has no stages; `python -m flows.mend --quick` says what to do"
        ) from None


def _dvc(repo: Path, *arguments: str) -> dict[str, Any]:
    """What a DVC command says in JSON.

    Raises:
        UserError: it failed, with its own words.
    """
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, stdin=subprocess.DEVNULL)  # noqa: S603
    if done.returncode:
        if "is busy, it is being blocked by" in done.stderr:
            raise UserError("another dvc works in this folder: wait for its end, or compare two revisions")
        errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise UserError(f"dvc {' '.join(arguments[:2])}: {errors[0] if errors else 'failed'}")
    found: dict[str, Any] = json.loads(done.stdout or "{}")
    return found


def _answers(
    repo: Path,
    revisions: tuple[str, str | None],
    locks: tuple[dict[str, Any], dict[str, Any]],
    pool: ThreadPoolExecutor,
) -> tuple[dict[str, tuple[Sequence[Item], Sequence[Item]] | None], list[str]]:
    """model → its items at both revisions (None: the same file at both), where these can be had; and what can't be."""
    hashes: list[dict[str, tuple[str, str]]] = []  # model → path, md5
    for lock in locks:
        outs = (out for stage in lock.values() for out in stage.get("outs", []))
        hashes.append({m["model"]: (out["path"], out["md5"]) for out in outs if (m := ANSWERS.fullmatch(out["path"]))})
    found: dict[str, tuple[Sequence[Item], Sequence[Item]] | None] = {}
    both = sorted(hashes[0].keys() & hashes[1].keys())
    asked = {}
    for model in both:
        if hashes[0][model][1] == hashes[1][model][1]:
            found[model] = None
        else:
            asked[model] = [pool.submit(_file, repo, h[model][0], r) for h, r in zip(hashes, revisions, strict=True)]
    missing = []
    for model, futures in asked.items():
        texts = [future.result() for future in futures]
        if texts[0] is not None and texts[1] is not None:
            path = hashes[0][model][0]
            found[model] = (compare.parse(texts[0], path), compare.parse(texts[1], path))
        else:
            missing += [f"{model} at {r or WORKSPACE}" for t, r in zip(texts, revisions, strict=True) if t is None]
    notes = []
    if missing:
        notes.append(
            f"The answers of {', '.join(missing)} are neither in the cache nor on the remote (`dvc push` there, or `make share` "
            "here): these models are compared by the intervals of their means, which finds less than a paired test."
        )
    if alone := sorted(hashes[0].keys() ^ hashes[1].keys()):
        notes.append(f"Evaluated at one of the two revisions only, so not compared: {', '.join(alone)}.")
    return found, notes


def _file(repo: Path, path: str, revision: str | None) -> str | None:
    """An output of a stage at a revision: from the workspace, the cache or the remote; None if it is in none of them."""
    if revision is None and (repo / path).is_file():
        return (repo / path).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "file"
        command = [sys.executable, "-m", "dvc", "get", ".", path, "--out", str(target)]
        command += ["--rev", revision] if revision else []
        subprocess.run(command, cwd=repo, capture_output=True, stdin=subprocess.DEVNULL)  # noqa: S603
        return target.read_text(encoding="utf-8") if target.is_file() else None


# --- stages ----------------------------------------------------------------------------------------------------------


def stages_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[Stage], list[str]]:
    """(stages whose entries in dvc.lock differ, names of the others), each in the order of the graph."""
    order = list(graphlib.TopologicalSorter(_upstream({**before, **after})).static_order())
    changed: dict[str, Stage] = {}
    for name in order:
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        if old is None or new is None:
            changed[name] = Stage(name, ("new" if old is None else "removed",), (), True)
            continue
        reads = _upstream({**before, **after})[name]
        made = {out["path"] for up in reads for lock in (before, after) for out in lock.get(up, {}).get("outs", [])}
        why = ["command"] if old["cmd"] != new["cmd"] else []
        moved = [path for path in _moved_files(old, new, "deps") if not any(_within(path, out) for out in made)]
        why += [*_moved_params(old, new), *moved]
        outs = bool(_moved_files(old, new, "outs"))
        if not why and not outs and not _moved_files(old, new, "deps"):
            continue  # written in another way, the same content
        after_ = tuple(up for up in order if up in reads and up in changed and changed[up].outs)
        changed[name] = Stage(name, tuple(why), after_, outs)
    return list(changed.values()), [name for name in order if name not in changed]


def _upstream(lock: Mapping[str, Any]) -> dict[str, set[str]]:
    makes = {out["path"]: name for name, stage in lock.items() for out in stage.get("outs", [])}
    return {
        name: {
            maker
            for dep in stage.get("deps", [])
            for path, maker in makes.items()
            if maker != name and (_within(dep["path"], path) or _within(path, dep["path"]))
        }
        for name, stage in lock.items()
    }


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def _moved_files(old: Mapping[str, Any], new: Mapping[str, Any], kind: str) -> list[str]:
    first, second = ({f["path"]: f.get("md5") for f in stage.get(kind, [])} for stage in (old, new))
    return [path for path in sorted(first.keys() | second.keys()) if first.get(path) != second.get(path)]


def _moved_params(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    first, second = (
        {key: value for file in (stage.get("params") or {}).values() for key, value in flat(file)}
        for stage in (old, new)
    )
    return [key for key in sorted(first.keys() | second.keys()) if first.get(key) != second.get(key)]


def _ruler(changed: Sequence[Stage]) -> list[str]:
    """A note if what measures has changed, not only what is measured."""
    found = sorted(
        {why for s in changed if s.name.startswith("evaluate") for why in s.why if why not in ("new", "removed")}
    )
    if not found:
        return []
    return [f"The evaluation itself changed ({', '.join(found)}): a difference may come from how it was measured."]


# --- measures --------------------------------------------------------------------------------------------------------


def _measures(
    metrics: Mapping[str, Any],
    items: Mapping[str, tuple[Sequence[Item], Sequence[Item]] | None],
    report: Report,
    notes: list[str],
) -> tuple[list[Compared], list[tuple[str, str, Any, Any]], int]:
    """(measures of the models, other figures that differ, number of those that do not); adds to `notes`."""
    measures: list[Compared] = []
    identical = [model for model, both in items.items() if both is None]
    if identical:
        notes.append(f"The same answers, byte for byte: {', '.join(identical)}.")
    for model, both in items.items():
        if both:
            shared = _shared(*both)
            measures += paired(model, shared, report.alpha, report.bootstrap)
            if len(shared) < max(map(len, both)):
                notes.append(
                    f"{model}: {len(shared)} questions are the same at both revisions, of {len(both[0])} before and "
                    f"{len(both[1])} after; only these are compared."
                )
    figures, kept = [], 0
    covered = {(m.model, m.measure.key) for m in measures} | {(model, m.key) for model in identical for m in MEASURES}
    for path, found in metrics.items():
        match = FIGURES.fullmatch(path)
        model = match["model"] if match else ""
        for name, value in found.items():
            stem, _, end = name.rpartition(".")
            if match and end in ("value", "low", "high", "n") and f"{stem}.n" in found:
                if end == "value" and (model, stem) not in covered:
                    ends = {e: found.get(f"{stem}.{e}", {}) for e in ("value", "low", "high", "n")}
                    old, new = ({e: v.get(side) for e, v in ends.items()} for side in ("old", "new"))
                    if None in (*old.values(), *new.values()):
                        figures.append((path, stem, old["value"], new["value"]))
                    else:
                        measures.append(by_intervals(model, stem, old, new))
            elif value.get("old") == value.get("new"):
                kept += 1
            else:
                figures.append((path, name, value.get("old"), value.get("new")))
    return measures, figures, kept


def _shared(before: Sequence[Item], after: Sequence[Item]) -> list[tuple[Item, Item]]:
    """The same questions, with the same reference, at both revisions."""
    first = {item["id"]: item for item in before}
    same = ("set", "task", "question", "reference")
    pairs = [(first[item["id"]], item) for item in sorted(after, key=lambda item: item["id"]) if item["id"] in first]
    return [(a, b) for a, b in pairs if all(a.get(key) == b.get(key) for key in same)]


def paired(model: str, pairs: Sequence[tuple[Item, Item]], alpha: float, resamples: int) -> list[Compared]:
    """Every measure that both answers have, tested in pairs. Scores that `MEASURES` does not know are watched too."""
    known = {measure.field for measure in MEASURES}
    fields = {key: None for pair in pairs for item in pair for key, value in item.items() if isinstance(value, float)}
    others = [Measure(name, name, (), (), name, 0) for name in fields if name not in known]
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    found = compare.compare(before, after, (*MEASURES, *others), alpha=alpha, resamples=resamples)
    return [Compared(model, d.measure, d.before, d.after, "same" if d.same else d.call, d) for d in found]


def by_intervals(model: str, key: str, before: Mapping[str, float], after: Mapping[str, float]) -> Compared:
    """Two means of which only `value`, `low`, `high` and `n` are known: different if their intervals don't overlap.

    Of 0/1 measures Wilson's interval (Wilson 1927) is taken: the bootstrap's has no width at 0 and at 1.
    """
    from statsmodels.stats.proportion import proportion_confint

    measure = next((m for m in MEASURES if m.key == key), Measure(key, key, (), (), key.rpartition(".")[2], 0))
    sides = []
    for side in (before, after):
        ends = [side["value"], side["low"], side["high"]]
        if measure.field in BINARY:
            ends[1:] = proportion_confint(round(side["value"] * side["n"]), side["n"], method="wilson")
        if key.endswith("perplexity"):
            ends = [math.log(value) for value in ends]
        sides.append([float(value) for value in ends])
    (old, *first), (new, *second) = sides
    differs = first[1] < second[0] or second[1] < first[0]
    call = "same" if dict(before) == dict(after) else compare.direction(measure.better, new - old, differs)
    return Compared(model, measure, old, new, call, intervals=((first[0], first[1]), (second[0], second[1])))


# --- curves ----------------------------------------------------------------------------------------------------------


def _curves(plots: Mapping[str, Any], *revisions: str) -> Iterator[Curve]:
    """Of `dvc plots diff --json --split`; pictures are left out."""
    for path, found in plots.items():
        for plot in found:
            anchors = plot.get("anchor_definitions") or {}
            x, y = (str(anchors.get(f"<DVC_METRIC_{axis}_LABEL>")) for axis in "XY")
            rows = anchors.get("<DVC_METRIC_DATA>") or []
            if plot.get("type") != "vega" or not rows or x not in rows[0] or y not in rows[0]:
                continue
            mark = plot["content"].get("mark")
            bar = (mark.get("type") if isinstance(mark, dict) else mark) == "bar"
            sides = []
            for revision in revisions:
                mine = [row for row in rows if row.get("rev") == revision]
                points = [(str(row[y]), _float(row[x])) if bar else (_float(row[x]), _float(row[y])) for row in mine]
                sides.append(tuple(p for p in points if all(not isinstance(v, float) or math.isfinite(v) for v in p)))
            title = anchors.get("<DVC_METRIC_TITLE>") or path
            if short := re.fullmatch(r"(?:data/)?([^/]+)/plots/(?:metrics/)?(.+)\.\w+", title):
                title = f"{short[1]}: {short[2]}"
            if any(sides):
                yield Curve(path, title, x, y, sides[0], sides[1], bar)


def _float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _first_losses(curve: Curve) -> tuple[Any, ...]:
    words = ("loss", "rewards/margins", "rewards/accuracies", "kl", "rewards")
    rank = next((i for i, word in enumerate(words) if word in curve.title), len(words))
    return (curve.bar, rank, curve.title)


def _svg(curve: Curve, names: tuple[str, str]) -> str:
    """Both revisions over each other."""
    sides = zip(names, (curve.before, curve.after), ("--before", "--after"), strict=True)
    lines = [chart.Line(name, side, colour) for name, side, colour in sides if side]
    return chart.svg(curve.title, lines, x=curve.x, bar=curve.bar, slug=curve.path)


# --- the page --------------------------------------------------------------------------------------------------------


def summary(page: Page) -> str:
    """One sentence: what differs, and what that did."""

    def count(number: int, word: str) -> str:
        return f"{number} {word}{'' if number == 1 else 's'}"

    total = len(page.stages) + len(page.untouched)
    calls = [m.call for m in page.measures]
    said = [f"{calls.count(call)} {call}" for call in ("worse", "better", "changed") if call in calls]
    tested = sum(call != "same" for call in calls)
    if said:
        measured = f"of {count(len(calls), 'measure')}, significantly {', '.join(said)}"
    elif tested:
        measured = f"of {count(len(calls), 'measure')}, {tested} moved, none significantly"
    else:
        measured = "no measure moved"
    changed = f"{len(page.stages)} of {count(total, 'stage')} and {count(len(page.params), 'parameter')} changed"
    return f"{changed}; {measured}"


def markdown(page: Page) -> str:
    """The page without its curves, short enough for a comment: what is folded is left out where it has to be, then the end."""
    text = _markdown(page)
    if len(text) > LIMIT:
        text = _markdown(page, short=True)
    if len(text) > LIMIT:
        text = text[: text.rindex("\n", 0, LIMIT - 100)] + "\n\nThe rest is on the HTML page.\n"
    return text


def _markdown(page: Page, short: bool = False) -> str:
    before, after = page.names

    def fold(title: str, body: str) -> str:
        if short:
            return f"{title}: left out here, the HTML page has them."
        return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"

    def table(head: Sequence[str], rows: Sequence[Sequence[str]], visible: int, what: str) -> list[str]:
        lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
        cells = [f"| {' | '.join(row)} |" for row in rows]
        out = ["\n".join([*lines, *cells[:visible]])] if cells else ["None differs."]
        if cells[visible:]:
            out.append(fold(f"{len(cells) - visible} {what}", "\n".join([*lines, *cells[visible:]])))
        return out

    parts = ["<!-- reforge diff -->", f"# {_text(before)} → {_text(after)}", f"**{_text(summary(page))}.**"]
    parts.append(f"{_text(page.titles[0])} → {_text(page.titles[1])}")
    if page.notes:
        parts.append("\n".join(f"- {_text(note)}" for note in page.notes))

    parts.append("## Measures")
    rows = [m for m in page.measures if m.call != "same"]
    same = [m for m in page.measures if m.call == "same"]
    significant = len(page.significant)
    if rows and not significant:
        parts.append(
            "None differs significantly. What moved most, by p:"
            if any(m.found for m in rows)
            else "None differs significantly."
        )
    head = ("Model", "Measure", _text(before), _text(after), "Difference, 95 %", "Effect", "p (Holm)", "")
    parts += table(head, [_row(m) for m in rows], max(significant, SHOWN), "more that moved, none significantly")
    if same:
        names = [f"{_text(m.model)}: {_text(m.measure.label)} {compare.value(m.measure, m.after)}" for m in same]
        parts.append(fold(f"{len(same)} the same on every item", "\n".join(f"- {name}" for name in names)))
    if not page.measures:
        parts.append("None moved.")

    parts.append("## Parameters")
    set_to = [(_code(name), _code(old), _code(new)) for name, old, new in page.params]
    parts += table(("Parameter", _text(before), _text(after)), set_to, 40, "more")
    if page.params_kept:
        kept = "\n".join(f"- {_code(name)} {_code(value)}" for name, value in page.params_kept)
        parts.append(fold(f"{len(page.params_kept)} the same", kept))

    parts.append("## Stages")
    touched = [
        (
            _text(s.name),
            ", ".join(map(_code, s.why)) or "–",
            ", ".join(map(_text, s.after)) or "–",
            "differ" if s.outs else "the same bytes",
        )
        for s in page.stages
    ]
    parts += table(("Stage", "Changed of its own", "After", "Outputs"), touched, 40, "more")
    if page.untouched:
        parts.append(fold(f"{len(page.untouched)} unchanged", _text(", ".join(page.untouched))))

    parts.append("## Other figures")
    moved = [
        (_text(f"{_short(path)} {name}"), _number(old), _number(new), _delta(old, new))
        for path, name, old, new in page.figures
    ]
    parts += table(("Figure", _text(before), _text(after), "Difference"), moved, SHOWN, "more that differ")
    parts.append(
        f"{page.figures_kept} are the same. One run gives one such figure, so there is no significance to tell."
    )

    parts.append("## Curves")
    parts.append("<!-- curves -->")
    ends = [(_text(c.title), _ends(c.before), _ends(c.after)) for c in page.curves if not c.bar]
    parts += table(("Curve, first → last", _text(before), _text(after)), ends, SHOWN, "more that differ")
    parts.append(f"{page.curves_kept} plots are the same.")

    parts.append("## How differences are judged")
    parts.append(
        "Answers to the same questions are compared in pairs: McNemar's exact test for what is right or wrong, Wilcoxon's "
        "signed-rank test for scores, a 95 % bootstrap interval of the mean difference, Holm's correction over the measures of "
        f"a model. Better or worse (changed, where neither direction is) is said only if the corrected p is below {page.alpha:g}, "
        "the interval excludes 0 and the difference is above the noise of decoding. The effect is Cohen's h of two proportions, or "
        "r, the rank-biserial correlation. Where a row has no p, the answers were not at hand: it differs if the two intervals don't "
        "overlap. “No different” says that none was shown, not that there is none. It holds for one training run and one seed "
        "at each revision."
    )
    return "\n\n".join(parts) + "\n"


def html(page: Page) -> str:
    """One self-contained page: what `markdown` says, and the curves of both revisions over each other."""
    convert = mistune.create_markdown(escape=False, plugins=["table"])
    body = str(convert(_markdown(page)))
    body = re.sub(r"(▼|▲|◆) (worse|better|changed)", r'<span class="call \2">\1 \2</span>', body)
    body = body.replace("<table>", '<div class="scroll" tabindex="0"><table>').replace("</table>", "</table></div>")
    figures = [
        f"<figure><figcaption>{escape(curve.title)}</figcaption>{_svg(curve, page.names)}</figure>"
        for curve in page.curves
    ]
    if figures:
        key = '<p class="key"><span class="before"><i></i>{}</span><span class="after"><i></i>{}</span></p>'
        drawn = key.format(*map(escape, page.names)) + f'<div class="cards">{"".join(figures[:SHOWN])}</div>'
        if more := figures[SHOWN:]:
            drawn += f'<details><summary>{len(more)} more that differ</summary><div class="cards">{"".join(more)}</div></details>'
        body = body.replace("<!-- curves -->", drawn)
    title = escape(f"{page.names[0]} → {page.names[1]}")
    return PAGE.replace("STYLE", STYLE.read_text(encoding="utf-8")).replace("TITLE", title).replace("BODY", body)


def _row(m: Compared) -> tuple[str, ...]:
    call = f"{SIGNS[m.call]} {m.call}"
    ends = [f" [{', '.join(compare.value(m.measure, end) for end in pair)}]" for pair in m.intervals or ()] or ["", ""]
    values = (compare.value(m.measure, m.before) + ends[0], compare.value(m.measure, m.after) + ends[1])
    gap, effect, p = compare.delta(m.measure, m.after - m.before, unit=True), "–", "–"
    if d := m.found:
        gap = f"{d.gap} {d.interval}, {d.up} up, {d.down} down of {d.n}"
        effect = f"{'h' if m.measure.field in BINARY else 'r'} {d.effect:+.2f}, {d.size}".replace("-", "−")
        p = compare.chance(d.p_holm) + ("; below the noise of decoding" if d.drowned else "")
    return (_text(m.model), _text(m.measure.label), *values, gap, effect, p, f"**{call}**" if m.significant else call)


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return (f"{value:,}".replace(",", "\u202f") if isinstance(value, int) else f"{value:.4g}").replace("-", "−")


def _delta(old: Any, new: Any) -> str:
    if not _is_number(old) or not _is_number(new):
        return "new" if old is None else "gone" if new is None else "–"
    share = f" ({100 * (new - old) / abs(old):+.1f} %)" if old else ""
    return f"{new - old:+.4g}{share}".replace("-", "−")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _moved(row: tuple[str, str, Any, Any]) -> tuple[Any, ...]:
    """The largest relative change first; what is no number last."""
    path, name, old, new = row
    if not _is_number(old) or not _is_number(new):
        return (1, 0.0, path, name)
    return (0, -abs(new - old) / max(abs(old), abs(new)), path, name)


def _short(path: str) -> str:
    """data/dpo/metrics.json → dpo, data/evaluate/sft.json → evaluate/sft."""
    return path.removeprefix("data/").removesuffix(".json").removesuffix("/metrics")


def _ends(points: Sequence[tuple[Any, float]]) -> str:
    if not points:
        return "–"
    return _number(points[0][1]) + (f" → {_number(points[-1][1])}" if len(points) > 1 else "")


def _text(value: Any) -> str:
    """A text as itself: no markup, no HTML, one line."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~$#])|(?<!\w)_|_(?!\w)", lambda m: f"&#{ord(m[0])};", text)


def _code(value: Any) -> str:
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "–" if value is None else f"<code>{_text(shown)}</code>"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>TITLE</title>
<style>
STYLE</style>
</head>
<body>
<main class="diff">
BODY
</main>
</body>
</html>
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if the page was written, whatever it says."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.diff", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", metavar="REV", help="a commit, branch or tag")
    parser.add_argument("after", metavar="REV2", nargs="?", help="another; default: the workspace")
    parser.add_argument("--out", type=Path, default=Path("tmp/diff.md"), metavar="FILE", help="default: %(default)s")
    given = parser.parse_args(arguments)
    try:
        if given.out.suffix != ".md":
            raise UserError(f"--out: expected a name that ends in .md, found {given.out}")
        page = diff(Path.cwd(), given.before, given.after)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(markdown(page), encoding="utf-8")
        given.out.with_suffix(".html").write_text(html(page), encoding="utf-8")
    except (UserError, OSError) as error:
        print(f"diff: {error}", file=sys.stderr)
        return 1
    print(f"diff: {summary(page)}: {given.out.with_suffix('.html')}, {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
