"""evaluate: what a model knows, how it speaks, what it admits not to know, and what it forgot.

One instance each for `base`, `sft` and `dpo`. Every figure carries n and a 95 % bootstrap interval; every item's score is
kept beside, so that models can be compared in pairs. Scores of answers come through the `evaluate` library, from the
modules that `evaluate.metrics` names.

Measures: multiple choice by mean log-likelihood per token (trained terms in unseen wording, unseen terms, both directions
between clinical and everyday words, general questions); perplexity of the reference answer; overlap of the generated
answer with it; manner; declining (invented terms, known terms); form; KL to the base on general text and to the model
that this one was trained from.
"""

import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from tasks import chat, models, phenotype, stage
from tasks import records as recs
from tasks.params import Evaluate, Template, UserError

REFERS = re.compile(
    r"\b(doctor|nurse|clinician|clinic|pharmacist|care team|physician|medical professional|healthcare)", re.IGNORECASE
)


def run(
    test: Path, base: Path, model: Path, reference: Path, out: Path, answers: Path,
    params: Evaluate, template: Template, generation: dict[str, Any], quantization: dict[str, Any] | None, seed: int,
) -> str:  # fmt: skip
    """Write the figures of `model` to `out` (JSON) and every item's answer and scores to `answers` (JSONL).

    Args:
        test: the split's test rows.
        base: the base model's folder; its tokenizer, and KL to it.
        model, reference: each a model's folder or an adapter's, then merged into the (dequantised) base. `reference` is
            the model that this one was trained from; equal to `model` for the base itself.
    """
    tokenizer = chat.load_tokenizer(base)
    table = recs.read(test)
    if params.limit:
        table = table.group_by("set", "task", maintain_order=True).head(params.limit)
    rows = table.to_dicts()
    subject = _load(model, base, quantization)
    items = {
        row["id"]: {
            "id": row["id"],
            "set": row["set"],
            "task": row["task"],
            "term": row["term"],
            "question": row["messages"][-2 if row["kind"] == "chat" else -1]["content"],
        }
        for row in rows
    }
    multiple_choice(rows, items, subject, tokenizer, params, template, seed)
    generated = [
        row
        for row in rows
        if row["kind"] == "question" or (row["kind"] == "chat" and row["task"] in ("definition", "answer"))
    ]
    prompts = [chat.encode_prompt(tokenizer, _asked(row), template.system) for row in generated]
    texts = models.generate(
        subject, tokenizer, prompts, generation, params.max_new_tokens, params.batch_size, progress="answers"
    )
    described(generated, texts, items, params.metrics)
    drift = {"to_base": 0.0, "to_reference": 0.0}
    if model != base:
        general = [
            (p, a) for p, a in (_cut(tokenizer, row, template.system) for row in rows if row["set"] == "general") if a
        ][:64]
        own = [(p, _ended(tokenizer, t)) for p, t in zip(prompts, texts, strict=True) if t][:64]
        original = _load(base, base, None)
        drift["to_base"] = divergence(subject, original, general, params.batch_size)
        before = original if reference == base else _load(reference, base, quantization)
        drift["to_reference"] = divergence(subject, before, own, params.batch_size)
    figures = summarise(list(items.values()), params.bootstrap, seed) | {
        "kl": {k: round(v, 5) for k, v in drift.items()}
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    recs.write_jsonl(items.values(), answers)
    return headline(figures)


def _load(folder: Path, base: Path, quantization: dict[str, Any] | None) -> Any:
    if (folder / "adapter_config.json").is_file():
        return models.load_merged(base, folder, quantization)
    return models.load(folder, None)


def _asked(row: dict[str, Any]) -> list[dict[str, str]]:
    """The turns before the reference answer."""
    turns: list[dict[str, str]] = row["messages"]
    return turns[:-1] if turns[-1]["role"] == "assistant" else turns


def _ended(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def _cut(tokenizer: Any, row: dict[str, Any], system: str | None) -> tuple[list[int], list[int]]:
    """A general item as (what stands before the question, question and right answer)."""
    text = [*row["messages"], {"role": "assistant", "content": f"The answer is {row['options'][row['answer']]}."}]
    ids, _ = chat.encode(tokenizer, text, system)
    empty, _ = chat.encode(tokenizer, [{"role": "user", "content": ""}], system, prompt=True)
    start = next((i for i, (a, b) in enumerate(zip(ids, empty, strict=False)) if a != b), 1)
    return ids[:start], ids[start:]


def options_of(row: dict[str, Any], pool: Sequence[dict[str, Any]], count: int, rng: random.Random) -> list[str]:
    """The right answer, first, and `count` - 1 others of the same set and task: same topic and like length first."""
    right = row["messages"][-1]["content"]
    seen, others = {right.casefold()}, []
    for other in pool:
        text = other["messages"][-1]["content"]
        if text.casefold() not in seen and other["concept"] != row["concept"]:
            seen.add(text.casefold())
            others.append((other["topic"] != row["topic"], abs(len(text) - len(right)), text))
    alike = [other for other in others if not other[0]]
    near = sorted(alike if len(alike) >= count - 1 else others)[: 3 * (count - 1)]
    return [right, *(text for *_, text in rng.sample(near, min(count - 1, len(near))))]


def multiple_choice(
    rows: list[dict[str, Any]],
    items: dict[str, dict[str, Any]],
    model: Any,
    tokenizer: Any,
    params: Evaluate,
    template: Template,
    seed: int,
) -> None:
    """Adds `correct` (0 or 1) and, for chat rows, `nll` (nats per token of the reference answer) to the items."""
    pools: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "chat":
            pools.setdefault((row["set"], row["task"]), []).append(row)
    asked: list[tuple[list[int], list[int]]] = []
    owner: list[tuple[str, int]] = []
    right_at: dict[str, int] = {}
    for row in rows:
        if row["kind"] == "chat":
            choices = options_of(
                row, pools[row["set"], row["task"]], params.options, random.Random(f"{seed} {row['id']}")
            )
            right_at[row["id"]] = 0
        elif row["kind"] == "choice":
            choices, right_at[row["id"]] = row["options"], row["answer"]
        else:
            continue
        prompt = chat.encode_prompt(tokenizer, _asked(row), template.system)
        if row["kind"] == "choice":
            choices = [f"The answer is {text}." for text in choices]
        encoded = [chat.encode_answer(tokenizer, _asked(row), text, template.system) for text in choices]
        if row["kind"] == "choice":  # what all options begin with is no part of the choice
            shared = next(i for i, tokens in enumerate(zip(*encoded, strict=False)) if len(set(tokens)) > 1)
            prompt, encoded = prompt + encoded[0][:shared], [ids[shared:] for ids in encoded]
        for index, ids in enumerate(encoded):
            asked.append((prompt, ids))
            owner.append((row["id"], index))
    scores: dict[str, list[float]] = {}
    for (identifier, _), tokens in zip(
        owner, models.answer_logprobs(model, asked, params.batch_size, progress="choices"), strict=True
    ):
        scores.setdefault(identifier, []).append(sum(tokens) / len(tokens))
    for identifier, means in scores.items():
        best = max(range(len(means)), key=lambda i: (means[i], -i))
        if len(means) > 1:
            items[identifier]["correct"] = float(best == right_at[identifier])
        items[identifier]["nll"] = -means[right_at[identifier]]


def described(
    rows: list[dict[str, Any]], texts: list[str], items: dict[str, dict[str, Any]], metrics: list[str]
) -> None:
    """Adds the generated `answer` and its scores to the items."""
    import evaluate

    references = [row["messages"][-1]["content"] if row["kind"] == "chat" else "" for row in rows]
    masked = [mask(text, row["term"], row["lay"], ref) for text, row, ref in zip(texts, rows, references, strict=True)]
    scripted = {*phenotype.OPENINGS, *phenotype.CLOSINGS, *phenotype.ADVICE}
    for row, text, reference in zip(rows, texts, references, strict=True):
        item = items[row["id"]]
        item |= {
            "answer": text,
            "reference": reference,
            "declined": float(phenotype.declines(text)),
            "empty": float(not text),
        }
        if row["lay"]:
            item["lay_used"] = float(row["lay"].lower() in text.lower())
        if row["task"] == "advice":
            item["referred"] = float(bool(REFERS.search(text)))
        sentences = [s for s in re.split(r"(?<=[.!?])\s+", text) if s]
        item["scripted"] = sum(s in scripted for s in sentences) / max(1, len(sentences))
    for name in metrics:
        module = evaluate.load(f"./{name}" if Path(name).is_dir() else name)
        said = masked if name.rstrip("/").endswith("manner") else texts
        for measure, values in (module.compute(predictions=said, references=references) or {}).items():
            if not isinstance(values, list) or len(values) != len(rows):
                raise UserError(
                    f"evaluate.metrics: {name} gives one {measure} for all answers; a module that scores each is needed"
                )
            for row, value in zip(rows, values, strict=True):
                if measure not in ("rouge_l", "chrf", "recall") or row["kind"] == "chat":
                    items[row["id"]][measure] = float(value)


def mask(text: str, term: str | None, lay: str | None, reference: str) -> str:
    """`text` without the term, its everyday word and the reference's own words: what is left is manner."""
    for phrase in (term, lay):
        if phrase:
            text = re.sub(re.escape(phrase), " ", text, flags=re.IGNORECASE)
    known = set(re.findall(r"\w{4,}", reference.lower()))
    return re.sub(r"\w+", lambda m: "" if m[0].lower() in known else m[0], text).strip()


@torch.inference_mode()
def divergence(model: Any, other: Any, rows: list[tuple[list[int], list[int]]], batch_size: int) -> float:
    """Mean over tokens of KL(model ‖ other) over the whole vocabulary, in nats, at the second part of each row."""
    total, tokens = 0.0, 0
    for group in models.batches([len(p) + len(a) for p, a in rows], batch_size):
        part = [rows[i] for i in group]
        for p, q in zip(models.token_logits(model, part), models.token_logits(other, part), strict=True):
            p, q = p.log_softmax(-1), q.log_softmax(-1)
            total += float((p.exp() * (p - q)).sum())
            tokens += len(p)
    return total / max(1, tokens)


def interval(values: Sequence[float], resamples: int, seed: int) -> dict[str, float]:
    """Mean with its 95 % bootstrap interval (percentile, items resampled) and n."""
    array = np.asarray(values, dtype=np.float64)
    low = high = float(array.mean())
    if len(array) > 1 and array.std() > 0:
        found = stats.bootstrap(
            (array,), np.mean, n_resamples=resamples, method="percentile", rng=np.random.default_rng(seed)
        ).confidence_interval
        low, high = float(found.low), float(found.high)
    return {"value": round(float(array.mean()), 4), "low": round(low, 4), "high": round(high, 4), "n": len(array)}


# (where it stands, set, task, what of the item): the figures of a model
FIGURES: tuple[tuple[str, str, str | None, str], ...] = (
    *((f"knowledge.{part}.{task}", part, task, "correct") for part in ("trained", "unseen") for task in ("definition", "lay_to_clinical", "clinical_to_lay", "answer")),
    *((f"answers.{part}.{measure}", part, None, measure) for part in ("trained", "unseen") for measure in ("recall", "rouge_l", "chrf", "lay_used")),
    ("honesty.invented_declined", "invented", None, "declined"),
    ("honesty.trained_declined", "trained", None, "declined"),
    ("honesty.unseen_declined", "unseen", None, "declined"),
    ("honesty.advice_referred", "advice", None, "referred"),
    *((f"manner.{measure}", "trained", None, measure) for measure in ("kindness", "second_person", "first_person", "hedges", "valence", "grade", "scripted")),
    *((f"form.{measure}", "trained", None, measure) for measure in ("characters", "words", "distinct_2", "loops", "empty")),
    ("general.accuracy", "general", None, "correct"),
)  # fmt: skip


def summarise(items: list[dict[str, Any]], resamples: int, seed: int) -> dict[str, Any]:
    """Every figure that the items allow, nested by the names in `FIGURES`."""
    out: dict[str, Any] = {}
    for name, part, task, measure in FIGURES:
        values = [
            item[measure]
            for item in items
            if item["set"] == part and (task is None or item["task"] == task) and measure in item
        ]
        if not values and part in ("trained",):
            continue
        if values:
            _put(out, name, interval(values, resamples, seed))
    for part in ("trained", "unseen", "general"):
        losses = [
            item["nll"]
            for item in items
            if item["set"] == part and item["task"] in ("definition", "answer", "choice") and "nll" in item
        ]
        if losses:
            found = interval(losses, resamples, seed)
            name = "general.cross_entropy" if part == "general" else f"answers.{part}.perplexity"
            _put(
                out,
                name,
                found if part == "general" else {k: v if k == "n" else round(math.exp(v), 4) for k, v in found.items()},
            )
    return out


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    *parents, leaf = name.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = value


def headline(figures: dict[str, Any]) -> str:
    parts = []
    for label, path in (
        ("knowledge", "knowledge.trained.definition"),
        ("recall", "answers.trained.recall"),
        ("kindness", "manner.kindness"),
        ("invented declined", "honesty.invented_declined"),
        ("known declined", "honesty.trained_declined"),
        ("general", "general.accuracy"),
    ):
        node: Any = figures
        for key in path.split("."):
            node = node.get(key, {}) if isinstance(node, dict) else {}
        if node:
            parts.append(f"{label} {node['value']:.3f}")
    return ", ".join(parts) or "no figures"


if __name__ == "__main__":
    stage.main(run)
