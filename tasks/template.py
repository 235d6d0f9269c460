"""template: rows through the model's chat template, with the loss on answers only.

The code is `tasks.chat`'s, which `evaluate` and `chat` use too, so that a training prompt and an inference prompt are the
same tokens. Replay rows (general chat, against forgetting) are mixed in here.
"""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import polars as pl

from tasks import chat, stage
from tasks import records as recs
from tasks.params import Template, UserError


def run(
    splits: Path, base: Path, out: Path, preview: Path, metrics: Path, lengths: Path, params: Template, seed: int
) -> str:
    """Write `train` and `validation` (Parquet: id, input_ids, labels) to `out`, a readable `preview`, and a length histogram.

    Args:
        splits: output of `split`.
        base: folder of the base model; its tokenizer and template are used.

    Raises:
        UserError: more rows than `max_refused` have no supervised token or are longer than `max_length`, or the chat
            template refuses one.
    """
    tokenizer = chat.load_tokenizer(base)
    train = recs.read(splits / "train.parquet")
    replay = recs.read(splits / "replay.parquet")
    wanted = round(params.replay * train.height)
    rng = random.Random(seed)
    if wanted and replay.is_empty():
        raise UserError("template.replay: there are no replay rows; add a source with `kind: replay`, or set it to 0")
    order = sorted(range(replay.height), key=lambda i: hashlib.sha256(f"{seed} {replay['id'][i]}".encode()).hexdigest())
    mixed = pl.concat([train, replay[[order[i % replay.height] for i in range(wanted)]]]) if wanted else train
    out.mkdir(parents=True, exist_ok=True)
    shown: list[str] = []
    refused: list[str] = []
    counts: dict[str, Any] = {"replay_rows": wanted}
    every: list[int] = []
    for name, table in (("train", mixed), ("validation", recs.read(splits / "validation.parquet"))):
        rows = []
        for record in table.iter_rows(named=True):
            where = f"{record['source']}:{record['line']}"
            try:
                ids, labels = chat.encode(tokenizer, record["messages"], params.system)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            supervised = sum(label != chat.IGNORED for label in labels)
            if not supervised:
                refused.append(f"{where}: no supervised token")
            elif len(ids) > params.max_length:
                refused.append(f"{where}: {len(ids)} tokens")
            else:
                rows.append({"id": record["id"], "input_ids": ids, "labels": labels})
                every.append(len(ids))
        if name == "train":
            rng.shuffle(rows)
            shown = [_show(tokenizer, row["input_ids"], row["labels"]) for row in rows[:8]]
        schema: dict[str, Any] = {"id": pl.String, "input_ids": pl.List(pl.Int32), "labels": pl.List(pl.Int32)}
        recs.write(pl.DataFrame(rows, schema=schema, orient="row"), out / f"{name}.parquet")
        counts[f"{name}_rows"] = len(rows)
        counts[f"{name}_tokens"] = sum(len(r["input_ids"]) for r in rows)
        counts[f"{name}_supervised_tokens"] = sum(label != chat.IGNORED for r in rows for label in r["labels"])
    share = len(refused) / max(1, len(refused) + len(every))
    counts |= {"refused": len(refused), "refused_share": round(share, 6)}
    if share > params.max_refused:
        raise UserError(
            f"{len(refused)} of {len(refused) + len(every)} rows are refused, more than template.max_refused {params.max_refused}: "
            f"{'; '.join(refused[:3])}; raise template.max_length (now {params.max_length}) or shorten the rows"
        )
    if not counts["train_rows"]:
        raise UserError("no training row is left")
    _write(
        preview,
        "# What the model is trained on\n\nSupervised tokens stand in 【brackets】; `⏎` is a newline.\n\n"
        + "\n\n".join(shown)
        + "\n",
    )
    _write(metrics, json.dumps(counts, indent=2) + "\n")
    _write(lengths, "tokens,rows\n" + "".join(f"{edge},{count}\n" for edge, count in _histogram(every)))
    return f"{counts['train_rows']} training rows of {counts['train_tokens']} tokens, {counts['train_supervised_tokens']} supervised, {wanted} of replay, {len(refused)} refused"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _show(tokenizer: Any, ids: list[int], labels: list[int]) -> str:
    """The row as text, runs of supervised tokens in brackets."""
    text, run, supervised = "", list[int](), False
    for token, label in [*zip(ids, labels, strict=True), (0, None)]:
        now = label is not None and label != chat.IGNORED
        if run and (label is None or now != supervised):
            piece = tokenizer.decode(run, skip_special_tokens=False)
            text += f"【{piece}】" if supervised else str(piece)
            run = []
        supervised = now
        run.append(token)
    return "```\n" + text.replace("```", "'''").replace("\n", "⏎\n") + "\n```"


def _histogram(lengths: list[int], width: int = 8) -> list[tuple[int, int]]:
    """(lower edge in tokens, rows) of bins `width` tokens wide."""
    bins = [length // width for length in lengths]
    return [(b * width, bins.count(b)) for b in range(min(bins), max(bins) + 1)] if bins else []


if __name__ == "__main__":
    stage.main(run)
