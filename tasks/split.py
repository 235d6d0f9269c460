"""split: train, validation and test by concept, with a stable hash.

The side of a concept depends on its name and the seed alone, so that adding rows never moves old ones. Rows with a fixed
`wording` (the embedded domain) are split twice: concepts into trained and unseen, and the trained ones by wording, so that
what was learnt is tested in words never trained on.
"""

import hashlib
import json
from pathlib import Path

import polars as pl

from tasks import records as recs
from tasks import stage
from tasks.params import Split, UserError


def run(records: Path, out: Path, metrics: Path, params: Split, seed: int) -> str:
    """Write train, validation, test, replay, questions and preferences (Parquet) to the folder `out`.

    `test` has one more column, `set`: `trained`, `unseen`, `invented` or another task without answers, `general`.

    Raises:
        UserError: nothing to train on, or nothing to test on.
    """
    table = recs.read(records)
    fraction = {c: _fraction(c, seed) for c in table["concept"].unique().sort().to_list()}
    table = table.with_columns(pl.col("concept").replace_strict(fraction, return_dtype=pl.Float64).alias("at"))
    chat, unasked = table.filter(kind="chat"), table.filter(kind="question")
    fixed = chat.filter(pl.col("wording").is_not_null())
    free = chat.filter(pl.col("wording").is_null())
    unseen = pl.col("at") < params.test
    steers = (pl.col("at") >= params.test) & (pl.col("at") < params.test + params.validation)
    held_out = pl.col("at") < params.unknown
    # a question that says itself where it belongs (`split`) goes there; one in several wordings goes by its concept
    alone = unasked.filter(pl.len().over("concept") == 1)
    several = unasked.filter(pl.len().over("concept") > 1)
    tables = {
        "train": pl.concat([fixed.filter(~unseen, wording="train"), free.filter(~unseen & ~steers)]),
        "validation": pl.concat([fixed.filter(~unseen, wording="validation"), free.filter(steers)]),
        "test": pl.concat(
            [
                fixed.filter(~unseen, wording="test").with_columns(set=pl.lit("trained")),
                fixed.filter(unseen, wording="test").with_columns(set=pl.lit("unseen")),
                free.filter(unseen).with_columns(set=pl.lit("unseen")),
                alone.filter((pl.col("wording") == "test") | (pl.col("wording").is_null() & held_out)).with_columns(
                    pl.col("task").alias("set")
                ),
                several.filter(held_out, wording="test").with_columns(pl.col("task").alias("set")),
                table.filter(kind="choice").with_columns(set=pl.lit("general")),
            ]
        ),
        "questions": pl.concat(
            [
                alone.filter((pl.col("wording") == "train") | (pl.col("wording").is_null() & ~held_out)),
                several.filter(~held_out, wording="train"),
            ]
        ),
        "replay": table.filter(kind="replay"),
        "preferences": table.filter(pl.col("kind").is_in(["preference", "ratings"])),
    }
    if tables["train"].is_empty() and tables["preferences"].is_empty():
        raise UserError(
            "nothing to train on: no chat row is on the training side; lower split.test and split.validation"
        )
    if tables["test"].filter(pl.col("set").is_in(["trained", "unseen"])).is_empty():
        raise UserError("nothing to test on: no concept is on the test side; raise split.test or add rows")
    counts: dict[str, object] = {}
    for name, part in tables.items():
        recs.write(part.drop("at"), out / f"{name}.parquet")
        counts[name] = part.height
    counts["test_sets"] = dict(tables["test"]["set"].value_counts().sort("set").iter_rows())
    counts["concepts"] = {
        "trained": tables["train"]["concept"].n_unique(),
        "unseen": tables["test"].filter(set="unseen")["concept"].n_unique(),
    }
    metrics.parent.mkdir(parents=True, exist_ok=True)
    metrics.write_text(json.dumps(counts, indent=2) + "\n")
    return ", ".join(f"{name} {part.height}" for name, part in tables.items())


def _fraction(concept: str, seed: int) -> float:
    """A number in [0, 1) that depends on the concept and the seed alone."""
    return int(hashlib.sha256(f"{seed} {concept}".encode()).hexdigest()[:13], 16) / 16**13


if __name__ == "__main__":
    stage.main(run)
