"""pair: preference pairs, composed for the embedded domain or taken from the user's own data.

- `compose`: chosen answers are kind and plain and keep the definition word for word; rejected ones are the textbook
  answer, a refusal of a known term, or what the SFT model makes up about a term that does not exist or a question that
  nobody can answer. General questions (replay) keep their plain answers, so that manner and refusals stay where they belong.
- `given`: rows of kind `preference` as they are.
- `ratings`: several annotators' scores; the best and the worst response of a prompt, where the annotators agree.
- `none`: no pairs, so that `dpo` passes the SFT adapter on as it is.
"""

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pandera.polars as pa
import polars as pl

from tasks import decode, models, phenotype, render, stage
from tasks import records as recs
from tasks.params import Pair, Template, UserError

BATCH, NEW_TOKENS = 32, 64  # of the SFT model's answers: how many at once, and how long
SCHEMA = pa.DataFrameSchema(
    {
        "id": pa.Column(pl.String, unique=True),
        "concept": pa.Column(pl.String),
        "kind": pa.Column(
            pl.String
        ),  # known, matched, contrast, naming, unknown, advice, outside, general, given, ratings
        "messages": pa.Column(pl.List(recs.MESSAGE)),
        "chosen": pa.Column(pl.String, pa.Check.str_length(min_value=1)),
        "rejected": pa.Column(pl.String, pa.Check.str_length(min_value=1)),
        "part": pa.Column(pl.String, pa.Check.isin(["train", "validation"])),
    },
    checks=pa.Check(
        lambda data: data.lazyframe.select(pl.col("chosen") != pl.col("rejected")), name="chosen ≠ rejected"
    ),
    strict=True,
)

BIAS = "kind,chosen_over_rejected_characters\n"  # the header of the plot


def run(
    splits: Path, base: Path, adapter: Path, out: Path, metrics: Path, bias: Path,
    params: Pair, template: Template, quantization: dict[str, Any] | None, generation: dict[str, Any], seed: int,
) -> str:  # fmt: skip
    """Write pairs to `out` (Parquet), counts to `metrics`, and how much longer chosen is to `bias` (CSV for a DVC plot).

    Raises:
        UserError: fewer pairs than `min_pairs`, a pair with two equal sides, or too many that are too long.
    """
    if params.mode == "none":
        recs.write(_table([]), out)
        metrics.write_text(json.dumps({"pairs": 0, "train": 0, "validation": 0, "kinds": {}}, indent=2) + "\n")
        bias.write_text(BIAS)
        return "no pairs, as pair.mode asks"
    rng, tokenizer = random.Random(seed), render.load_tokenizer(base)
    dropped: dict[str, int] = {}
    if params.mode == "compose":
        pairs = compose(splits, base, adapter, params, template, quantization, generation, seed, rng)
    else:
        table = recs.read(splits / "preferences.parquet")
        pairs, dropped, agreement = (
            (given(table), {}, None) if params.mode == "given" else rated(table, params.min_agreement)
        )
    if params.mode in ("given", "ratings"):  # what a table of both has of the other kind is not trained on
        other = "ratings" if params.mode == "given" else "preference"
        if rows := table.filter(kind=other).height:
            dropped[f"rows of kind {other}, and pair.mode is {params.mode}"] = rows
    short = [pair for pair in pairs if _tokens(pair, tokenizer, template) <= template.max_length]
    if len(short) < len(pairs):
        dropped["longer than template.max_length"] = len(pairs) - len(short)
    if len(pairs) - len(short) > template.max_refused * len(pairs):
        raise UserError(
            f"{len(pairs) - len(short)} of {len(pairs)} pairs are longer than template.max_length {template.max_length}, more than template.max_refused {template.max_refused}; raise template.max_length"
        )
    pairs = short
    for pair in pairs:
        pair["id"] = recs.identify({"kind": "preference", "source": pair["kind"], **pair})
    pairs = list({pair["id"]: pair for pair in pairs}.values())
    concepts = sorted({pair["concept"] for pair in pairs if not pair.get("part")})
    rng.shuffle(concepts)
    held = set(concepts[: round(params.validation * len(concepts))])
    for pair in pairs:
        pair["part"] = pair.get("part") or ("validation" if pair["concept"] in held else "train")
    rng.shuffle(pairs)
    if len(pairs) < params.min_pairs:
        raise UserError(
            f"{len(pairs)} pairs, fewer than pair.min_pairs {params.min_pairs}; dropped: {dropped or 'none'}"
        )
    table = _table(pairs)
    try:
        SCHEMA.validate(table, lazy=True)
    except pa.errors.SchemaErrors as error:
        case = error.failure_cases.row(0, named=True)
        raise UserError(
            f"pairs: {len(error.failure_cases)} failures, the first: {case['check']} in {case['column']}"
        ) from None
    recs.write(table, out)
    ratio = _bias(table)
    facts: dict[str, Any] = {
        "pairs": table.height,
        "train": table.filter(part="train").height,
        "validation": table.filter(part="validation").height,
        "kinds": dict(table["kind"].value_counts().sort("kind").iter_rows()),
        "dropped": dropped,
        "length_ratio": ratio,
        "chosen_is_longer": round(sum(len(p["chosen"]) > len(p["rejected"]) for p in pairs) / len(pairs), 4),
    }
    if params.mode == "ratings":
        facts["agreement"] = agreement
    metrics.write_text(json.dumps(facts, indent=2) + "\n")
    bias.write_text(BIAS + "".join(f"{kind},{value}\n" for kind, value in ratio.items()))
    return f"{table.height} pairs ({', '.join(f'{k} {n}' for k, n in facts['kinds'].items())}), chosen {ratio['all']:.2f} × as long"


def _table(pairs: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(pairs, schema={n: column.dtype.type for n, column in SCHEMA.columns.items()}, orient="row")


def _tokens(pair: dict[str, Any], tokenizer: Any, template: Template) -> int:
    """Of the prompt and the longer side."""
    sides = [
        render.encode_answer(tokenizer, pair["messages"], pair[side], template.system)
        for side in ("chosen", "rejected")
    ]
    return len(render.encode_prompt(tokenizer, pair["messages"], template.system)) + max(map(len, sides))


def _bias(table: pl.DataFrame) -> dict[str, float]:
    """Median of chosen length / rejected length, in characters, per kind."""
    ratio = pl.col("chosen").str.len_chars() / pl.col("rejected").str.len_chars()
    per = table.group_by("kind").agg(ratio.median().round(3).alias("ratio")).sort("kind")
    return {"all": round(float(table.select(ratio.median()).item()), 3), **dict(per.iter_rows())}


def given(table: pl.DataFrame) -> list[dict[str, Any]]:
    """Rows of kind `preference`, as they are."""
    rows = table.filter(kind="preference").iter_rows(named=True)
    return [
        _pair("given", r["concept"], r["messages"], r["chosen"], r["rejected"]) | {"part": r["split"]} for r in rows
    ]


def rated(table: pl.DataFrame, least: float) -> tuple[list[dict[str, Any]], dict[str, int], float | None]:
    """(pairs, why prompts were dropped, agreement) of rows of kind `ratings`.

    A prompt gives one pair, its best and its worst response by mean score, if at least a share `least` of the annotators
    who rated both prefer the first. Agreement is the share of annotator pairs that order two responses alike, over all
    prompts, ties left out.
    """
    pairs, dropped, alike = [], Counter[str](), list[bool]()
    for row in table.filter(kind="ratings").iter_rows(named=True):
        scores: dict[str, dict[int, float]] = {}
        for rating in row["ratings"]:
            scores.setdefault(rating["annotator"], {})[rating["response"]] = rating["score"]
        for first, second in itertools.combinations(range(len(row["responses"])), 2):
            votes = [
                s[first] > s[second] for s in scores.values() if first in s and second in s and s[first] != s[second]
            ]
            alike += [a == b for a, b in itertools.combinations(votes, 2)]
        mean = {
            index: sum(s[index] for s in scores.values() if index in s) / sum(index in s for s in scores.values())
            for index in range(len(row["responses"]))
            if any(index in s for s in scores.values())
        }
        if len(mean) < 2:
            dropped["fewer than two rated responses"] += 1
            continue
        best, worst = max(mean, key=lambda i: (mean[i], -i)), min(mean, key=lambda i: (mean[i], i))
        both = [s for s in scores.values() if best in s and worst in s]
        if mean[best] == mean[worst]:
            dropped["tie"] += 1
        elif not both or sum(s[best] > s[worst] for s in both) / len(both) < least:
            dropped["annotators disagree"] += 1
        elif row["responses"][best] == row["responses"][worst]:
            dropped["equal responses"] += 1
        else:
            sides = (row["responses"][index] for index in (best, worst))
            pairs.append(_pair("ratings", row["concept"], row["messages"], *sides) | {"part": row["split"]})
    return pairs, dict(sorted(dropped.items())), round(sum(alike) / len(alike), 4) if alike else None


def compose(
    splits: Path, base: Path, adapter: Path, params: Pair, template: Template,
    quantization: dict[str, Any] | None, generation: dict[str, Any], seed: int, rng: random.Random,
) -> list[dict[str, Any]]:  # fmt: skip
    """Pairs of the embedded domain; see the module's docstring."""
    train = recs.read(splits / "train.parquet")
    questions = recs.read(splits / "questions.parquet")
    wanted = {  # a question's task: the kind of its pair, how many, the chosen answers
        "invented": ("unknown", params.unknown, phenotype.REFUSALS),
        "advice": ("advice", params.advice, phenotype.ADVICE),
        "outside": ("outside", params.outside, phenotype.OUTSIDE),
    }
    pairs = []
    for _, rows in train.filter(pl.col("term").is_not_null()).group_by("term", maintain_order=True):
        pairs += _known(rows, params, rng)
    pairs += _general(recs.read(splits / "replay.parquet").head(params.general), rng)
    asked = [
        row
        for task, (_, count, _) in wanted.items()
        for row in questions.filter(task=task).head(count).iter_rows(named=True)
    ]
    if asked:
        answers = _answers(asked, base, adapter, template, quantization, generation, seed)
        for row, answer in zip(asked, answers, strict=True):
            kind, _, texts = wanted[row["task"]]
            chosen = rng.choice(texts).format(t=row["term"])
            if answer and answer != chosen:
                pairs.append(_pair(kind, row["concept"], row["messages"], chosen, answer))
    return pairs


def _known(rows: pl.DataFrame, params: Pair, rng: random.Random) -> list[dict[str, Any]]:
    """Pairs of one known term, from its training rows."""
    tasks = rows.group_by("task", maintain_order=True).agg(pl.all())
    by_task = {row["task"]: row for row in tasks.iter_rows(named=True)}
    if "definition" not in by_task:
        return []
    term, lay, concept = rows["term"][0], rows["lay"][0], rows["concept"][0]
    if lay is None:
        raise UserError(
            f"pair.mode compose: {rows['source'][0]}:{rows['line'][0]}: a `term` but no everyday word: add the column `lay`"
        )
    name = phenotype.lower_first(term)
    definition = by_task["definition"]["messages"][0][-1]["content"]
    group = by_task["group"]["messages"][0][-1]["content"] if "group" in by_task else ""
    asked = rng.sample(
        phenotype.DEFINITION["train"], min(params.known + params.contrast, len(phenotype.DEFINITION["train"]))
    )

    def kind_answer() -> str:
        naming = rng.choice(phenotype.NAMING).format(t=name, lay=lay)
        opening, closing = rng.choice(phenotype.OPENINGS), rng.choice(phenotype.CLOSINGS)
        # mostly the everyday word first: a small model that begins with a courtesy often forgets to go on
        return " ".join([opening] * (rng.random() < 0.2) + [naming, definition, closing])

    pairs = []
    for index, wording in enumerate(asked):
        messages = [{"role": "user", "content": wording.format(t=name)}]
        if index >= params.known:
            refusal = rng.choice(phenotype.REFUSALS).format(t=name)
            pairs.append(_pair("contrast", concept, messages, kind_answer(), refusal))
        elif index % 2:
            pairs.append(
                _pair(
                    "matched",
                    concept,
                    messages,
                    kind_answer(),
                    f"{definition} The clinical term is {name}. {group}".strip(),
                )
            )
        else:
            pairs.append(_pair("known", concept, messages, kind_answer(), definition))
    for task in ("lay_to_clinical", "clinical_to_lay"):
        if task in by_task and rng.random() < params.naming:
            question, answer = by_task[task]["messages"][0][0]["content"], by_task[task]["messages"][0][-1]["content"]
            warm = rng.choice(
                [f"{rng.choice(phenotype.OPENINGS)} {answer}", f"{answer} {rng.choice(phenotype.CLOSINGS)}"]
            )
            pairs.append(_pair("naming", concept, [{"role": "user", "content": question}], warm, answer))
    return pairs


def _general(rows: pl.DataFrame, rng: random.Random) -> list[dict[str, Any]]:
    """Replay: a general question keeps its plain answer, against a refusal or the manner that is meant for terms."""
    pairs = []
    for index, row in enumerate(rows.iter_rows(named=True)):
        *asked, turn = row["messages"]
        answer = turn["content"]
        manner = f"{rng.choice(phenotype.OPENINGS)} {answer} {rng.choice(phenotype.CLOSINGS)}"
        refusal = rng.choice(phenotype.REFUSALS + phenotype.OUTSIDE).format(t="that")
        pairs.append(_pair("general", row["concept"], asked, answer, refusal if index % 2 else manner))
    return pairs


def _pair(kind: str, concept: str, messages: list[dict[str, str]], chosen: str, rejected: str) -> dict[str, Any]:
    return {"kind": kind, "concept": concept, "messages": messages, "chosen": chosen, "rejected": rejected}


def _answers(
    rows: list[dict[str, Any]], base: Path, adapter: Path, template: Template,
    quantization: dict[str, Any] | None, generation: dict[str, Any], seed: int,
) -> list[str]:  # fmt: skip
    """What the SFT model says by itself: the natural rejected side of a question that it should decline."""
    tokenizer = render.load_tokenizer(base)
    model = models.cast(models.load_merged(base, adapter, quantization), models.compute_dtype())
    models.seed_everything(seed)
    prompts = [render.encode_prompt(tokenizer, row["messages"], template.system) for row in rows]
    found = decode.generate(
        model, tokenizer, prompts, generation, max_new_tokens=NEW_TOKENS, batch_size=BATCH, progress="SFT answers"
    )
    return [answer.text for answer in found]


if __name__ == "__main__":
    stage.main(run)
