"""evaluate: what a model knows, how it speaks, what it admits not to know, and what it forgot.

One instance each for `base`, `sft` and `dpo`. Every figure carries n and a 95 % bootstrap interval; every item's score is
kept beside, so that models can be compared in pairs. Scores of answers come through the `evaluate` library, from the
modules that `evaluate.metrics` names.

Measures: multiple choice by mean log-likelihood per token (trained terms in unseen wording, unseen terms, both directions
between clinical and everyday words, general questions); perplexity of the reference answer; overlap of the generated
answer with it; the same question in three wordings; manner; declining (invented terms, questions that nobody can answer,
known terms); form; KL to the base on general text and to the model that this one was trained from.

Some items are decoded again, greedily and with several seeds: what the scores owe to decoding alone.
"""

import contextlib
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks import compare, decode, models, phenotype, phrases, render, stage
from tasks import records as recs
from tasks.params import Evaluate, Template, UserError

KL_BATCH = 8  # answers whose logits over the whole vocabulary are held at once
# compared: each token has the whole vocabulary in float32, 2.3 GiB in all for one of 152,000
KL_ROWS, KL_TOKENS = 64, 4096
# another wording of a question of any domain, and of one in Korean
COURTESIES = ("{} Thank you.", "I have a question. {}")
COURTESIES_KO = ("{} 감사합니다.", "궁금한 것이 있습니다. {}")
# behind a consonant, behind a vowel; the longer first
PARTICLES = (("이란", "란"), ("이라", "라"), ("으로", "로"), ("은", "는"), ("이", "가"), ("을", "를"), ("과", "와"))
# turns of each prompt, a label, an offset of the seed, GenerationConfig → answers, and whether each was cut
Said = Callable[..., list[decode.Answer]]
# what no module of `evaluate.metrics` may call a score
TAKEN = {
    "id", "set", "task", "concept", "term", "question", "answer", "reference", "options", "chance", "correct", "nll", "cut", "empty",
    "declined", "lay_used", "terms_used", "referred", "scripted", "reworded", "consistency", "noise",
}  # fmt: skip
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}  # the model's own distribution


def run(
    test: Path, base: Path, model: Path, reference: Path, harness: Path, out: Path, answers: Path,
    params: Evaluate, template: Template, generation: dict[str, Any], quantization: dict[str, Any] | None, seed: int,
) -> str:  # fmt: skip
    """Write the figures of `model` to `out` (JSON) and every item's answer and scores to `answers` (JSONL).

    Args:
        test: the split's test rows.
        base: the base model's folder; its tokenizer, and KL to it.
        model, reference: each a model's folder or an adapter's, then merged into the (dequantised) base. `reference` is
            the model that this one was trained from; equal to `model` for the base itself.
        harness: folder of local tasks for lm-eval; read only if `evaluate.lm_eval.tasks` names any.
    """
    tokenizer = render.load_tokenizer(base)
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
            "concept": row["concept"],
            "term": row["term"],
            "question": _question(row),
        }
        for row in rows
    }
    multiple_choice(rows, items, subject, tokenizer, params, template, seed)

    def said(turns: list[list[dict[str, str]]], label: str, offset: int = 0, **sampling: Any) -> list[decode.Answer]:
        torch.manual_seed(seed + offset)
        prompts = [render.encode_prompt(tokenizer, asked, template.system) for asked in turns]
        given = generation | sampling
        return decode.generate(
            subject, tokenizer, prompts, given, params.max_new_tokens, params.batch_size, progress=label
        )

    generated = [
        row
        for row in rows
        if row["kind"] == "question" or (row["kind"] == "chat" and row["task"] in ("definition", "answer"))
    ]
    answers_given = said([_asked(row) for row in generated], "answers")
    texts = [text for text, _ in answers_given]
    for row, (text, cut), found in zip(generated, answers_given, scored(generated, texts, params.metrics), strict=True):
        items[row["id"]] |= {"answer": text, "reference": _reference(row), "cut": float(cut), **found}

    ask_again(generated, items, said, params.reworded)
    decoding = decode_again(generated, items, said, params, greedy=not generation.get("do_sample"))
    harnessed = lm_eval(subject, tokenizer, harness, params, seed) if params.lm_eval.tasks else None
    drift: dict[str, float | None] = {"to_base": 0.0, "to_reference": 0.0}
    if model != base:
        general = _bounded(_cut(tokenizer, row, template.system) for row in rows if row["kind"] == "choice")
        prompts = [render.encode_prompt(tokenizer, _asked(row), template.system) for row in generated]
        spoken = _bounded((p, _ended(tokenizer, t)) for p, t in zip(prompts, texts, strict=True) if t)
        size = min(params.batch_size, KL_BATCH)
        ours = [models.distributions(subject, part, size) for part in (general, spoken)]
        subject = None  # one model at a time: two of seven billion parameters would not fit a GPU of 24 GiB
        before = _load(base, base, None)
        drift["to_base"] = divergence(ours[0], before, general, size)
        if reference != base:
            before = None  # freed before the next one is loaded
            before = _load(reference, base, quantization)
        drift["to_reference"] = divergence(ours[1], before, spoken, size)
    every = list(items.values())
    figures = summarise(every, params.bootstrap, seed)
    figures["kl"] = {name: None if value is None else round(value, 5) for name, value in drift.items()}
    if decoding:
        figures["decoding"] = decoding | {"floor": floors(every)}
    if harnessed is not None:
        figures["lm_eval"] = harnessed
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    recs.write_jsonl(every, answers)
    return headline(figures)


def _load(folder: Path, base: Path, quantization: dict[str, Any] | None) -> Any:
    if (folder / "adapter_config.json").is_file():
        return models.cast(models.load_merged(base, folder, quantization), models.compute_dtype())
    return models.load(folder, None)


def _asked(row: dict[str, Any]) -> list[dict[str, str]]:
    """The turns before the reference answer."""
    turns: list[dict[str, str]] = row["messages"]
    return turns[:-1] if turns[-1]["role"] == "assistant" else turns


def _reference(row: dict[str, Any]) -> str:
    return str(row["messages"][-1]["content"]) if row["kind"] == "chat" else ""


def _question(row: dict[str, Any]) -> str:
    """What the answer is to, as text: of a conversation all of it."""
    turns = [turn for turn in _asked(row) if turn["role"] != "system"]
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)


def _bounded(rows: Iterable[models.Row]) -> list[models.Row]:
    """The first `KL_ROWS` of them that have a second part, of `KL_TOKENS` in all."""
    out, left = list[models.Row](), KL_TOKENS
    for prompt, answer in rows:
        if answer and left and len(out) < KL_ROWS:
            out.append((prompt, answer[:left]))
            left -= len(out[-1][1])
    return out


def _ended(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def _cut(tokenizer: Any, row: dict[str, Any], system: str | None) -> tuple[list[int], list[int]]:
    """A general item as (what stands before the question, question and right answer)."""
    text = [*row["messages"], {"role": "assistant", "content": f"The answer is {row['options'][row['answer']]}."}]
    ids, _ = render.encode(tokenizer, text, system)
    empty, _ = render.encode(tokenizer, [{"role": "user", "content": ""}], system, prompt=True)
    start = next((i for i, (a, b) in enumerate(zip(ids, empty, strict=False)) if a != b), 1)
    return ids[:start], ids[start:]


def options_of(row: dict[str, Any], pool: Sequence[dict[str, Any]], count: int, rng: random.Random) -> list[str]:
    """The right answer, first, and `count` - 1 others of the same set and task: same topic and like length first.

    Where the question names its term, the others name it too in place of their own: else repeating it would be enough.
    """
    right, asked = row["messages"][-1]["content"], _question(row)
    # as the question writes them
    names = {key: found["name"] for key in ("term", "lay") if row[key] and (found := _name(row[key]).search(asked))}
    seen, others = {right.casefold()}, []
    for other in pool:
        text = other["messages"][-1]["content"]
        for key, name in names.items():
            if other[key]:
                text = _name(other[key]).sub(lambda found, name=name: _in_place(found, name), text)  # type: ignore[misc]
        if text.casefold() not in seen and other["concept"] != row["concept"]:
            seen.add(text.casefold())
            others.append((other["topic"] != row["topic"], abs(len(text) - len(right)), text))
    alike = [other for other in others if not other[0]]
    near = sorted(alike if len(alike) >= count - 1 else others)[: 3 * (count - 1)]
    return [right, *(text for *_, text in rng.sample(near, min(count - 1, len(near))))]


def _name(text: str) -> re.Pattern[str]:
    """The name as a word: in Korean also what a particle or a noun is written behind, without a space."""
    behind = rf"(?P<particle>{'|'.join(itertools.chain(*PARTICLES))})?" if _hangul(text) else r"(?P<particle>)(?!\w)"
    return re.compile(rf"(?<!\w)(?P<name>{re.escape(text)}){behind}", re.IGNORECASE)


def _in_place(found: re.Match[str], name: str) -> str:
    """`name` where another name was found, written as that was: its capital, the particle that its last syllable asks for."""
    opens = re.search(r"(?:^|[.!?]\s+)$", found.string[: found.start()]) is not None
    capital = opens if found["name"][:2].isupper() else found["name"][0].isupper()  # an abbreviation has its own
    if not name[:2].isupper():
        name = (name[0].upper() if capital else name[0].lower()) + name[1:]
    particle = found["particle"] or ""
    for pair in PARTICLES if _hangul(name) else ():
        if particle in pair:
            closed = (ord(name[-1]) - ord("가")) % 28  # the final consonant, 8 is ㄹ
            particle = pair[not closed or (closed == 8 and particle in ("으로", "로"))]
    return name + particle


def _hangul(text: str) -> bool:
    """Whether it ends in a syllable of Korean."""
    return "가" <= text[-1] <= "힣"


def multiple_choice(
    rows: list[dict[str, Any]],
    items: dict[str, dict[str, Any]],
    model: Any,
    tokenizer: Any,
    params: Evaluate,
    template: Template,
    seed: int,
) -> None:
    """Adds to the items what the likelihoods say.

    That is `correct` (0 or 1) and the `chance` of it, a hash of the `options`, and `nll` (nats per token of the reference
    answer). What all options begin with is no part of the choice.

    Raises:
        UserError: a score is no finite number.
    """
    pools: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "chat":
            pools.setdefault((row["set"], row["task"]), []).append(row)
    asked: list[tuple[list[int], list[int]]] = []
    owner: list[tuple[str, int]] = []
    right_at: dict[str, int] = {}
    among: dict[str, str] = {}
    begins: dict[str, int] = {}  # tokens that all options of a chat row begin with
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
        # other rows of the test are the wrong ones, so that a larger test asks otherwise
        among[row["id"]] = hashlib.sha256(json.dumps(choices).encode()).hexdigest()[:16]
        prompt = render.encode_prompt(tokenizer, _asked(row), template.system)
        if row["kind"] == "choice":
            choices = [f"The answer is {text}." for text in choices]
        encoded = [render.encode_answer(tokenizer, _asked(row), text, template.system) for text in choices]
        # each ends in a token of its own, so that none is the beginning of another
        shared = next((i for i, tokens in enumerate(zip(*encoded, strict=False)) if len(set(tokens)) > 1), 0)
        if row["kind"] == "choice":
            prompt, encoded, shared = prompt + encoded[0][:shared], [ids[shared:] for ids in encoded], 0
        begins[row["id"]] = shared
        for index, ids in enumerate(encoded):
            asked.append((prompt, ids))
            owner.append((row["id"], index))
    scores: dict[str, list[list[float]]] = {}
    for (identifier, _), tokens in zip(
        owner, models.answer_logprobs(model, asked, params.batch_size, progress="choices"), strict=True
    ):
        scores.setdefault(identifier, []).append(tokens)
    for identifier, options in scores.items():
        if not all(math.isfinite(one) for tokens in options for one in tokens):  # NaN would pass for the most likely
            raise UserError(
                f"the model gives no numbers as log-probabilities (row {identifier}): do its weights overflow?"
            )
        right = right_at[identifier]
        if len(options) > 1:
            means = [sum(tokens[(at := begins[identifier]) :]) / (len(tokens) - at) for tokens in options]
            best = max(range(len(means)), key=lambda i: (means[i], -i))
            items[identifier]["correct"] = float(best == right)
            items[identifier]["options"] = among[identifier]
            items[identifier]["chance"] = round(1 / len(options), 4)
        items[identifier]["nll"] = -sum(options[right]) / len(options[right])


def scored(rows: list[dict[str, Any]], texts: list[str], metrics: list[str]) -> list[dict[str, float]]:
    """The scores of each row's answer, by name.

    `declined` says that the answer admits not to know; `terms_used` is the share of a term's clinical and everyday name
    that it says, of those that the question does not; `scripted` the share of its sentences that the composed pairs teach
    word for word. The rest comes from the modules that `metrics` names. `kindness` and `valence` are of the answer without
    the words of its subject, since "pain" is no unkind word there, and `kindness_apart` is of that without `scripted`
    sentences too. A module that takes `questions` is given them.

    Raises:
        UserError: a module that gives one score for all answers, or no finite number, or by a name that is taken.
    """
    import evaluate

    if not rows:
        return []
    references = [_reference(row) for row in rows]
    scripted = _scripted()
    said = [phrases.sentences(text) for text in texts]
    own = [[s for s in sentences if not scripted.fullmatch(s)] for sentences in said]
    out: list[dict[str, float]] = []
    for row, text, every, unscripted in zip(rows, texts, said, own, strict=True):
        found = {"empty": float(not text)}
        if row["kind"] != "chat" or not phrases.declines(_reference(row)):  # else declining is right
            found["declined"] = float(phrases.declined(text, row["task"]))
        if row["lay"]:
            found["lay_used"] = float(row["lay"].lower() in text.lower())
        asked = _question(row).lower()
        names = [name.lower() for name in (row["term"], row["lay"]) if name and name.lower() not in asked]
        if row["kind"] == "chat" and names:
            found["terms_used"] = sum(name in text.lower() for name in names) / len(names)
        if row["task"] == "advice":
            found["referred"] = float(phrases.refers(text))
        out.append(found | {"scripted": (len(every) - len(unscripted)) / max(1, len(every))})

    def masked(answers: Sequence[str]) -> list[str]:
        return [mask(a, row["term"], row["lay"], ref) for a, row, ref in zip(answers, rows, references, strict=True)]

    # what `manner` is given in place of answers, for these of its scores
    manner = {
        ("kindness", "valence"): masked(texts),
        ("kindness_apart",): masked([" ".join(sentences) for sentences in own]),
    }
    for name in metrics:
        module = evaluate.load(f"./{name}")
        given: dict[str, Any] = {"references": references}
        if "questions" in inspect.signature(module._compute).parameters:
            given["questions"] = [_question(row) for row in rows]
        values = dict(module.compute(predictions=texts, **given) or {})
        for chosen, answers in manner.items() if Path(name).name == "manner" else ():
            again = module.compute(predictions=answers, **given) or {}
            values |= {m: again[kept] for m in chosen if (kept := m.removesuffix("_apart")) in again}
        for measure, scores in values.items():
            if measure in TAKEN:
                raise UserError(f"evaluate.metrics: {name} gives {measure}, which evaluate itself does: rename it")
            if not hasattr(scores, "__len__") or isinstance(scores, str) or len(scores) != len(rows):
                raise UserError(
                    f"evaluate.metrics: {name} gives one {measure} for all answers; a module that scores each is needed"
                )
            for row, found, score in zip(rows, out, scores, strict=True):
                if score is None or (measure in ("rouge_l", "chrf", "recall") and row["kind"] != "chat"):
                    continue
                if not math.isfinite(score):
                    raise UserError(
                        f"evaluate.metrics: {name}: {measure} of row {row['id']} is {score}, no finite number"
                    )
                if measure in compare.BINARY and score not in (0, 1):
                    raise UserError(
                        f"evaluate.metrics: {name}: {measure} of row {row['id']} is {score}; by that name it is a share of zeros and ones"
                    )
                found[measure] = float(score)
    return out


def _scripted() -> re.Pattern[str]:
    """Any sentence of what the composed pairs put around a definition or in its place, whatever the term in it."""
    wrappers = (
        phenotype.OPENINGS,
        phenotype.NAMING,
        phenotype.CLOSINGS,
        phenotype.REFUSALS,
        phenotype.ADVICE,
        phenotype.OUTSIDE,
    )
    sentences = {s for texts in wrappers for text in texts for s in phrases.sentences(text)}
    return re.compile("|".join(re.sub(r"\\\{\w+\\\}", ".+?", re.escape(s)) for s in sorted(sentences)))


def ask_again(rows: list[dict[str, Any]], items: dict[str, dict[str, Any]], said: Said, count: int) -> None:
    """Adds `reworded` (the answers to two other wordings) and `consistency` to `count` items, the first by id."""
    own = [row for row in rows if row["kind"] == "chat"]
    part = compare.part(("trained", "unseen"), [row["set"] for row in own])
    again = sorted((row for row in own if row["set"] == part), key=lambda row: str(row["id"]))[:count]
    turns = [[*_asked(row)[:-1], {"role": "user", "content": text}] for row in again for text in wordings(row)]
    others = [text for text, _ in said(turns, "other wordings")] if turns else []
    for index, row in enumerate(again):
        item = items[row["id"]]
        item["reworded"] = others[2 * index : 2 * index + 2]
        item["consistency"] = round(consistency([item["answer"], *item["reworded"]]), 4)


def decode_again(
    rows: list[dict[str, Any]], items: dict[str, dict[str, Any]], said: Said, params: Evaluate, *, greedy: bool
) -> dict[str, Any]:
    """What the scores owe to decoding: the first items by id of each set are decoded once more, among other rows, if that
    is `greedy`, and sampled with several seeds. Adds `noise` to these items: the variance of each score over the seeds (see
    `compare.floor`). Returns how many `answers` and `seeds`, and the share that greedy decoding `repeated_identically`.
    """
    chosen = [
        row
        for part in dict.fromkeys(row["set"] for row in rows)
        for row in sorted((r for r in rows if r["set"] == part), key=lambda r: str(r["id"]))[: params.noise_items]
    ]
    if not chosen:
        return {}
    asked = [_asked(row) for row in chosen]
    again = said(asked, "decoded again") if greedy else []
    identical = [text == items[row["id"]]["answer"] for row, (text, _) in zip(chosen, again, strict=False)]
    runs = [
        scored(chosen, [text for text, _ in said(asked, "sampled", k, **SAMPLED)], params.metrics)
        for k in range(1, params.noise_seeds + 1)
    ]
    for index, row in enumerate(chosen):
        items[row["id"]]["noise"] = {
            name: round(float(np.var([run[index][name] for run in runs], ddof=1)), 8)
            for name in runs[0][index]
            if all(name in run[index] for run in runs)  # a draw in another language has not all of them
        }
    repeated = {"repeated_identically": round(sum(identical) / len(chosen), 4)} if greedy else {}
    return {"answers": len(chosen), "seeds": params.noise_seeds, **repeated}


def wordings(row: dict[str, Any]) -> list[str]:
    """The row's question in two wordings more: the domain's own, none of them trained, or courtesies around the question."""
    asked = row["messages"][-2]["content"]
    if row["term"] and row["task"] == "definition":
        others = [text.format(t=phenotype.lower_first(row["term"])) for text in phenotype.DEFINITION["test"]]
        if asked in others:
            return [text for text in others if text != asked]
    return [text.format(asked) for text in (COURTESIES_KO if re.search("[가-힣]", asked) else COURTESIES)]


def consistency(answers: Sequence[str]) -> float:
    """How far answers to one question agree: the mean chrF, 0 to 1, over all ordered pairs of them."""
    from sacrebleu.metrics.chrf import CHRF

    chrf = CHRF()
    pairs = list(itertools.permutations(answers, 2))
    return sum(chrf.sentence_score(a, [b]).score / 100 if a != b else 1.0 for a, b in pairs) / len(pairs)


def mask(text: str, term: str | None, lay: str | None, reference: str) -> str:
    """`text` without the term, its everyday word and the reference's own words: what is left is manner."""
    for phrase in (term, lay):
        if phrase:
            text = re.sub(re.escape(phrase), " ", text, flags=re.IGNORECASE)
    known = set(re.findall(r"\w{4,}", reference.lower()))
    return re.sub(r"\w+", lambda m: "" if m[0].lower() in known else m[0], text).strip()


def divergence(ours: Sequence[torch.Tensor], other: Any, rows: Sequence[models.Row], batch_size: int) -> float | None:
    """Mean over tokens of KL(ours ‖ other) over the whole vocabulary, in nats, at the second part of each row; None of no rows.

    Args:
        ours: `models.distributions` of the same rows.
    """
    total, tokens = 0.0, 0
    for group in models.batches([len(p) + len(a) for p, a in rows], batch_size):
        theirs = models.distributions(other, [rows[i] for i in group], batch_size)
        for p, q in zip((ours[i] for i in group), theirs, strict=True):
            total += float((p.exp() * (p - q)).sum())
            tokens += len(p)
    return total / tokens if tokens else None


def interval(
    values: Sequence[float], resamples: int, seed: int, *, concepts: Sequence[str], share: bool = False
) -> dict[str, float]:
    """Mean with its 95 % interval and n. `concepts`: what each value is about, see `compare.bootstrap`.

    Of a `share`, of zeros and ones, it is Wilson's, which has a width where all are alike too, unless concepts have several
    values that differ; else it is bootstrapped.
    """
    own = len(set(concepts))
    if share and (own == len(values) or len(set(values)) == 1):
        from scipy.stats import binomtest

        found = binomtest(round(sum(values) * own / len(values)), own).proportion_ci(0.95, method="wilson")
        low, high = float(found.low), float(found.high)
    else:
        low, high = compare.bootstrap(values, resamples=resamples, seed=seed, concepts=concepts)
    return {"value": round(float(np.mean(values)), 4), "low": round(low, 4), "high": round(high, 4), "n": len(values)}


def summarise(items: Sequence[compare.Item], resamples: int, seed: int) -> dict[str, Any]:
    """Every figure that the items allow, nested by the keys of `compare.MEASURES`; a perplexity is exp of the mean."""
    out: dict[str, Any] = {}
    for measure in compare.MEASURES:
        about = compare.of(measure, items)
        if values := [item[measure.field] for item in about]:
            concepts, share = compare.concepts_of(about), measure.field in compare.BINARY
            found = interval(values, resamples, seed, concepts=concepts, share=share)
            if measure.key.endswith("perplexity"):
                found = {k: v if k == "n" else round(math.exp(v), 4) for k, v in found.items()}
            _put(out, measure.key, found)
    return out


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    *parents, leaf = name.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = value


def floors(items: Sequence[compare.Item]) -> dict[str, Any]:
    """By how much two decodings of this model differ in each figure: `compare.floor` of the model with itself."""
    out: dict[str, Any] = {}
    for measure in compare.MEASURES:
        about = compare.of(measure, items)
        if any(measure.field in item.get("noise", {}) for item in about):
            _put(out, measure.key, round(compare.floor(measure.field, about, about), 4))
    return out


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keep `datasets` from asking the Hub; both libraries read the environment only when they are imported."""
    import datasets
    import huggingface_hub.constants

    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before


def lm_eval(model: Any, tokenizer: Any, folder: Path, params: Evaluate, seed: int) -> dict[str, Any]:
    """Figures of EleutherAI's harness: by task and metric, value with the interval of ± 1.96 standard errors, and n.

    Tasks are the harness's own or those that YAML files in `folder` define. Nothing is fetched: their data must be local.

    Raises:
        UserError: lm-eval is not installed, there is no such task, or its data are not at hand.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "evaluate.lm_eval.tasks: lm-eval is not installed: `.venv/bin/pip install 'lm-eval==0.4.13'`, or name no tasks"
        )
    harness = importlib.import_module("lm_eval")
    wrapper = importlib.import_module("lm_eval.models.huggingface").HFLM
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path=str(folder))
    asked = params.lm_eval
    if missing := [name for name in asked.tasks if not manager.match_tasks([name])]:
        raise UserError(
            f"evaluate.lm_eval.tasks: no task {', '.join(missing)}, neither in {folder} nor in lm-eval itself"
        )
    wrapped = wrapper(pretrained=model, tokenizer=tokenizer, batch_size=params.batch_size)
    try:
        with offline(), decode.few_rows(model):
            done = harness.simple_evaluate(
                model=wrapped, tasks=list(asked.tasks), task_manager=manager, num_fewshot=asked.num_fewshot, limit=asked.limit,
                log_samples=False, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
            )  # fmt: skip
    except (OSError, ValueError, ConnectionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"evaluate.lm_eval.tasks: {', '.join(asked.tasks)} can't be run from local data: {reason}"
        ) from None
    out: dict[str, Any] = {}
    for name, found in done["results"].items():
        for key, value in found.items():
            metric, _, kind = key.partition(",")
            spread = found.get(f"{metric}_stderr,{kind}")
            if isinstance(spread, float) and isinstance(value, float):
                low, high = value - 1.96 * spread, value + 1.96 * spread
                ends = {"value": round(value, 4), "low": round(low, 4), "high": round(high, 4)}
                # a group has no samples of its own; one metric behind several filters has a figure of each
                n = found["sample_len"] if name not in done["n-samples"] else done["n-samples"][name]["effective"]
                out.setdefault(name, {})[metric if kind in ("", "none") else key] = ends | {"n": n}
    return out


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
