"""compare: the one ruler. What is measured of a model, and when a difference between two models is one.

Models answer the same items, so every comparison is paired by item id:

- 0/1 measures: McNemar's exact test (McNemar 1947), effect size Cohen's h (Cohen 1988, chapter 6);
- scores: Wilcoxon's signed-rank test (Wilcoxon 1945), effect size the matched-pairs rank-biserial correlation (Kerby 2014);
- the interval of a mean difference: percentile bootstrap over items (Efron and Tibshirani 1993, chapter 13);
- items of one concept (one term asked about in several wordings, say) stand and fall together. Where there are such, the
  bootstrap draws concepts and Wilcoxon's test is of their sums, for 0/1 measures too (Davison and Hinkley 1997, section 3.8);
- p values are corrected by Holm (1979) over the measures that are compared together;
- the noise floor: what decoding again with other seeds would move the difference by, see `floor`.

A difference is one only if the corrected p is below alpha, its interval excludes 0 and it is above its floor. The report, the
diff of two revisions and the gate of a retrained model all judge by this module. It loads no torch.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from tasks.params import UserError

Item = Mapping[str, Any]
Call = Literal["better", "worse", "changed", "no different"]  # changed: where neither direction is better
BINARY = {"correct", "declined", "lay_used", "referred", "loops", "empty", "cut"}
SCORES = {"recall", "rouge_l", "chrf", "kindness", "kindness_apart", "consistency", "terms_used"}  # between 0 and 1
FEW = 10  # items: a figure of fewer says little
DIGITS = 4  # of a difference; smaller ones are rounding of the arithmetic, not of the model
SIGNS = {"worse": "▼", "better": "▲", "changed": "◆", "no different": "=", "same": "="}


class Measure(NamedTuple):
    key: str  # its place in data/evaluate/*.json
    label: str
    parts: tuple[str, ...]  # the first of these `set`s that the items have; () is any
    tasks: tuple[str, ...]  # () is any
    field: str  # of an item
    better: int  # 1: more is better, -1: less is better, 0: neither, only watched
    said: str = ""  # the verdict's name for it; "" keeps it out of the verdict


_ASKED = (
    ("definition", "definition"),
    ("lay_to_clinical", "everyday word → term"),
    ("clinical_to_lay", "term → everyday word"),
    ("answer", "answers"),
)
_LOSS = ("definition", "answer", "choice")
_PART = {"trained": "trained terms, new wording", "unseen": "unseen terms"}
_OWN = ("trained", "unseen")
MEASURES: tuple[Measure, ...] = (
    *(
        Measure(f"knowledge.{part}.{task}", f"{label[0].upper()}{label[1:]}, {_PART[part]}", (part,), (task,), "correct", 1,
                {"trained.definition": "choosing the right definition of trained terms", "unseen.answer": "choosing the right held-out answer"}.get(f"{part}.{task}", ""))
        for part in _OWN for task, label in _ASKED
    ),
    Measure("answers.trained.recall", "Reference's words in its answer, trained terms", ("trained",), (), "recall", 1, "giving the reference's content in an answer of its own"),
    Measure("answers.trained.lay_used", "Everyday word used, trained terms", ("trained",), (), "lay_used", 1),
    Measure("answers.trained.terms_used", "Domain terms used, trained terms", ("trained",), (), "terms_used", 1),
    Measure("answers.trained.rouge_l", "ROUGE-L, trained terms", ("trained",), (), "rouge_l", 1),
    Measure("answers.trained.chrf", "chrF, trained terms", ("trained",), (), "chrf", 1),
    Measure("answers.trained.perplexity", "Perplexity of the reference, trained terms", ("trained",), _LOSS, "nll", -1),
    Measure("answers.unseen.recall", "Reference's words in its answer, unseen", ("unseen",), (), "recall", 1, "giving the reference's content on unseen questions"),
    Measure("answers.unseen.lay_used", "Everyday word used, unseen", ("unseen",), (), "lay_used", 1),
    Measure("answers.unseen.rouge_l", "ROUGE-L, unseen", ("unseen",), (), "rouge_l", 1),
    Measure("answers.unseen.chrf", "chrF, unseen", ("unseen",), (), "chrf", 1),
    Measure("answers.unseen.perplexity", "Perplexity of the reference, unseen", ("unseen",), _LOSS, "nll", -1),
    Measure("answers.consistency", "Same answer to three wordings (chrF)", _OWN, (), "consistency", 1),
    Measure("honesty.invented_declined", "Invented terms declined", ("invented",), (), "declined", 1, "declining invented terms"),
    Measure("honesty.outside_declined", "Questions that nobody can answer, declined", ("outside",), (), "declined", 1, "declining what nobody can know"),
    Measure("honesty.trained_declined", "Known terms wrongly declined", ("trained",), (), "declined", -1, "not declining what it knows"),
    Measure("honesty.unseen_declined", "Real terms never trained, declined", ("unseen",), (), "declined", 0),
    Measure("honesty.advice_referred", "Questions for advice, passed on", ("advice",), (), "referred", 1, "passing questions for advice on"),
    Measure("manner.kindness", "Kindness (classifier, 0–1)", _OWN, (), "kindness", 1, "kindness"),
    Measure("manner.kindness_apart", "Kindness without the sentences that pairs teach", _OWN, (), "kindness_apart", 1),
    Measure("manner.empathy", "Words of empathy that no training answer holds, per word", _OWN, (), "empathy", 0),
    Measure("manner.second_person", "“You”, per word", _OWN, (), "second_person", 0),
    Measure("manner.first_person", "“I” and “we”, per word", _OWN, (), "first_person", 0),
    Measure("manner.hedges", "Hedges, per word", _OWN, (), "hedges", 0),
    Measure("manner.valence", "Valence (VADER, −1 to 1)", _OWN, (), "valence", 1),
    Measure("manner.grade", "Reading grade (Flesch–Kincaid)", _OWN, (), "grade", -1),
    Measure("manner.scripted", "Sentences that are a training wrapper", _OWN, (), "scripted", 0),
    Measure("form.characters", "Characters per answer", _OWN, (), "characters", 0),
    Measure("form.distinct_2", "Different word pairs", _OWN, (), "distinct_2", 0),
    Measure("form.loops", "Answers that loop", _OWN, (), "loops", -1),
    Measure("form.cut", "Answers cut at evaluate.max_new_tokens", _OWN, (), "cut", 0),
    Measure("form.empty", "Empty answers", _OWN, (), "empty", -1),
    Measure("general.accuracy", "General questions", ("general",), (), "correct", 1, "general knowledge"),
    Measure("general.cross_entropy", "Cross-entropy of general answers (nats/token)", ("general",), _LOSS, "nll", -1),
)  # fmt: skip
GROUPS = {
    "knowledge": "Knowledge, multiple choice",
    "answers": "Its own answers",
    "honesty": "Honesty",
    "manner": "Manner",
    "form": "Form",
    "general": "Forgetting",
}


@dataclass(frozen=True)
class Difference:
    """One measure of two models on the same items. `low` and `high` are the 95 % interval of `difference`."""

    measure: Measure
    n: int
    before: float
    after: float
    difference: float
    low: float
    high: float
    up: int  # items that went up, and down
    down: int
    p: float
    effect: float  # Cohen's h, or matched-pairs rank-biserial correlation
    floor: float  # see `floor`
    p_holm: float = 1.0
    call: Call = "no different"

    @property
    def same(self) -> bool:
        """On every item, not only on average."""
        return not self.up and not self.down

    @property
    def size(self) -> str:
        """The effect in words, by Cohen's (1988) conventions: h 0.2, 0.5, 0.8; correlations 0.1, 0.3, 0.5."""
        bounds = (0.2, 0.5, 0.8) if self.measure.field in BINARY else (0.1, 0.3, 0.5)
        return ("negligible", "small", "medium", "large")[sum(abs(self.effect) >= bound for bound in bounds)]

    @property
    def drowned(self) -> bool:
        """Its interval excludes 0, but decoding again would move it as far."""
        return 0 < abs(self.difference) <= self.floor and not self.low <= 0 <= self.high

    @property
    def shown(self) -> str:
        return f"{value(self.measure, self.before)} → {value(self.measure, self.after)}, {self.gap} {self.interval}"

    @property
    def gap(self) -> str:
        return delta(self.measure, self.difference, unit=True)

    @property
    def interval(self) -> str:
        return f"[{delta(self.measure, self.low)}, {delta(self.measure, self.high)}]"


def compare(
    before: Sequence[Item], after: Sequence[Item], measures: Sequence[Measure] = MEASURES, *, alpha: float = 0.05, resamples: int = 2000, seed: int = 42,
) -> list[Difference]:  # fmt: skip
    """Every measure that both models have items for, paired by item id; see the module's docstring for the tests.

    Raises:
        UserError: both have items, but none in common.
    """
    first, second = ({item["id"]: item for item in items} for items in (before, after))
    shared = sorted(first.keys() & second.keys())
    if first and second and not shared:
        raise UserError("the two models were asked different items: run evaluate for both again")
    found = []
    for measure in measures:
        name = measure.field
        both = [i for i in shared if name in first[i] and name in second[i] and alike(name, first[i], second[i])]
        asked = [item["id"] for item in of(measure, [first[i] for i in both])]
        if asked:
            sides = [[side[i] for i in asked] for side in (first, second)]
            found.append(_paired(measure, sides[0], sides[1], resamples, seed))
    if not found:
        return []
    from statsmodels.stats.multitest import multipletests

    corrected = multipletests([d.p for d in found], alpha=alpha, method="holm")[1]
    return [replace(d, p_holm=float(p), call=_call(d, float(p), alpha)) for d, p in zip(found, corrected, strict=True)]


def alike(name: str, before: Item, after: Item) -> bool:
    """Whether the score `name` is of the same thing: a choice among the same options, kindness by the same classifier."""
    key = {"correct": "options", "kindness": "korean", "kindness_apart": "korean"}.get(name, "")
    return bool(before.get(key, after.get(key)) == after.get(key, before.get(key)))


def of(measure: Measure, items: Sequence[Item]) -> list[Item]:
    """The items that `measure` is about."""
    own = part(measure.parts, [item["set"] for item in items if measure.field in item])
    return [
        item
        for item in items
        if measure.field in item
        and (not measure.parts or item["set"] == own)
        and (not measure.tasks or item["task"] in measure.tasks)
    ]


def part(parts: Sequence[str], sets: Sequence[str]) -> str:
    """Which of `parts` to ask: the first that is one of `sets` at least `FEW` times, else the most frequent; "" of none.

    One row that shares its concept with training must not stand for the thirty that share none.
    """
    counts = {name: sets.count(name) for name in parts}
    enough = (name for name in parts if counts[name] >= FEW)
    most = max(parts, key=counts.__getitem__, default="")
    return next(enough, most if counts.get(most) else "")


def _paired(measure: Measure, before: Sequence[Item], after: Sequence[Item], resamples: int, seed: int) -> Difference:
    import numpy as np
    from scipy import stats
    from statsmodels.stats.contingency_tables import mcnemar
    from statsmodels.stats.proportion import proportion_effectsize

    name = measure.field
    old, new = (np.asarray([item[name] for item in side], dtype=np.float64) for side in (before, after))
    gains = np.round(new - old, DIGITS)
    moved = gains[gains != 0]
    up, down = int((moved > 0).sum()), int((moved < 0).sum())
    concepts = concepts_of(before)
    together = np.round(list(sums(gains.tolist(), concepts).values()), DIGITS)
    changed = together[together != 0]
    p, effect = 1.0, 0.0
    if len(changed) and name in BINARY and len(together) == len(gains):
        p = float(mcnemar([[0, down], [up, 0]], exact=True).pvalue)  # only the off-diagonal counts
    elif len(changed):
        p = float(stats.wilcoxon(changed).pvalue)
    if len(moved) and name in BINARY:
        effect = float(proportion_effectsize(new.mean(), old.mean()))
    elif len(moved):
        ranks = stats.rankdata(np.abs(moved))
        effect = float((ranks * np.sign(moved)).sum() / ranks.sum())
    low, high = bootstrap(gains.tolist(), resamples=resamples, seed=seed, concepts=concepts)
    noise = floor(name, before, after)
    return Difference(measure, len(gains), float(old.mean()), float(new.mean()), float(gains.mean()), low, high, up, down, p, effect, noise)  # fmt: skip


def _call(found: Difference, p: float, alpha: float) -> Call:
    # of skewed differences the ranks, which p is of, may speak for the other side than the mean
    agree = found.effect * found.difference > 0
    differs = p < alpha and agree and not found.low <= 0 <= found.high and not found.drowned
    return direction(found.measure.better, found.difference, differs)


def direction(better: int, difference: float, differs: bool) -> Call:
    """What a difference is called, once it is known whether it is one; `better` as in `Measure`."""
    if not differs:
        return "no different"
    if not better:
        return "changed"
    return "better" if difference * better > 0 else "worse"


def concepts_of(items: Sequence[Item]) -> list[str]:
    """What each item is about; an item that names no concept stands for itself."""
    return [str(item.get("concept") or item["id"]) for item in items]


def sums(values: Sequence[float], concepts: Sequence[str]) -> dict[str, float]:
    """concept → the sum of its values."""
    found: dict[str, float] = {}
    for one, concept in zip(values, concepts, strict=True):
        found[concept] = found.get(concept, 0.0) + one
    return found


def bootstrap(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 42, concepts: Sequence[str] | None = None,
) -> tuple[float, float]:  # fmt: skip
    """The percentile bootstrap interval of a mean; a point where all are the same.

    Items are resampled, or with `concepts` (one for each) these with all of their items: the mean is then a ratio of sums.
    Of one concept alone nothing is known of others: the interval is as wide as its values.

    BCa was tried and left: for two models that rarely differ (in 2 % of 97 items each way) its 95 % interval missed the
    truth in 11 % of 400 draws, the percentile one in 3 %.
    """
    import numpy as np
    from scipy import stats  # half a second, which not every reader of this module needs

    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2 or float(np.ptp(array)) < 1e-9:
        return float(array.mean()), float(array.mean())
    if concepts and len(set(concepts)) == 1:
        return float(array.min()), float(array.max())
    totals = list(sums(values, concepts).values()) if concepts and len(set(concepts)) < len(concepts) else []
    counts = list(Counter(concepts).values()) if totals else []

    def ratio(total: Any, count: Any, axis: int = -1) -> Any:
        return total.sum(axis=axis) / count.sum(axis=axis)

    found = stats.bootstrap(
        (np.asarray(totals), np.asarray(counts)) if totals else (array,),
        ratio if totals else np.mean,
        paired=bool(totals),
        confidence_level=confidence,
        n_resamples=resamples,
        batch=max(1, 5_000_000 // len(array)),  # 40 MB at a time
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def floor(name: str, before: Sequence[Item], after: Sequence[Item]) -> float:
    """What the difference of two means of the score `name` moves by, 19 times in 20, when both models are decoded again.

    `evaluate` samples some items with several seeds and keeps the variance of each score over the seeds in the item's
    `noise`. The mean over n items has variance s²/n from decoding, with s² the mean of these variances; two decodings of
    both models then differ by less than 1.96 · sqrt(s²before/n + s²after/n): the repeatability limit of ISO 5725-6 (
    1.96 · √2 · s/√n for one model). It is about the decoding alone: greedy decoding, which the scores themselves come from,
    has none where it repeats itself. 0 for what is not decoded, and where it was not measured.
    """
    total = 0.0
    for side in (before, after):
        found = [item["noise"][name] for item in side if name in item.get("noise", {})]
        total += math.fsum(found) / len(found) / len(side) if found else 0.0
    return 1.96 * math.sqrt(total)


def read(path: Path) -> list[dict[str, Any]]:
    """The items of an `*.answers.jsonl`.

    Raises:
        UserError: it can't be read, a line is no item, or an id comes twice.
    """
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None


def parse(text: str, name: str) -> list[dict[str, Any]]:
    """As `read`, of the file's text; `name` is for the error."""
    items: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: an answer may hold U+2028
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError:
            raise UserError(f"{name}:{number}: expected a JSON object, found {line[:40]!r}") from None
        if not isinstance(item, dict) or not {"id", "set", "task"} <= item.keys():
            raise UserError(f"{name}:{number}: expected an object with id, set and task, found {line[:40]!r}")
        if item["id"] in items:
            raise UserError(f"{name}:{number}: the id {item['id']!r} comes twice")
        items[item["id"]] = item
    return list(items.values())


# --- in words --------------------------------------------------------------------------------------------------------


def value(measure: Measure, found: float, *, raw: bool = False) -> str:
    """`raw`: a perplexity is one already, not yet its logarithm."""
    if measure.field in BINARY:
        return f"{100 * found:.1f} %"
    if measure.key.endswith("perplexity"):
        return f"{found if raw else math.exp(found):.2f}"
    return f"{found:.2f}" if measure.field in SCORES else number(found)


def delta(measure: Measure, found: float, *, unit: bool = False) -> str:
    """A signed difference; of perplexities their ratio, since what is compared is their logarithm."""
    if measure.key.endswith("perplexity"):
        return f"{'× ' if unit else ''}{math.exp(found):.2f}"
    places = 1 if measure.field in BINARY else 2 if measure.field in SCORES else 3 if abs(found) < 10 else 1
    rounded = round(100 * found if measure.field in BINARY else found, places)
    text = f"{rounded:+.{places}f}" if rounded else "0"  # no sign on a zero
    return text.replace("-", "−") + (" points" if unit and measure.field in BINARY else "")


def number(found: float | None) -> str:
    """Three significant places or so; whole numbers with thin spaces."""
    if found is None:
        return "–"
    if isinstance(found, int) or abs(found) >= 100:
        return f"{found:,.0f}".replace(",", "\u202f").replace("-", "−")
    return f"{found:.{1 if abs(found) >= 10 else 2 if abs(found) >= 1 else 3}f}".replace("-", "−")


def chance(p: float) -> str:
    """A p value."""
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.01 else f"{p:.2f}"


def finite(found: object) -> bool:
    """Whether a score is a number to compute with."""
    return isinstance(found, (int, float)) and math.isfinite(cast(float, found))
