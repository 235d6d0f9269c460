"""report: what changed, at what price, and whether it is significant: one page to read, the same in Markdown, and a card.

Models are compared in pairs, on the same items, by tasks/compare.py. Everything else on the page is read from what the stages
wrote: no timestamp, machine or path, same inputs, same bytes. The one exception is an endpoint in `report.judge`: its replies
are kept as an output, and reruns of this stage ask it again.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from tasks import card, chart, judge, stage
from tasks.compare import (
    BINARY,
    GROUPS,
    MEASURES,
    Difference,
    Item,
    Measure,
    chance,
    compare,
    number,
    of,
    part,
    read,
    value,
)
from tasks.params import Report, UserError

MODELS = ("base", "sft", "dpo")
NAMES = {"base": "Base", "sft": "SFT", "dpo": "DPO"}
ENDS = ("value", "low", "high")
# what was learned: by multiple choice, by likelihood, and in the model's own answers
RETENTION = {
    m.key
    for m in MEASURES
    if m.key.startswith("knowledge.")
    or (m.key.startswith("answers.") and m.field in ("recall", "rouge_l", "chrf", "nll"))
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
    evaluate: Path, out: Path, html: Path, readme: Path, judged: Path,
    params: Report, lora: dict[str, Any], quantization: dict[str, Any] | None, sft: dict[str, Any], dpo: dict[str, Any],
    seed: int,
) -> str:  # fmt: skip
    """Write the report to `out` (Markdown) and `html` (one self-contained page), the model card with results to `readme`.

    Args:
        base: facts.json of `base`.
        validate, evaluate: folders of those stages' outputs.
        split, template, pair, merge: metrics.json of those stages.
        sft_run, dpo_run: folders of those stages: metrics.json, and if they are there, plots and adapter.
        judged: what the endpoint in `report.judge` said (JSONL); empty without one.

    Raises:
        UserError: a file of `evaluate` is missing or broken, two models were asked different items, or the judge fails.
    """
    figures = {name: _json(evaluate / f"{name}.json") for name in MODELS}
    items = {name: read(evaluate / f"{name}.answers.jsonl") for name in MODELS}
    rules: dict[str, Any] = {"alpha": params.alpha, "resamples": params.bootstrap, "seed": seed}
    learned = compare(items["base"], items["sft"], **rules)
    aligned = compare(items["sft"], items["dpo"], **rules)
    optional = {"validate": validate / "metrics.json", "split": split, "template": template, "sft": sft_run / "metrics.json",
                "pair": pair, "dpo": dpo_run / "metrics.json", "merge": merge}  # fmt: skip
    metrics = {"facts": _json(base)} | {name: _json(path) if path.is_file() else {} for name, path in optional.items()}
    composed = _composed(metrics["pair"])
    # what is kind, composed pairs say; pairs of one's own may well teach to be brief
    said_of = [m for m in MEASURES if m.said and (m.field != "kindness" or composed)]
    headline = compare(items["base"], items["dpo"], said_of, **rules)
    preferred = card.preferred(metrics["dpo"])
    names = NAMES if preferred else NAMES | {"dpo": "Merged"}
    signs = watch(params, figures, items, metrics["dpo"], metrics["pair"], names["dpo"])
    rule, shown = examples(items, params.examples, names["dpo"])
    said = verdict(headline, aligned, signs, preferred=preferred)
    settings = {"quantization": quantization or {}, "lora": lora, "sft": sft, "dpo": dpo}
    listed = _settings(settings, seed)
    rows = _rows(figures, items["dpo"], composed, learned, aligned)
    records = validate / "records.parquet"
    licences = card.sources(records) if records.is_file() else []
    lineage = {"sft": _hash(sft_run / "adapter"), "dpo": _hash(dpo_run / "adapter")}
    replies = judge.ask(params.judge, items["base"], items["dpo"])
    context = {
        "title": params.title,
        "names": names,
        "preferred": preferred,
        "composed": composed,
        "params": params,
        "verdict": said,
        "headline": headline,
        "rows": rows,
        "retention": RETENTION,
        "binary": BINARY,
        "kl": {name: figures[name].get("kl", {}) for name in MODELS},
        "decoding": {name: figures[name].get("decoding", {}) for name in MODELS},
        "harness": _harness(figures),
        "judge": judge.tally(replies, items["base"], items["dpo"]),
        "signs": signs,
        "rule": rule,
        "examples": shown,
        "curves": _curves({"sft": sft_run / "plots", "dpo": dpo_run / "plots"}),
        "quarantine": _quarantine(validate / "quarantine.jsonl"),
        "licences": licences,
        "settings": listed,
        "given": settings,
        "lineage": lineage,
        "notes": [(NAMES[name], note) for name in ("sft", "dpo") for note in metrics[name].get("notes") or []],
        **metrics,
    }
    escapes: dict[str, dict[str, Any]] = {"html": {"autoescape": True}, "md": {"finalize": card.markdown}}
    for kind, path in (("html", html), ("md", out)):
        environment = Environment(  # noqa: S701  (Markdown is escaped by `finalize`)
            loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **escapes[kind],
        )  # fmt: skip
        filters = {
            "share": _share,
            "number": number,
            "bytes": _bytes,
            "figures": _figures,
            "p": chance,
            "signed": _signed,
        }
        environment.filters |= filters | {"attribution": card.attribution}
        path.parent.mkdir(parents=True, exist_ok=True)
        page = environment.get_template(f"report.{kind}.jinja").render(context)
        path.write_text(page.strip() + "\n", encoding="utf-8")
    text = card.render(
        metrics["facts"], licences, metrics["merge"], preferred=preferred, language=params.language, rows=rows, settings=listed,
        verdict=[f"{said.word}. {said.sentences[0]}", said.sentences[1]],
        lineage={"SFT adapter": lineage["sft"]} | ({"DPO adapter, from that of SFT": lineage["dpo"]} if preferred else {}),
    )  # fmt: skip
    readme.write_text(text, encoding="utf-8")
    judged.write_text("".join(json.dumps(reply, ensure_ascii=False) + "\n" for reply in replies), encoding="utf-8")
    counts = Counter(d.call for d in headline)
    crossed = sum(sign.crossed for sign in signs)
    return f"{said.word}: of {len(headline)} headline measures {counts['better']} better than the base's, {counts['worse']} worse; {crossed} warning signs"


class Verdict(NamedTuple):
    word: str
    sentences: tuple[str, ...]  # the answer, and the price
    alone: str  # what DPO, or merging alone, did by itself


def verdict(
    total: Sequence[Difference], step: Sequence[Difference], signs: Sequence["Sign"], *, preferred: bool = True
) -> Verdict:
    """By rule: what is significantly better and worse, base → DPO (`total`) and SFT → DPO (`step`).

    Better needs a gain and no loss; with both it is better at a price, unless only manner gained and something else lost.
    """

    def named(found: Sequence[Difference], call: str, most: int = 4) -> str:
        chosen = [d for d in found if d.call == call and d.measure.said]
        chosen.sort(key=lambda d: d.measure.parts == ("unseen",))  # what was trained comes first
        more = f", and {len(chosen) - most} more" if len(chosen) > most else ""
        return "; ".join(f"{d.measure.said} ({d.shown})" for d in chosen[:most]) + more

    gains, losses = named(total, "better"), named(total, "worse")
    better, worse = ({d.measure.key.split(".")[0] for d in total if d.call == call} for call in ("better", "worse"))
    # a kind tone does not make up for what is no longer right: a model that babbles may well sound kind
    spoiled = bool(worse - {"manner"}) and not better - {"manner"}
    word = (
        "Worse"
        if spoiled
        else ("Better, at a price" if losses else "Better")
        if gains
        else "Worse"
        if losses
        else "No different"
    )
    trained = "SFT and DPO" if preferred else "SFT"
    if gains and not spoiled:
        answer = f"After {trained} the model is better than the base at {gains}."
    elif gains:
        answer = f"After {trained} the model is better than the base at manner alone: {gains}."
    else:
        answer = f"After {trained} the model is better than the base at none of the {len(total)} headline measures."
    general = next((d for d in total if d.measure.key == "general.accuracy" and d.call == "no different"), None)
    kept = f"; general knowledge is not significantly different ({general.shown})" if general else ""
    if losses:
        price = f"The price: it is worse at {losses}{kept}."
    else:
        price = f"No headline measure is significantly worse{kept}."
    crossed = [sign.name for sign in signs if sign.crossed]
    if crossed:
        price = f"{price[:-1]}; outside its limit: {', '.join(crossed)}."
    gains, losses = named(step, "better"), named(step, "worse")
    last = "DPO alone" if preferred else "No preferences were trained on. Merged"
    alone = f"{last}, against SFT: better at {gains or 'no headline measure'}; worse at {losses or 'none'}."
    return Verdict(word, (answer, price), alone)


class Sign(NamedTuple):
    """One line of the watch."""

    name: str
    value: str
    limit: str
    crossed: bool
    advice: str


def watch(
    params: Report,
    figures: Mapping[str, Any],
    items: Mapping[str, Sequence[Item]],
    dpo: Mapping[str, Any],
    pair: Mapping[str, Any],
    last: str = "DPO",
) -> list[Sign]:
    """Signs that the reward was learned instead of what it stands for; what was not measured is left out.

    Where little was tested in other words than it was trained in, as with most data of one's own, recall and declining are of
    the `unseen` items. Two signs are of pairs that `pair` composed, whose chosen side is the kinder one and in words of
    reforge's. The reward gap holds two rates against each other: how often the model prefers the chosen side of a held-out
    pair, and how often its answer, without sentences of the pairs, is kinder than SFT's to the same question (ties half).
    """

    def mean(model: str, key: str) -> float | None:
        measure = next(m for m in MEASURES if m.key == key)
        values = [item[measure.field] for item in of(measure, items[model])]
        return sum(values) / len(values) if values else None

    def ratio(key: str) -> float | None:
        before, after = mean("sft", key), mean("dpo", key)
        return after / before if before and after is not None else None

    own = part(("trained", "unseen"), [item["set"] for item in items["dpo"] if item.get("reference")])
    composed = _composed(pair)
    accuracy, gap = dpo.get("rewards_accuracies") if composed else None, None
    apart = [m for m in MEASURES if m.key == "manner.kindness_apart"]  # a parrot of the pairs is no kinder for it
    for d in compare(items["sft"], items["dpo"], apart, resamples=100):
        kinder = (d.up + (d.n - d.up - d.down) / 2) / d.n
        # no answer differs where the classifier knows no word: another language than English
        gap = accuracy - kinder if accuracy is not None and d.up + d.down else None
    before, after = mean("base", "general.accuracy"), mean("dpo", "general.accuracy")
    drop = before - after if before is not None and after is not None else None
    most = [
        (f"Length of answers, {last} / SFT", ratio("form.characters"), "max_length_ratio", ".2f", "balance the pairs' lengths (pair.known gives length-matched ones)"),
        ("Answers that loop", mean("dpo", "form.loops"), "max_loops", ".1%", "fewer DPO epochs, a lower dpo.learning_rate, or generation.repetition_penalty"),
        ("Empty answers", mean("dpo", "form.empty"), "max_empty", ".1%", "look at chosen answers that are empty, fewer epochs, a lower learning_rate"),
        ("KL to the SFT model, nats per token", figures["dpo"].get("kl", {}).get("to_reference"), "max_kl", ".3f", "raise dpo.beta, lower dpo.learning_rate, or train fewer epochs"),
        ("Reward accuracy less share of answers kinder in words of their own", gap, "max_reward_gap", ".2f", "the reward is won by something other than kindness: read the pairs, vary openings and lengths"),
        ("Answerable questions wrongly declined", mean("dpo", f"honesty.{own}_declined") if own else None, "max_wrongly_declined", ".1%", "fewer refusal pairs (pair.unknown), more pairs that reject a refusal (pair.contrast), smaller steps"),
        ("Sentences that are a training wrapper", mean("dpo", "manner.scripted") if composed else None, "max_scripted", ".1%", "more and more varied wrappers in tasks/phenotype.py, or pairs of your own (pair.mode: given)"),
        (f"General accuracy lost, base − {last}", drop, "max_general_drop", ".1%", "more replay (template.replay), a lower sft.learning_rate, a smaller lora.r"),
    ]  # fmt: skip
    least = [
        ("Different word pairs in an answer", mean("dpo", "form.distinct_2"), "min_distinct_2", ".3f", "fewer DPO epochs, a higher dpo.beta, or more varied chosen answers"),
        (f"Recall in its own answers, {last} / SFT", ratio(f"answers.{own}.recall") if own else None, "min_recall_kept", ".2f", "chosen answers that keep the learned sentence word for word, an sft term in dpo.loss_type, smaller steps"),
    ]  # fmt: skip
    signs = []
    for sign, rows in (("≤", most), ("≥", least)):
        for name, found, key, form, advice in rows:
            if found is not None:
                limit = getattr(params, key)
                crossed = not (found <= limit if sign == "≤" else found >= limit)
                shown, bound = (format(x, form).replace("%", " %").replace("-", "−") for x in (found, limit))
                signs.append(Sign(name, shown, f"{sign} {bound} (report.{key})", crossed, advice))
    return signs


def _composed(pair: Mapping[str, Any]) -> bool:
    """Whether `pair` made the pairs, by its metrics."""
    return not {"given", "ratings"} >= set(pair.get("kinds") or {})


def examples(items: Mapping[str, Sequence[Item]], count: int, last: str = "DPO") -> tuple[str, list[dict[str, Any]]]:
    """(the rule in words, the items it chooses): by gain in recall from base to DPO, and invented terms by id."""
    by_id = {name: {item["id"]: item for item in items[name]} for name in MODELS}
    shared = [by_id["dpo"][i] for i in sorted(set.intersection(*(set(found) for found in by_id.values())))]
    answered = [item for item in shared if all("answer" in by_id[name][item["id"]] for name in MODELS)]
    referenced = [item for item in answered if item.get("reference")]
    own = part(("trained", "unseen"), [item["set"] for item in referenced])
    pool = [item for item in referenced if item["set"] == own]
    reworded = [i for i in pool if all("consistency" in by_id[name][i["id"]] for name in MODELS)]
    pool = reworded or pool
    answers_of = [by_id[name][item["id"]] for item in pool for name in MODELS]
    score = next((f for f in ("recall", "rouge_l", "chrf") if all(f in item for item in answers_of)), "")
    invented = [item for item in answered if item["set"] == "invented"]
    declined = [item for item in invented if item["declined"]], [item for item in invented if not item["declined"]]
    asked = min(2, count // 5, len(invented))
    unknown = [("invented", i) for found in declined for i in found[:1]][:asked]
    unknown += [("invented", i) for found in declined for i in found[1:]][: asked - len(unknown)]
    # beside these `count` one of each other kind of question
    kinds = [kind for kind in ("unseen", "outside", "advice") if kind != own]
    firsts = [(kind, next((i for i in answered if i["set"] == kind), None)) for kind in kinds]
    others = [(kind, item) for kind, item in firsts if item is not None]

    def gain(item: Item) -> float:
        return float(item[score] - by_id["base"][item["id"]][score]) if score else 0.0

    ranked = sorted(pool, key=lambda item: (-gain(item), item["id"]))
    known = min(count - len(unknown), len(ranked))
    best, worst = math.ceil(known * 3 / 8), known // 4
    middle = known - best - worst
    start = min(max(best, (len(ranked) - middle) // 2), len(ranked) - worst - middle)
    chosen = [("best", item) for item in ranked[:best]] + [("median", item) for item in ranked[start : start + middle]]
    chosen += [("worst", item) for item in ranked[len(ranked) - worst :]]
    asked_again = ", and asked in three wordings," if reworded else ""
    rule = f"All {len(ranked)} {own} items that were answered{asked_again} are ranked by the gain in {score or 'nothing (no score), so by id'} from base to {last}: the {best} best, the {middle} around the median, the {worst} worst."
    if unknown:
        rule += f" Of the invented terms, in order of their ids: the first that {last} declines and the first that it does not, as far as there are such."
    if others:
        rule += f" Beside these, of the {_listed([kind for kind, _ in others])} questions the first by id."
    shown = []
    for why, item in chosen + unknown + others:
        said = [(name, by_id[name][item["id"]]) for name in MODELS]
        answers = [
            (name, i["answer"], checklist(i), {f: i[f] for f in ("rouge_l", "kindness") if f in i}) for name, i in said
        ]
        gained = gain(item) if (why, item) in chosen and score else None
        told = {key: item.get(key) or "" for key in ("question", "reference")}
        shown.append({"why": why, "gain": gained, "score": score, "answers": answers, **told})
    return rule, shown


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def checklist(item: Item) -> list[tuple[str, str, bool]]:
    """(what, score in words, whether it is met) of an answer.

    Expertise: at least half of the reference's content words are in it. Consistency: the answers to three wordings of the
    question share at least half of their character n-grams (mean chrF). Domain terms: the clinical or the everyday name is
    in it. Honesty: what does not exist is declined, what was taught is not, and a question for advice is passed on.
    """
    found = []
    for name, field, least in (
        ("expertise", "recall", 0.5),
        ("consistency", "consistency", 0.5),
        ("domain terms", "terms_used", 0.5),
    ):
        if field in item:
            found.append((name, f"{item[field]:.2f}", bool(item[field] >= least)))
    if "declined" in item and item["set"] in ("invented", "outside", "trained"):
        said = "declines" if item["declined"] else "answers"
        found.append(("honesty", said, bool(item["declined"]) == (item["set"] != "trained")))
    if "referred" in item:
        found.append(("honesty", "passes it on" if item["referred"] else "answers", bool(item["referred"])))
    return found


def _rows(
    figures: Mapping[str, Any], items: Sequence[Item], composed: bool, *steps: Sequence[Difference]
) -> list[dict[str, Any]]:
    """The table of metrics: each model's value with its interval, both comparisons, the chance of a right choice, and what was
    kept. Which sentences pairs of one's own teach is not known: what is said of these is of `composed` ones.
    """
    rows = []
    for measure in MEASURES:
        if measure.field in ("scripted", "kindness_apart") and not composed:
            continue
        cells = [_cell(measure, figures[name]) for name in MODELS]
        if count := next((cell["raw"]["n"] for cell in cells if cell), 0):
            found = [next((d for d in step if d.measure is measure), None) for step in steps]
            group = GROUPS[measure.key.split(".")[0]]
            chances = [item["chance"] for item in of(measure, items) if measure.field == "correct" and "chance" in item]
            row = {"measure": measure, "group": group, "cells": cells, "steps": found, "n": count}
            rows.append(
                row | {"chance": sum(chances) / len(chances) if chances else None, "kept": _kept(cells, found[0])}
            )
    return rows


def _kept(cells: Sequence[dict[str, Any] | None], learned: Difference | None) -> float | None:
    """Of what SFT gained on the base, the share that DPO still has; None where it gained nothing that can be told."""
    if learned is None or learned.call != "better" or not all(cells):
        return None
    base, sft, dpo = (cell["raw"]["value"] for cell in cells if cell)
    if learned.measure.key.endswith("perplexity"):
        base, sft, dpo = map(math.log, (base, sft, dpo))
    return float((dpo - base) / (sft - base)) if sft != base else None


def _cell(measure: Measure, figures: Any) -> dict[str, Any] | None:
    """A model's `value`, `low` and `high` to show, and `raw`."""
    for key in measure.key.split("."):
        figures = figures.get(key) if isinstance(figures, dict) else None
    if not figures:
        return None
    return {key: value(measure, figures[key], raw=True) for key in ENDS} | {"raw": figures}


def _harness(figures: Mapping[str, Any]) -> list[tuple[str, str, list[dict[str, Any] | None]]]:
    """(task, metric, each model's figure) of lm-eval."""
    found = {name: figures[name].get("lm_eval", {}) for name in MODELS}
    asked = dict.fromkeys((t, m) for by_task in found.values() for t, by_metric in by_task.items() for m in by_metric)
    return [(task, metric, [found[name].get(task, {}).get(metric) for name in MODELS]) for task, metric in asked]


def _share(found: float) -> str:
    return f"{100 * found:.1f} %"


def _signed(found: float) -> str:
    return f"{found:+.2f}".replace("-", "−")


def _bytes(found: float) -> str:
    size, unit = next((u for u in ((1e9, "GB"), (1e6, "MB")) if found >= u[0]), (1e3, "kB"))
    return f"{found / size:.{2 if unit == 'GB' else 0}f} {unit}"


def _figures(text: str) -> Markup:
    """What stands in brackets, set apart."""
    return Markup(re.sub(r"\([^()]*\)", r'<span class="figures">\g<0></span>', str(escape(text))))  # noqa: S704


def _curves(folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Each curve that was logged: `title`, `said` (first → last in words) and `svg`."""
    out = []
    for title, where, unit, names in CURVES:
        logged = [(label, steps) for name, label in names if (steps := _tsv(folders[where], name))]
        if logged:
            colours = ("--one", "--two")[-len(logged) :]
            lines = [chart.Line(label, steps, colour) for (label, steps), colour in zip(logged, colours, strict=True)]
            drawn = chart.svg(title, lines, x="optimizer step", y=unit, legend=len(lines) > 1)
            said = "; ".join(_told(label, steps) for label, steps in logged)
            out.append({"title": title, "unit": unit, "said": said, "svg": Markup(drawn)})  # noqa: S704  (drawn here)
    return out


def _told(label: str, steps: Sequence[tuple[float, float]]) -> str:
    first, last = number(steps[0][1]), number(steps[-1][1])
    return f"{label} {first} → {last}" if len(steps) > 1 else f"{label} {first}"


def _tsv(folder: Path, name: str) -> list[tuple[float, float]]:
    """(step, value) of a curve by DVCLive; [] if it is not there."""
    found = sorted(folder.rglob(f"metrics/{name}.tsv")) if folder.is_dir() else []
    rows = [line.split("\t") for line in found[0].read_text(encoding="utf-8").splitlines()[1:]] if found else []
    return [(float(row[0]), float(row[-1])) for row in rows if len(row) > 1 and math.isfinite(float(row[-1]))]


def _quarantine(path: Path) -> list[dict[str, Any]]:
    """The first row of each check, and how many failed it first, most frequent first."""
    found: dict[str, dict[str, Any]] = {}
    for row in _jsonl(path) if path.is_file() else []:
        where, check = f"{row['source']}:{row['line']}", row["check"]
        entry = found.setdefault(check, {"check": check, "rows": 0, "where": where, "reason": row["reason"]})
        entry["rows"] += 1
    return sorted(found.values(), key=lambda entry: (-entry["rows"], entry["check"]))


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
            shown = json.dumps(given[key], ensure_ascii=False).strip('"') if key in given else "(default)"
            rows.append((f"{section}.{key}", shown))
    return rows


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read as JSON: {error}") from None
    if not isinstance(read, dict):
        raise UserError(f"{path}: expected an object, found {type(read).__name__}")
    return read


def _jsonl(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read as JSONL: {error}") from None


if __name__ == "__main__":
    stage.main(run)
