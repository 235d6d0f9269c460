"""split: train, validation and test by concept, with a stable hash.

The side of a concept depends on its name and the seed alone, so that adding rows never moves old ones. A row that says
itself where it belongs (`split`) goes there. Rows with a fixed `wording` (the embedded domain) are split twice: concepts into
trained and unseen, and the trained ones by wording, so that what was learnt is tested in words never trained on.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tasks import stage
from tasks.params import Split, UserError

if TYPE_CHECKING:
    import polars as pl


def run(records: Path, out: Path, metrics: Path, params: Split, seed: int) -> str:
    """Write train, validation, test, replay, questions and preferences (Parquet) to the folder `out`.

    `test` has one more column, `set`: `trained`, `unseen`, `invented` or another task without answers, `general`.

    Raises:
        UserError: nothing to train on, or nothing to test on.
    """
    import polars as pl

    from tasks import records as recs

    # of a row, only what decides where it goes, as numbers; all of it is read again for each part that is written
    concept, asked = pl.col("concept"), pl.col("asked")
    parts, inner, start = list[pl.DataFrame](), list[pl.DataFrame](), 0
    for part in recs.chunks(records):
        seen = part.with_row_index("row", start).with_columns(asked=_asked())
        start += part.height
        parts.append(
            seen.select(
                "row",
                pl.col("kind", "wording", "split", "task").cast(pl.Categorical),
                concept.hash(),
                concept.map_elements(lambda name: _fraction(name, seed), return_dtype=pl.Float64).alias("at"),
                _hash(asked).alias("prompt"),
            )
        )
        # the prompts of the earlier answers, which are trained on too
        long = seen.filter(asked.list.len() > 2)
        ends = pl.int_ranges(1, asked.list.len(), 2).alias("end")
        inner.append(long.select("row", "asked", ends).explode("end").select("row", _hash(asked.list.head("end"))))
    table, begins = pl.concat(parts), pl.concat(inner)
    chat, unasked = table.filter(kind="chat"), table.filter(kind="question")
    placed = chat.filter(pl.col("split").is_not_null())
    chat = chat.filter(pl.col("split").is_null())
    fixed = chat.filter(pl.col("wording").is_not_null())
    free = chat.filter(pl.col("wording").is_null())
    unseen = pl.col("at") < params.test
    steers = (pl.col("at") >= params.test) & (pl.col("at") < params.test + params.validation)
    held_out = pl.col("at") < params.unknown
    # a question of one wording goes where it says, or by its concept; one of several by its concept, each side in its own
    single = (pl.len().over("concept") == 1) | pl.col("split").is_not_null() | pl.col("wording").is_null()
    alone, several = unasked.filter(single), unasked.filter(~single)
    side = pl.coalesce("split", "wording")
    train = pl.concat(
        [fixed.filter(~unseen, wording="train"), free.filter(~unseen & ~steers), placed.filter(split="train")]
    )
    learnt = pl.col("concept").is_in(train["concept"].unique().implode())
    preferences, replay = table.filter(pl.col("kind").is_in(["preference", "ratings"])), table.filter(kind="replay")
    # one turn of a log after another, each a row: what a longer one asks on its way is trained on, with some answer
    within = begins.filter(pl.col("row").is_in(train["row"].implode()))["asked"].unique()
    inside = pl.col("prompt").is_in(within.implode())
    contained = free.filter(unseen & inside).height
    free_test = free.filter(unseen & ~inside)
    questions_test = [
        alone.filter((side == "test") | (side.is_null() & held_out)),
        several.filter(held_out, wording="test"),
    ]
    tested = pl.concat([free_test, placed.filter(split="test"), *questions_test])
    prompts = tested["prompt"].unique().implode()
    asking = begins.filter(pl.col("asked").is_in(prompts))["row"].unique()
    leaks = (
        pl.col("concept").is_in(tested["concept"].unique().implode())
        | pl.col("prompt").is_in(prompts)
        | pl.col("row").is_in(asking.implode())
        | (pl.col("split") == "test").fill_null(False)
    )
    trained, new = (pl.lit(name, pl.Categorical).alias("set") for name in ("trained", "unseen"))
    tables = {
        "train": train,
        "validation": pl.concat(
            [fixed.filter(~unseen, wording="validation"), free.filter(steers), placed.filter(split="validation")]
        ),
        "test": pl.concat(
            [
                fixed.filter(~unseen, wording="test").with_columns(trained),
                fixed.filter(unseen, wording="test").with_columns(new),
                free_test.with_columns(new),
                placed.filter(learnt, split="test").with_columns(trained),
                placed.filter(~learnt, split="test").with_columns(new),
                *(part.with_columns(pl.col("task").alias("set")) for part in questions_test),
                table.filter(kind="choice").with_columns(set=pl.lit("general", pl.Categorical)),
            ]
        ),
        "questions": pl.concat(
            [
                alone.filter((side != "test") | (side.is_null() & ~held_out)),
                several.filter(~held_out, wording="train"),
            ]
        ),
        # what is about a question of the test would be trained on
        "replay": replay.filter(~leaks),
        "preferences": preferences.filter(~leaks),
    }
    if tables["train"].is_empty() and tables["preferences"].is_empty():
        raise UserError(
            "nothing to train on: no chat row is on the training side; lower split.test and split.validation"
        )
    if tables["test"].filter(pl.col("set").is_in(["trained", "unseen"])).is_empty():
        raise UserError("nothing to test on: no concept is on the test side; raise split.test or add rows")
    counts: dict[str, object] = {}
    for name, part in tables.items():
        recs.write(_rows(records, part), out / f"{name}.parquet")
        counts[name] = part.height
    counts["preferences_held_out"] = preferences.height - tables["preferences"].height
    counts["replay_held_out"] = replay.height - tables["replay"].height
    counts["test_in_longer"] = contained
    counts["test_sets"] = dict(tables["test"]["set"].cast(pl.String).value_counts().sort("set").iter_rows())
    counts["concepts"] = {
        "trained": tables["train"]["concept"].n_unique(),
        "unseen": tables["test"].filter(set="unseen")["concept"].n_unique(),
    }
    metrics.parent.mkdir(parents=True, exist_ok=True)
    metrics.write_text(json.dumps(counts, indent=2) + "\n")
    return ", ".join(f"{name} {part.height}" for name, part in tables.items())


def _asked() -> "pl.Expr":
    """What user and assistant say in turn before the last answer, as `records.bare` has it."""
    import polars as pl

    from tasks import records as recs

    said = pl.col("messages").list.eval(pl.element().filter(pl.element().struct["role"] != "system").struct["content"])
    answered = pl.col("kind").is_in(["chat", "replay"]).cast(pl.UInt32)
    plain = pl.element().str.normalize("NFKC").str.to_lowercase().str.replace_all(r"\s+", " ")
    bare = plain.str.replace(f"^{recs.BEFORE}+", "").str.replace(f"{recs.BEHIND}+$", "")
    return said.list.head(said.list.len() - answered).list.eval(pl.when(bare == "").then(plain).otherwise(bare))


def _hash(turns: "pl.Expr") -> "pl.Expr":
    return turns.list.join("\x1e").hash()


def _rows(records: Path, part: "pl.DataFrame") -> Iterator["pl.DataFrame"]:
    """The rows of the table that `part` names by `row`, in its order, with its column `set` if it has one.

    Within `part`, rows ascend from piece to piece; each piece takes a pass over the table.
    """
    import numpy as np
    import polars as pl

    from tasks import records as recs

    rows = part["row"].to_numpy()
    for piece in np.split(np.arange(len(rows)), np.flatnonzero(rows[1:] <= rows[:-1]) + 1):
        start = 0
        for table in recs.chunks(records):
            low, high = piece[0] + np.searchsorted(rows[piece], [start, start + table.height]) if len(piece) else (0, 0)
            found = table[(rows[low:high] - start).tolist()]
            yield found.with_columns(part["set"][low:high].cast(pl.String)) if "set" in part.columns else found
            start += table.height


def _fraction(concept: str, seed: int) -> float:
    """A number in [0, 1) that depends on the concept and the seed alone."""
    return int(hashlib.sha256(f"{seed} {concept}".encode()).hexdigest()[:13], 16) / 16**13


if __name__ == "__main__":
    stage.main(run)
