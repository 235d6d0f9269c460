"""template: rows through the model's chat template, with the loss on answers only.

The code is `tasks.render`'s, which `evaluate` and `chat` use too, so that a training prompt and an inference prompt are the
same tokens. Replay rows (general chat, against forgetting) are mixed in here.
"""

import hashlib
import json
import random
import tempfile
from array import array
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tasks import render, stage
from tasks.params import Template, UserError

if TYPE_CHECKING:
    import numpy as np
    import polars as pl


class Tokens:
    """Encoded rows in a file without a name, so that any order takes them out again and the memory holds none."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.ends, self.lengths, self.supervised = file, array("q", [0]), array("i"), array("i")

    def add(self, name: str, ids: Sequence[int], labels: Sequence[int]) -> int:
        """The number by which the row is found again."""
        raw = array("i", [*ids, *labels]).tobytes() + name.encode()
        self.file.seek(self.ends[-1])
        self.file.write(raw)
        self.ends.append(self.ends[-1] + len(raw))
        self.lengths.append(len(ids))
        self.supervised.append(_supervised(labels))
        return len(self.lengths) - 1

    def __getitem__(self, number: int) -> tuple[str, "np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]:
        import numpy as np

        start, stop = self.ends[number : number + 2]
        self.file.seek(start)
        raw = self.file.read(stop - start)
        ids, labels = np.frombuffer(raw, np.int32, 2 * self.lengths[number]).reshape(2, -1)
        return raw[ids.nbytes + labels.nbytes :].decode(), ids, labels


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
    from tasks import records as recs

    tokenizer = render.load_tokenizer(base)
    wanted = round(params.replay * sum(table.height for table in recs.chunks(splits / "train.parquet")))
    replay = [i for table in recs.chunks(splits / "replay.parquet") for i in table["id"]]
    if wanted and not replay:
        raise UserError("template.replay: there are no replay rows; add a source with `kind: replay`, or set it to 0")
    rng = random.Random(seed)
    out.mkdir(parents=True, exist_ok=True)
    shown: list[str] = []
    refused: list[str] = []
    counts: dict[str, Any] = {"replay_rows": wanted}
    every = Counter[int]()
    with tempfile.TemporaryFile(dir=out.parent) as file:
        tokens = Tokens(file)

        def taken(found: Iterable[int | str | UserError]) -> Iterator[int]:
            for one in found:
                if isinstance(one, UserError):
                    raise one
                if isinstance(one, str):
                    refused.append(one)
                else:
                    yield one

        for name in ("train", "validation"):
            encoded = _encoded(splits / f"{name}.parquet", tokenizer, params, tokens)
            rows = [*taken(chain.from_iterable(encoded))]
            if name == "train":
                order = sorted(
                    range(len(replay)), key=lambda i: hashlib.sha256(f"{seed} {replay[i]}".encode()).hexdigest()
                )
                picks = [order[i % len(replay)] for i in range(wanted)]
                some = sorted({*picks})
                once = _encoded(splits / "replay.parquet", tokenizer, params, tokens, {*some}) if some else ()
                found = dict(zip(some, once, strict=True))
                rows += taken(chain.from_iterable(found[i] for i in picks))
                rng.shuffle(rows)
                shown = [_show(tokenizer, *(part.tolist() for part in tokens[row][1:])) for row in rows[:8]]
            recs.write(_tables(tokens, rows), out / f"{name}.parquet")
            every.update(tokens.lengths[row] for row in rows)
            counts[f"{name}_rows"] = len(rows)
            counts[f"{name}_tokens"] = sum(tokens.lengths[row] for row in rows)
            counts[f"{name}_supervised_tokens"] = sum(tokens.supervised[row] for row in rows)
    share = len(refused) / max(1, len(refused) + every.total())
    counts |= {"refused": len(refused), "refused_share": round(share, 6)}
    if share > params.max_refused:
        raise UserError(
            f"{len(refused)} of {len(refused) + every.total()} rows are refused, more than template.max_refused {params.max_refused}: "
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
    first = f" (the first: {refused[0]})" if refused else ""
    return f"{counts['train_rows']} training rows of {counts['train_tokens']} tokens, {counts['train_supervised_tokens']} supervised, {wanted} of replay, {len(refused)} refused{first}"


def _encoded(
    path: Path, tokenizer: Any, params: Template, tokens: Tokens, only: Container[int] | None = None
) -> Iterator[list[int | str | UserError]]:
    """For each row of a table, or those `only`: its number in `tokens`, why it is refused, or why it can't be rendered.

    One for most; several where the template does not keep earlier answers, so that each is trained on behind what asked for it.
    """
    from tasks import records as recs

    rows = (record for table in recs.chunks(path) for record in table.iter_rows(named=True))
    for i, record in enumerate(rows):
        if only is not None and i not in only:
            continue
        where = f"{record['source']}:{record['line']}"
        out: list[int | str | UserError] = []
        try:
            for part in render.conversations(tokenizer, record["messages"], params.system):
                ids, labels = render.encode(tokenizer, part, params.system)
                if not _supervised(labels):
                    out.append(f"{where}: no supervised token")
                elif len(ids) > params.max_length:
                    out.append(f"{where}: {len(ids)} tokens")
                else:
                    out.append(tokens.add(record["id"], ids, labels))
        except UserError as error:
            out = [UserError(f"{where}: {error}")]
        yield out


def _supervised(labels: Sequence[int]) -> int:
    return sum(label != render.IGNORED for label in labels)


def _tables(tokens: Tokens, rows: Sequence[int]) -> Iterator["pl.DataFrame"]:
    """What is trained on, in this order."""
    import polars as pl

    from tasks import records as recs

    schema = {"id": pl.String(), "input_ids": pl.List(pl.Int32), "labels": pl.List(pl.Int32)}
    for start in range(0, len(rows) or 1, recs.ROWS):
        part = [tokens[row] for row in rows[start : start + recs.ROWS]]
        columns = zip(*part, strict=True) if part else [()] * len(schema)
        made = zip(schema.items(), columns, strict=True)
        # of rows that happen to be equally long polars makes an Array, whatever type it is told
        yield pl.DataFrame([pl.Series(name, [*column], kind).cast(kind) for (name, kind), column in made])


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _show(tokenizer: Any, ids: list[int], labels: list[int]) -> str:
    """The row as text, runs of supervised tokens in brackets."""
    text, run, supervised = "", list[int](), False
    for token, label in [*zip(ids, labels, strict=True), (0, None)]:
        now = label is not None and label != render.IGNORED
        if run and (label is None or now != supervised):
            piece = tokenizer.decode(run, skip_special_tokens=False)
            text += f"【{piece}】" if supervised else str(piece)
            run = []
        supervised = now
        run.append(token)
    return "```\n" + text.replace("```", "'''").replace("\n", "⏎\n") + "\n```"


def _histogram(lengths: Counter[int], width: int = 8) -> list[tuple[int, int]]:
    """(lower edge in tokens, rows) of bins `width` tokens wide."""
    bins = Counter[int]()
    for length, rows in lengths.items():
        bins[length // width] += rows
    return [(b * width, bins[b]) for b in range(min(bins), max(bins) + 1)] if bins else []


if __name__ == "__main__":
    stage.main(run)
