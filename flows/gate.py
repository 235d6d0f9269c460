"""The gate: does a retrained model (the challenger) take the place of the one in use (the champion)?

Pure statistics over the scores of single items, as `evaluate` writes them to `data/evaluate/*.answers.jsonl`: no Prefect, no
DVC, no files but those that `read` is given. Both models answered the same questions, so every comparison is paired by item:
the mean of the differences, with a percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13). The challenger is
*not worse* when even the bad end of that interval stays within the margin (a non-inferiority test). All limits must hold, and
a decision that needs all of several tests to agree needs no correction for their number (Berger 1982, intersection-union).
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tasks.compare import Item, alike, bootstrap, concepts_of, finite, floor, read
from tasks.params import Gate, Limit, UserError

__all__ = ["Row", "Verdict", "check", "decide", "read"]

SEED = 0
FEWEST = 10  # common items: an interval over fewer is no evidence
GENERAL = "general.*.correct"
# a difference that misses a margin by rounding does not miss it
ROUNDING = 1e-9


@dataclass(frozen=True)
class Row:
    """One limit and what was found.

    Attributes:
        measure: SET.TASK.MEASURE, or that of the comparison with the base.
        n: items that both sides have a score of.
        champion: mean over its own items (of the base, where that is what the challenger is compared with).
        challenger: mean over its own items; this is what a floor or ceiling holds for.
        difference: mean of challenger less champion over the common items, with the interval from `low` to `high`.
        limit: what was asked, in words.
        reason: what was found, in words.
    """

    measure: str
    n: int
    champion: float | None
    challenger: float | None
    difference: float | None
    low: float | None
    high: float | None
    limit: str
    ok: bool
    reason: str


@dataclass(frozen=True)
class Verdict:
    """Whether the challenger is promoted, and why; `notes` are for the reader and decide nothing."""

    promoted: bool
    sentence: str
    rows: tuple[Row, ...]
    confidence: float
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The verdict as a page: the sentence, a table with a line per limit, the notes."""
        lines = [
            f"# {'Promoted' if self.promoted else 'Rejected'}",
            "",
            self.sentence,
            "",
            f"| | measure | n | champion | challenger | difference [{self.confidence * 100:g} %] | limit | finding |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in self.rows:
            span = "" if row.low is None or row.high is None else f" [{row.low:+.3f}, {row.high:+.3f}]"
            cells = [
                "✓" if row.ok else "✗",
                f"`{row.measure}`",
                str(row.n),
                _number(row.champion),
                _number(row.challenger),
                ("" if row.difference is None else f"{row.difference:+.3f}") + span,
                row.limit,
                row.reason,
            ]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"


def check(params: Gate) -> None:
    """Refuse keys that can't name a measure, before anything is trained.

    Raises:
        UserError: naming the key.
    """
    for key in params.limits:
        parts = key.split(".")
        if len(parts) != 3 or not all(parts) or "*" in (parts[0], parts[2]):
            raise UserError(f"gate.limits.{key}: expected SET.TASK.MEASURE, with `*` for any task")


def decide(
    champion_items: Sequence[Item] | None,
    challenger_items: Sequence[Item],
    base_items: Sequence[Item],
    params: Gate,
) -> Verdict:
    """Whether the challenger is promoted.

    Args:
        champion_items: None on a first run; floors and ceilings alone decide then.
        base_items: of the untuned model, for what was forgotten since.

    Raises:
        UserError: a key of `gate.limits` that is no SET.TASK.MEASURE.
    """
    check(params)
    rows = [_row(key, limit, champion_items, challenger_items, params) for key, limit in params.limits.items()]
    general = _general(base_items, challenger_items, params)
    notes = [] if general else ["No item of the set `general`: whether anything was forgotten is not known."]
    if general:
        rows.append(general)
    failed = [row for row in rows if not row.ok]
    if not params.limits:
        sentence = "Rejected: gate.limits of params.yaml is empty, so that nothing says what a model must hold."
    elif failed:
        sentence = "Rejected: " + "; ".join(f"{row.measure} {row.reason}{_span(row)}" for row in failed) + "."
    elif champion_items is None:
        sentence = f"Promoted: the first model, within all {len(rows)} limits."
    else:
        better = [f"{row.measure} ({row.difference:+.3f})" for row in rows if row.reason.startswith("better")]
        if better:
            rest = ", and within all other limits" if len(better) < len(rows) else ""
            sentence = f"Promoted: better in {', '.join(better)}{rest}."
        elif all(row.reason.startswith("no different") for row in rows if row is not general):
            sentence = "Promoted: no different from the champion, item by item."
        else:
            sentence = f"Promoted: not worse than the champion, within all {len(rows)} limits."
    return Verdict(bool(params.limits) and not failed, sentence, tuple(rows), params.confidence, tuple(notes))


def _row(
    key: str, limit: Limit, champion_items: Sequence[Item] | None, challenger_items: Sequence[Item], params: Gate
) -> Row:
    """One limit. A score that is missing or no finite number counts against the challenger, and as missing with the champion."""
    less = limit.ceiling is not None
    asked = (
        [] if champion_items is None else [f"{'≤' if less else '≥'} champion {'+' if less else '−'} {limit.margin:g}"]
    )
    asked += [f"≥ {limit.floor:g}"] if limit.floor is not None else []
    asked += [f"≤ {limit.ceiling:g}"] if limit.ceiling is not None else []
    theirs, _ = _scores(champion_items or (), key)
    ours, broken = _scores(challenger_items, key)
    by_id = [{str(item["id"]): item for item in items} for items in (champion_items or (), challenger_items)]
    measure = key.split(".")[2]
    common = sorted(i for i in theirs.keys() & ours.keys() if alike(measure, by_id[0][i], by_id[1][i]))
    mean, champion = _mean(ours), _mean(theirs)
    difference = low = high = None
    if common:
        about = concepts_of([by_id[1][i] for i in common])
        difference, low, high = _interval([ours[i] - theirs[i] for i in common], about, params)

    def row(ok: bool, reason: str) -> Row:
        return Row(key, len(common), champion, mean, difference, low, high, ", ".join(asked), ok, reason)

    if broken:
        return row(False, f"is no finite number in {_items(broken)} of the challenger")
    if mean is None:
        known = sorted({_key(item, m) for item in challenger_items for m, v in item.items() if _is_score(v)})
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        return row(False, "is in no item of the challenger" + (f", did you mean `{close[0]}`?" if close else ""))
    if gone := _unscored(theirs, ours, key, by_id[1]):
        return row(False, gone)
    # crossed whatever the champion has, hence before any comparison
    if limit.floor is not None and mean < limit.floor - ROUNDING:
        return row(False, f"is {mean:.3f}, below its floor {limit.floor:g}")
    if limit.ceiling is not None and mean > limit.ceiling + ROUNDING:
        return row(False, f"is {mean:.3f}, above its ceiling {limit.ceiling:g}")
    if champion_items is None:
        bounded = limit.floor is not None or limit.ceiling is not None
        return row(True, "within its limit" if bounded else "no champion to compare with")
    alone = [f"{_items(sorted(ids))} only of the {side}" for side, ids in (("champion", theirs.keys() - ours.keys()), ("challenger", ours.keys() - theirs.keys())) if ids]  # fmt: skip
    aside = f" ({'; '.join(alone)})" if alone else ""
    if len(common) < FEWEST:
        return row(False, f"has {len(common)} items in common with the champion, fewer than {FEWEST}{aside}")
    assert low is not None
    assert high is not None
    worst, best = (-high, -low) if less else (low, high)
    # what decoding again would move it by is no difference, either way; the margin it must keep all the same
    drowned = abs(difference or 0.0) <= _floor(key, common, champion_items, challenger_items)
    if worst < -limit.margin - ROUNDING:
        by = f"is worse by {-best:.3f} to" if best < -limit.margin and not drowned else "may be worse by up to"
        return row(False, f"{by} {-worst:.3f}, the margin is {limit.margin:g}{aside}")
    if all(ours[i] == theirs[i] for i in common):
        return row(True, "no different, item by item" + aside)
    if drowned and not worst <= 0 <= best:
        return row(True, "not worse, below the noise of decoding" + aside)
    if worst > 0:
        return row(True, "better" + aside)
    return row(True, ("worse, within the margin" if best < 0 else "not worse") + aside)


def _general(base_items: Sequence[Item], challenger_items: Sequence[Item], params: Gate) -> Row | None:
    """What was forgotten since the base: the mean itself must hold, as with a floor. None: nothing to measure it on."""
    base, _ = _scores(base_items, GENERAL)
    ours, broken = _scores(challenger_items, GENERAL)
    if not base and not ours and not broken:
        return None
    common = sorted(base.keys() & ours.keys())
    difference = low = high = None
    if common:
        about = {str(item["id"]): item for item in challenger_items}
        concepts = concepts_of([about[i] for i in common])
        difference, low, high = _interval([ours[i] - base[i] for i in common], concepts, params)
    if broken:
        ok, reason = False, f"is no finite number in {_items(broken)} of the challenger"
    elif gone := _unscored(base, ours, GENERAL, {str(item["id"]): item for item in challenger_items}, "the base"):
        ok, reason = False, gone
    elif difference is None or len(common) < FEWEST:
        ok, reason = False, f"has {len(common)} items in common with the base, fewer than {FEWEST}"
    else:
        ok = -difference <= params.max_general_drop + ROUNDING
        reason = "within its limit" if ok else f"fell by {-difference:.3f} since the base"
    limit = f"≥ base − {params.max_general_drop:g}"
    name = f"{GENERAL} (against the base)"
    return Row(name, len(common), _mean(base), _mean(ours), difference, low, high, limit, ok, reason)


def _interval(differences: Sequence[float], concepts: Sequence[str], params: Gate) -> tuple[float, float, float]:
    """Mean of paired differences and its bootstrap interval; what one concept has of them is drawn together."""
    low, high = bootstrap(
        differences, confidence=params.confidence, resamples=params.bootstrap, seed=SEED, concepts=concepts
    )
    return math.fsum(differences) / len(differences), low, high


def _floor(key: str, common: Sequence[str], *sides: Sequence[Item]) -> float:
    """The noise of decoding in the difference of both sides' means over the common items: see `compare.floor`."""
    wanted, name = set(common), key.split(".")[2]
    before, after = ([item for item in side if str(item["id"]) in wanted] for side in sides)
    return floor(name, before, after)


def _scores(items: Sequence[Item], key: str) -> tuple[dict[str, float], list[str]]:
    """id → score of all items that the key names, and the ids of those whose score is no finite number."""
    part, task, measure = key.split(".")
    scores, broken = {}, []
    for item in items:
        if item["set"] == part and task in ("*", item["task"]) and measure in item:
            if finite(item[measure]):
                scores[str(item["id"])] = float(item[measure])
            else:
                broken.append(str(item["id"]))
    return scores, broken


def _unscored(
    theirs: Mapping[str, float],
    ours: Mapping[str, float],
    key: str,
    answered: Mapping[str, Item],
    other: str = "the champion",
) -> str:
    """What is wrong if the challenger answered items in such a way that they have no score where the other side has one.

    Left out, they would be excused: kindness says nothing of an answer in a script that it does not know. `consistency` is of
    a sample of the test, the first items by id: an item that is not among them was not asked.
    """
    measure = key.split(".")[2]
    both = [i for i in sorted(theirs) if i in answered and (measure != "consistency" or "reworded" in answered[i])]
    gone = [i for i in both if i not in ours]
    if not gone:
        return ""
    return f"has no score in {len(gone)} of {_items(both, gone)} of the challenger in which {other} has one"


def _is_score(value: object) -> bool:
    return isinstance(value, (int, float))


def _key(item: Item, measure: str) -> str:
    return f"{item['set']}.{item['task']}.{measure}"


def _mean(scores: Mapping[str, float]) -> float | None:
    return math.fsum(scores.values()) / len(scores) if scores else None


def _items(ids: Sequence[str], named: Sequence[str] | None = None) -> str:
    """Their number, and a few of them (or of `named`) by name."""
    named = ids if named is None else named
    shown = ", ".join(named[:3]) + (", …" if len(named) > 3 else "")
    return f"{len(ids)} item{'s' if len(ids) != 1 else ''} ({shown})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _span(row: Row) -> str:
    if row.champion is None or row.challenger is None:
        return ""
    return f" ({row.champion:.3f} → {row.challenger:.3f}, n {row.n})"
