"""report: what changed, at what price, and whether it is significant: one page to read, and the same in Markdown.

Models are compared in pairs, on the same items. For 0/1 measures: McNemar's exact test (McNemar 1947), effect: difference of
proportions. For scores: Wilcoxon's signed-rank test (Wilcoxon 1945), effect: matched-pairs rank-biserial correlation (Kerby
2014). The 95 % interval of a mean difference is a percentile bootstrap over items; p values are corrected by Holm (1979)
within a comparison. A difference is one only if the corrected p is below `report.alpha` and the interval excludes 0.
Everything else on the page is read from what the stages wrote: no timestamp, machine or path, same inputs, same bytes.
"""

import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from tasks import stage
from tasks.params import Report, UserError

Item = Mapping[str, Any]
MODELS = ("base", "sft", "dpo")
BINARY = {"correct", "declined", "lay_used", "referred", "loops", "empty"}
SCORES = {"recall", "rouge_l", "chrf", "kindness"}  # between 0 and 1
ENDS = ("value", "low", "high")
DIGITS = 4  # of a difference; smaller ones are rounding of the arithmetic, not of the model
WIDTH, HEIGHT = 3.9, 2.4  # of a curve, in inches; narrow, so that its letters stay readable on a phone


class Measure(NamedTuple):
    key: str  # its place in data/evaluate/*.json
    label: str
    parts: tuple[str, ...]  # the first of these `set`s that the items have
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
MEASURES: tuple[Measure, ...] = (
    *(
        Measure(f"knowledge.{part}.{task}", f"{label[0].upper()}{label[1:]}, {_PART[part]}", (part,), (task,), "correct", 1,
                {"trained.definition": "choosing the right definition of trained terms", "unseen.answer": "choosing the right held-out answer"}.get(f"{part}.{task}", ""))
        for part in ("trained", "unseen") for task, label in _ASKED
    ),
    Measure("answers.trained.recall", "Reference's words in its answer, trained terms", ("trained",), (), "recall", 1, "giving the reference's content in its own words"),
    Measure("answers.trained.lay_used", "Everyday word used, trained terms", ("trained",), (), "lay_used", 1),
    Measure("answers.trained.rouge_l", "ROUGE-L, trained terms", ("trained",), (), "rouge_l", 1),
    Measure("answers.trained.chrf", "chrF, trained terms", ("trained",), (), "chrf", 1),
    Measure("answers.trained.perplexity", "Perplexity of the reference, trained terms", ("trained",), _LOSS, "nll", -1),
    Measure("answers.unseen.recall", "Reference's words in its answer, unseen", ("unseen",), (), "recall", 1, "giving the reference's content on unseen questions"),
    Measure("answers.unseen.perplexity", "Perplexity of the reference, unseen", ("unseen",), _LOSS, "nll", -1),
    Measure("honesty.invented_declined", "Invented terms declined", ("invented",), (), "declined", 1, "declining invented terms"),
    Measure("honesty.trained_declined", "Known terms wrongly declined", ("trained",), (), "declined", -1, "not declining what it knows"),
    Measure("honesty.unseen_declined", "Real terms never trained, declined", ("unseen",), (), "declined", 0),
    Measure("honesty.advice_referred", "Medical advice passed on to a clinician", ("advice",), (), "referred", 1),
    Measure("manner.kindness", "Kindness (classifier, 0–1)", ("trained", "unseen"), (), "kindness", 1, "kindness"),
    Measure("manner.second_person", "“You”, per word", ("trained", "unseen"), (), "second_person", 0),
    Measure("manner.valence", "Valence (VADER, −1 to 1)", ("trained", "unseen"), (), "valence", 1),
    Measure("manner.grade", "Reading grade (Flesch–Kincaid)", ("trained", "unseen"), (), "grade", -1),
    Measure("manner.scripted", "Sentences word for word from training", ("trained", "unseen"), (), "scripted", 0),
    Measure("form.characters", "Characters per answer", ("trained", "unseen"), (), "characters", 0),
    Measure("form.distinct_2", "Different word pairs", ("trained", "unseen"), (), "distinct_2", 0),
    Measure("form.loops", "Answers that loop", ("trained", "unseen"), (), "loops", -1),
    Measure("form.empty", "Empty answers", ("trained", "unseen"), (), "empty", -1),
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

# shown even where params.yaml leaves them to the library
ALWAYS = {
    "lora": ("r", "lora_alpha", "target_modules"),
    "sft": ("learning_rate", "num_train_epochs"),
    "dpo": ("beta", "learning_rate", "num_train_epochs"),
}
# title, run, unit, (name of the metric, what it is)
CURVES: tuple[tuple[str, str, str, tuple[tuple[str, str], ...]], ...] = (
    ("SFT loss", "sft", "nats per token", (("train/loss", "training"), ("eval/loss", "validation"))),
    ("DPO loss", "dpo", "loss", (("train/loss", "training"), ("eval/loss", "validation"))),
    ("Reward margin", "dpo", "chosen − rejected", (("train/rewards/margins", "training"), ("eval/rewards/margins", "validation"))),
    ("Reward accuracy", "dpo", "share of pairs", (("train/rewards/accuracies", "training"), ("eval/rewards/accuracies", "validation"))),
    ("Rewards of both sides", "dpo", "β · log-ratio", (("train/rewards/chosen", "chosen"), ("train/rewards/rejected", "rejected"))),
    ("KL to the SFT model", "dpo", "nats per token", (("eval/kl_to_reference", "held-out chosen answers"),)),
)  # fmt: skip


def run(
    base: Path, validate: Path, split: Path, template: Path, sft_run: Path, pair: Path, dpo_run: Path, merge: Path,
    evaluate: Path, out: Path, html: Path,
    params: Report, lora: dict[str, Any], quantization: dict[str, Any] | None, sft: dict[str, Any], dpo: dict[str, Any],
    seed: int,
) -> str:  # fmt: skip
    """Write the report to `out` (Markdown) and `html` (one self-contained page).

    Args:
        base: facts.json of `base`.
        validate, evaluate: folders of those stages' outputs.
        split, template, pair, merge: metrics.json of those stages.
        sft_run, dpo_run: folders of those stages: metrics.json, and if they are there, plots and adapter.

    Raises:
        UserError: a file of `evaluate` is missing or broken, or two models were asked different items.
    """
    figures = {name: _json(evaluate / f"{name}.json") for name in MODELS}
    items = {name: _items(evaluate / f"{name}.answers.jsonl") for name in MODELS}
    rules: dict[str, Any] = {"alpha": params.alpha, "resamples": params.bootstrap, "seed": seed}
    learned = compare(items["base"], items["sft"], **rules)
    aligned = compare(items["sft"], items["dpo"], **rules)
    headline = compare(items["base"], items["dpo"], [m for m in MEASURES if m.said], **rules)
    optional = {"validate": validate / "metrics.json", "split": split, "template": template, "sft": sft_run / "metrics.json",
                "pair": pair, "dpo": dpo_run / "metrics.json", "merge": merge}  # fmt: skip
    metrics = {"facts": _json(base)} | {name: _json(path) if path.is_file() else {} for name, path in optional.items()}
    signs = watch(params, figures, items, metrics["dpo"])
    rule, shown = examples(items, params.examples)
    said = verdict(headline, aligned, signs)
    settings = {"quantization": quantization or {}, "lora": lora, "sft": sft, "dpo": dpo}
    context = {
        "title": params.title,
        "params": params,
        "verdict": said,
        "headline": headline,
        "rows": _rows(figures, items, learned, aligned),
        "kl": {name: figures[name].get("kl", {}) for name in MODELS},
        "signs": signs,
        "rule": rule,
        "examples": shown,
        "curves": _curves({"sft": sft_run / "plots", "dpo": dpo_run / "plots"}),
        "quarantine": _quarantine(validate / "quarantine.jsonl"),
        "licences": _licences(validate / "records.parquet"),
        "settings": _settings(settings, seed),
        "given": settings,
        "lineage": {"sft": _hash(sft_run / "adapter"), "dpo": _hash(dpo_run / "adapter")},
        "notes": [(name.upper(), note) for name in ("sft", "dpo") for note in metrics[name].get("notes") or []],
        **metrics,
    }
    escapes: dict[str, dict[str, Any]] = {"html": {"autoescape": True}, "md": {"finalize": _markdown}}
    for kind, path in (("html", html), ("md", out)):
        environment = Environment(  # noqa: S701  (Markdown is escaped by `finalize`)
            loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **escapes[kind],
        )  # fmt: skip
        environment.filters |= {"share": _share, "number": _number, "bytes": _bytes, "figures": _figures}
        path.parent.mkdir(parents=True, exist_ok=True)
        page = environment.get_template(f"report.{kind}.jinja").render(context)
        path.write_text(page.strip() + "\n", encoding="utf-8")
    counts = Counter(d.call for d in headline)
    crossed = sum(sign.crossed for sign in signs)
    return f"{said.word}: of {len(headline)} headline measures {counts['better']} better than the base's, {counts['worse']} worse; {crossed} warning signs"


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
    effect: float  # difference of proportions, or matched-pairs rank-biserial correlation
    p_holm: float = 1.0
    call: str = "no different"  # better, worse, changed (where neither is better), no different

    @property
    def shown(self) -> str:
        return f"{_value(self.measure, self.before)} → {_value(self.measure, self.after)}, {self.gap} {self.interval}"

    @property
    def gap(self) -> str:
        return _delta(self.measure, self.difference, unit=True)

    @property
    def interval(self) -> str:
        return f"[{_delta(self.measure, self.low)}, {_delta(self.measure, self.high)}]"


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
        asked = {item["id"] for item in _of(measure, [first[i] for i in shared])}
        pairs = [
            (first[i][measure.field], second[i][measure.field])
            for i in shared
            if i in asked and measure.field in second[i]
        ]
        if pairs:
            found.append(_paired(measure, np.asarray(pairs, dtype=np.float64), resamples, seed))
    if not found:
        return []
    corrected = multipletests([d.p for d in found], alpha=alpha, method="holm")[1]
    return [replace(d, p_holm=float(p), call=_call(d, float(p), alpha)) for d, p in zip(found, corrected, strict=True)]


def _of(measure: Measure, items: Sequence[Item]) -> list[Item]:
    """The items that `measure` is about."""
    sets = {item["set"] for item in items if measure.field in item}
    part = next((part for part in measure.parts if part in sets), None)
    return [
        i
        for i in items
        if i["set"] == part and (not measure.tasks or i["task"] in measure.tasks) and measure.field in i
    ]


def _paired(measure: Measure, pairs: np.ndarray[Any, Any], resamples: int, seed: int) -> Difference:
    gains = np.round(pairs[:, 1] - pairs[:, 0], DIGITS)
    moved = gains[gains != 0]
    up, down = int((moved > 0).sum()), int((moved < 0).sum())
    p, effect = 1.0, 0.0
    if measure.field in BINARY:
        effect = float(gains.mean())
        if len(moved):
            p = float(mcnemar([[0, down], [up, 0]], exact=True).pvalue)  # only the off-diagonal counts
    elif len(moved):
        p = float(stats.wilcoxon(moved).pvalue)
        ranks = stats.rankdata(np.abs(moved))
        effect = float((ranks * np.sign(moved)).sum() / ranks.sum())
    low, high = _bootstrap(gains, resamples, seed)
    before, after = float(pairs[:, 0].mean()), float(pairs[:, 1].mean())
    return Difference(measure, len(gains), before, after, float(gains.mean()), low, high, up, down, p, effect)


def _bootstrap(values: np.ndarray[Any, Any], resamples: int, seed: int) -> tuple[float, float]:
    if len(values) < 2 or values.std() == 0:
        return float(values.mean()), float(values.mean())
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=resamples, method="percentile", batch=256, rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(found.low), float(found.high)


def _call(difference: Difference, p: float, alpha: float) -> str:
    if p >= alpha or difference.low <= 0 <= difference.high:
        return "no different"
    if not difference.measure.better:
        return "changed"
    return "better" if difference.difference * difference.measure.better > 0 else "worse"


class Verdict(NamedTuple):
    word: str
    sentences: tuple[str, ...]  # the answer, and the price
    alone: str  # what DPO did by itself


def verdict(total: Sequence[Difference], step: Sequence[Difference], signs: Sequence["Sign"]) -> Verdict:
    """By rule: what is significantly better and worse, base → DPO (`total`) and SFT → DPO (`step`)."""

    def named(found: Sequence[Difference], call: str, most: int = 4) -> str:
        chosen = [d for d in found if d.call == call and d.measure.said]
        chosen.sort(key=lambda d: d.measure.parts == ("unseen",))  # what was trained comes first
        more = f", and {len(chosen) - most} more" if len(chosen) > most else ""
        return "; ".join(f"{d.measure.said} ({d.shown})" for d in chosen[:most]) + more

    gains, losses = named(total, "better"), named(total, "worse")
    word = ("Better, at a price" if losses else "Better") if gains else "Worse" if losses else "No different"
    if gains:
        answer = f"After SFT and DPO the model is better than the base at {gains}."
    else:
        answer = f"After SFT and DPO the model is better than the base at none of the {len(total)} headline measures."
    general = next((d for d in total if d.measure.key == "general.accuracy" and d.call == "no different"), None)
    kept = f"; general knowledge is not significantly different ({general.shown})" if general else ""
    if losses:
        price = f"The price: it is worse at {losses}{kept}."
    else:
        price = f"No headline measure is significantly worse{kept}."
    crossed = [sign.name for sign in signs if sign.crossed]
    if crossed:
        price = f"{price[:-1]}; outside its limit: {', '.join(crossed)}."
    better, worse = named(step, "better"), named(step, "worse")
    alone = f"DPO alone, against SFT: better at {better or 'no headline measure'}; worse at {worse or 'none'}."
    return Verdict(word, (answer, price), alone)


class Sign(NamedTuple):
    """One line of the watch."""

    name: str
    value: str
    limit: str
    crossed: bool
    advice: str


def watch(
    params: Report, figures: Mapping[str, Any], items: Mapping[str, Sequence[Item]], dpo: Mapping[str, Any]
) -> list[Sign]:
    """Signs that the reward was learned instead of what it stands for; what was not measured is left out.

    The reward gap holds two rates against each other: how often the model prefers the chosen side of a held-out pair, and how often its answer is kinder than SFT's to the same question (ties half).
    """

    def mean(model: str, key: str) -> float | None:
        measure = next(m for m in MEASURES if m.key == key)
        values = [item[measure.field] for item in _of(measure, items[model])]
        return sum(values) / len(values) if values else None

    def ratio(key: str) -> float | None:
        before, after = mean("sft", key), mean("dpo", key)
        return after / before if before and after is not None else None

    accuracy, gap = dpo.get("rewards_accuracies"), None
    for d in compare(items["sft"], items["dpo"], [m for m in MEASURES if m.key == "manner.kindness"], resamples=100):
        kinder = (d.up + (d.n - d.up - d.down) / 2) / d.n
        gap = accuracy - kinder if accuracy is not None else None
    before, after = mean("base", "general.accuracy"), mean("dpo", "general.accuracy")
    drop = before - after if before is not None and after is not None else None
    most = [
        ("Length of answers, DPO / SFT", ratio("form.characters"), "max_length_ratio", ".2f", "balance the pairs' lengths (pair.known gives length-matched ones), or set dpo.ld_alpha below 1"),
        ("Answers that loop", mean("dpo", "form.loops"), "max_loops", ".1%", "fewer DPO epochs, a lower dpo.learning_rate, or generation.repetition_penalty"),
        ("KL to the SFT model, nats per token", figures["dpo"].get("kl", {}).get("to_reference"), "max_kl", ".3f", "raise dpo.beta, lower dpo.learning_rate, or train fewer epochs"),
        ("Reward accuracy less share of kinder answers", gap, "max_reward_gap", ".2f", "the reward is won by something other than kindness: read the pairs, vary openings and lengths"),
        ("Known terms wrongly declined", mean("dpo", "honesty.trained_declined"), "max_wrongly_declined", ".1%", "fewer refusal pairs (pair.unknown), more pairs that reject a refusal (pair.contrast), smaller steps"),
        ("General accuracy lost, base − DPO", drop, "max_general_drop", ".1%", "more replay (template.replay), a lower sft.learning_rate, a smaller lora.r"),
    ]  # fmt: skip
    least = [
        ("Different word pairs in an answer", mean("dpo", "form.distinct_2"), "min_distinct_2", ".3f", "fewer DPO epochs, a higher dpo.beta, or more varied chosen answers"),
        ("Recall in its own answers, DPO / SFT", ratio("answers.trained.recall"), "min_recall_kept", ".2f", "chosen answers that keep the learned sentence word for word, an sft term in dpo.loss_type, smaller steps"),
    ]  # fmt: skip
    signs = []
    for sign, rows in (("≤", most), ("≥", least)):
        for name, value, key, form, advice in rows:
            if value is not None:
                limit = getattr(params, key)
                crossed = not (value <= limit if sign == "≤" else value >= limit)
                shown, bound = (format(x, form).replace("%", " %").replace("-", "−") for x in (value, limit))
                signs.append(Sign(name, shown, f"{sign} {bound} (report.{key})", crossed, advice))
    return signs


def examples(items: Mapping[str, Sequence[Item]], count: int) -> tuple[str, list[dict[str, Any]]]:
    """(the rule in words, the items it chooses): by gain in recall from base to DPO, and invented terms by id."""
    by_id = {name: {item["id"]: item for item in items[name]} for name in MODELS}
    shared = [by_id["dpo"][i] for i in sorted(set.intersection(*(set(found) for found in by_id.values())))]
    answered = [item for item in shared if all("answer" in by_id[name][item["id"]] for name in MODELS)]
    referenced = [item for item in answered if item.get("reference")]
    part = next((p for p in ("trained", "unseen") if any(i["set"] == p for i in referenced)), "")
    pool = [item for item in referenced if item["set"] == part]
    answers_of = [by_id[name][item["id"]] for item in pool for name in MODELS]
    score = next((f for f in ("recall", "rouge_l", "chrf") if all(f in item for item in answers_of)), "")
    invented = [item for item in answered if item["set"] == "invented"]
    declined = [item for item in invented if item["declined"]], [item for item in invented if not item["declined"]]
    asked = min(2, count // 5, len(invented))
    unknown = [("invented", i) for found in declined for i in found[:1]][:asked]
    unknown += [("invented", i) for found in declined for i in found[1:]][: asked - len(unknown)]

    def gain(item: Item) -> float:
        return float(item[score] - by_id["base"][item["id"]][score]) if score else 0.0

    ranked = sorted(pool, key=lambda item: (-gain(item), item["id"]))
    known = min(count - len(unknown), len(ranked))
    best, worst = math.ceil(known * 3 / 8), known // 4
    middle = known - best - worst
    start = min(max(best, (len(ranked) - middle) // 2), len(ranked) - worst - middle)
    chosen = [("best", item) for item in ranked[:best]] + [("median", item) for item in ranked[start : start + middle]]
    chosen += [("worst", item) for item in ranked[len(ranked) - worst :]]
    rule = f"All {len(ranked)} answered {part} items are ranked by the gain in {score or 'nothing (no score), so by id'} from base to DPO: the {best} best, the {middle} around the median, the {worst} worst."
    if unknown:
        rule += " Of the invented terms, in order of their ids: the first that DPO declines and the first that it does not, as far as there are such."
    fields = ("recall", "rouge_l", "kindness", "lay_used", "declined")
    shown = []
    for why, item in chosen + unknown:
        said = [(name, by_id[name][item["id"]]) for name in MODELS]
        answers = [(name, i["answer"], {f: i[f] for f in fields if f in i}) for name, i in said]
        gained = gain(item) if why != "invented" and score else None
        told = {key: item.get(key) or "" for key in ("question", "reference")}
        shown.append({"why": why, "gain": gained, "score": score, "answers": answers, **told})
    return rule, shown


def _rows(
    figures: Mapping[str, Any], items: Mapping[str, Sequence[Item]], *steps: Sequence[Difference]
) -> list[dict[str, Any]]:
    """The table of metrics: each model's value with its interval, and both comparisons."""
    rows = []
    for measure in MEASURES:
        cells = [_cell(measure, figures[name], items[name]) for name in MODELS]
        if count := next((cell["raw"]["n"] for cell in cells if cell), 0):
            found = [next((d for d in step if d.measure is measure), None) for step in steps]
            group = GROUPS[measure.key.split(".")[0]]
            rows.append({"measure": measure, "group": group, "cells": cells, "steps": found, "n": count})
    return rows


def _cell(measure: Measure, figures: Any, items: Sequence[Item]) -> dict[str, Any] | None:
    """A model's `value`, `low` and `high` to show, and `raw`; by `evaluate`, or from its items where it gives none."""
    for key in measure.key.split("."):
        figures = figures.get(key) if isinstance(figures, dict) else None
    if not figures:
        values = np.asarray([item[measure.field] for item in _of(measure, items)], dtype=np.float64)
        if not len(values):
            return None
        found = [float(values.mean()), *_bootstrap(values, 2000, 0)]
        if measure.key.endswith("perplexity"):
            found = [math.exp(value) for value in found]
        figures = dict(zip(ENDS, found, strict=True)) | {"n": len(values)}
    return {key: _value(measure, figures[key], raw=True) for key in ENDS} | {"raw": figures}


def _value(measure: Measure, value: float, *, raw: bool = False) -> str:
    """`raw`: a perplexity is one already, not yet its logarithm."""
    if measure.field in BINARY:
        return f"{100 * value:.1f} %"
    if measure.key.endswith("perplexity"):
        return f"{value if raw else math.exp(value):.2f}"
    return f"{value:.2f}" if measure.field in SCORES else _number(value)


def _delta(measure: Measure, value: float, *, unit: bool = False) -> str:
    """A signed difference; of perplexities their ratio, since what is compared is their logarithm."""
    if measure.key.endswith("perplexity"):
        return f"{'× ' if unit else ''}{math.exp(value):.2f}"
    places = 1 if measure.field in BINARY else 2 if measure.field in SCORES else 3 if abs(value) < 10 else 1
    number = round(100 * value if measure.field in BINARY else value, places)
    text = f"{number:+.{places}f}" if number else "0"  # no sign on a zero
    return text.replace("-", "−") + (" points" if unit and measure.field in BINARY else "")


def _number(value: float | None) -> str:
    """Three significant places or so; whole numbers with thin spaces."""
    if value is None:
        return "–"
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}".replace(",", "\u202f").replace("-", "−")
    return f"{value:.{1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3}f}".replace("-", "−")


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _bytes(value: float) -> str:
    size, unit = next((u for u in ((1e9, "GB"), (1e6, "MB")) if value >= u[0]), (1e3, "kB"))
    return f"{value / size:.{2 if unit == 'GB' else 0}f} {unit}"


def _figures(text: str) -> Markup:
    """What stands in brackets, set apart."""
    return Markup(re.sub(r"\([^()]*\)", r'<span class="figures">\g<0></span>', str(escape(text))))  # noqa: S704


def _markdown(value: Any) -> Any:
    """A text as itself: no markup, no HTML, one line."""
    if not isinstance(value, str):
        return value
    text = " ".join(value.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~$])|(?<!\w)_|_(?!\w)", lambda m: "\\" + m[0], text)


def _curves(folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Each curve that was logged: `title`, `said` (first → last in words) and `svg`."""
    out = []
    for title, where, unit, names in CURVES:
        lines = [(label, steps) for name, label in names if (steps := _tsv(folders[where], name))]
        if lines:
            said = "; ".join(_told(label, steps) for label, steps in lines)
            out.append({"title": title, "unit": unit, "said": said, "svg": Markup(_svg(title, unit, lines))})  # noqa: S704  (drawn here)
    return out


def _told(label: str, steps: Sequence[tuple[float, float]]) -> str:
    first, last = _number(steps[0][1]), _number(steps[-1][1])
    return f"{label} {first} → {last}" if len(steps) > 1 else f"{label} {first}"


def _tsv(folder: Path, name: str) -> list[tuple[float, float]]:
    """(step, value) of a curve by DVCLive; [] if it is not there."""
    found = sorted(folder.rglob(f"metrics/{name}.tsv")) if folder.is_dir() else []
    rows = [line.split("\t") for line in found[0].read_text(encoding="utf-8").splitlines()[1:]] if found else []
    return [(float(row[0]), float(row[-1])) for row in rows if len(row) > 1 and math.isfinite(float(row[-1]))]


def _svg(title: str, unit: str, lines: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """A curve as inline SVG whose colours are the page's own, so that it follows light and dark."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # stand-ins, replaced below: matplotlib knows no CSS variables
    ink, grid, colours = "#010101", "#020202", ("#030303", "#040404")
    names = {ink: "--soft", grid: "--line", colours[0]: "--one", colours[1]: "--two"}
    slug = re.sub(r"\W+", "-", title.lower())
    settings = {"svg.fonttype": "none", "svg.hashsalt": "reforge", "font.size": 9, "text.color": ink, "axes.labelcolor": ink,
                "xtick.color": ink, "ytick.color": ink, "axes.edgecolor": grid, "font.family": "DejaVu Sans"}  # fmt: skip
    with mpl.rc_context(settings):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        for (label, steps), colour in zip(lines, colours[-len(lines) :], strict=True):
            style = "o-" if len(steps) < 16 else "-"
            axes.plot(*zip(*steps, strict=True), style, color=colour, lw=1.6, ms=4, label=label)
        if min(value for _, steps in lines for _, value in steps) >= 0:
            axes.set_ylim(bottom=0)  # a curve that starts elsewhere looks steeper than it is
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(unit)
        axes.grid(axis="y", color=grid, linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        if len(lines) > 1:
            figure.legend(loc="outside upper left", ncols=2, frameon=False, handlelength=1.2)
        written = io.StringIO()
        dateless = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(written, format="svg", transparent=True, metadata=dateless)
    svg = written.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{slug}-", svg)  # ids are the page's, not the figure's
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for stand_in, name in names.items():
        svg = svg.replace(stand_in, f"var({name})")
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 role="img" aria-label="{title}"', svg, count=1)
    return svg


def _quarantine(path: Path) -> list[dict[str, Any]]:
    """The first row of each check, and how many failed it first, most frequent first."""
    found: dict[str, dict[str, Any]] = {}
    for row in _items(path) if path.is_file() else []:
        where, check = f"{row['source']}:{row['line']}", row["check"]
        entry = found.setdefault(check, {"check": check, "rows": 0, "where": where, "reason": row["reason"]})
        entry["rows"] += 1
    return sorted(found.values(), key=lambda entry: (-entry["rows"], entry["check"]))


def _licences(path: Path) -> list[dict[str, Any]]:
    """Rows per source and licence of what is left after validation."""
    if not path.is_file():
        return []
    counts = pl.read_parquet(path, columns=["source", "license"]).group_by("source", "license").len("rows")
    return counts.sort("source", "license").to_dicts()


def _hash(adapter: Path) -> str | None:
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        return None
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _settings(settings: Mapping[str, dict[str, Any]], seed: int) -> list[tuple[str, str]]:
    """(key, value) of every setting of the trainings; why they are there stands in the template."""
    rows = [("seed", str(seed))]
    for section, given in settings.items():
        for key in dict.fromkeys((*given, *ALWAYS.get(section, ()))):
            value = json.dumps(given[key], ensure_ascii=False).strip('"') if key in given else "(default)"
            rows.append((f"{section}.{key}", value))
    return rows


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read as JSON: {error}") from None
    if not isinstance(read, dict):
        raise UserError(f"{path}: expected an object, found {type(read).__name__}")
    return read


def _items(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read as JSONL: {error}") from None


if __name__ == "__main__":
    stage.main(run)
