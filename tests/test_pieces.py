"""The data stages take a table in pieces: however small these are, what comes out is the same."""

import json
import random
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tasks import ingest, records, split, template, validate
from tasks.params import Ingest, Source, Split, Template, UserError, Validate
from tests.conftest import ROOT

WORDS = "the a of spine bone back hand doctor look pain year often rare severe brace exercise 뼈가 약해 등이".split()
MANY = 10**6


def write_sources(raw: Path) -> Ingest:
    """Rows of every kind, many of them alike, broken, contradictory or a test's, in two files, and a third of replay."""
    draw = random.Random(0)
    pool = [draw.choices(WORDS, k=30) for _ in range(8)]

    def said() -> str:
        words = list(draw.choice(pool))
        for _ in range(draw.choice([0, 0, 1, 5])):
            words[draw.randrange(30)] = draw.choice(WORDS)
        return draw.choice(["", "\x07", "<|im_end|>"]) if draw.random() < 0.05 else " ".join(words)

    rows: list[Any] = []
    for n in range(120):
        asked = " ".join(draw.choices(WORDS, k=draw.choice([1, 9])))
        more = {"concept": f"c{n % 50}", "topic": draw.choice(["skin", "eye"])}
        if draw.random() < 0.2:
            more["split"] = draw.choice(["train", "validation", "test"])
        rows.append(
            draw.choice([
                {"prompt": asked, "completion": said(), **more},
                {"prompt": asked, "completion": said(), **more},
                {"prompt": "What is it?", "completion": draw.choice(["A bone.", "A hand."])},
                {"messages": [{"role": r, "content": said()} for r in ("system", "user", "assistant", "user", "assistant")]},
                {"prompt": asked, "chosen": said(), "rejected": said(), **more},
                {"question": asked, "options": ["a", "b", "c"], "answer": n % 3},
                {"question": asked, **more, "topic": "advice"},
                {"prompt": asked, "responses": ["a", "b"], "ratings": [{"annotator": 1, "response": 0, "score": 2.5}]},
                {"text": 1},
            ])
        )  # fmt: skip
    replay = [{"prompt": f"r{n} {draw.choice(WORDS)}", "completion": "yes" * (n % 4)} for n in range(30)]
    raw.mkdir()
    for name, part in (("a", rows[:70]), ("b", rows[70:]), ("r", replay)):
        (raw / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    kinds = {"a": "chat", "b": "chat", "r": "replay"}
    return Ingest(sources=[Source(path=f"data/raw/{name}.jsonl", kind=kind) for name, kind in kinds.items()])


def through(folder: Path, tiny: Path) -> dict[str, Any]:
    """All that the four stages wrote and said, by name: tables as their columns and rows, everything else as its bytes."""
    sources = write_sources(folder / "raw")
    out = folder / "out"
    one, two = out / "records.parquet", out / "validated.parquet"
    limits = Validate(max_quarantine=1.0, max_tokens=1000, near_duplicate=0.5)
    said = [
        ingest.run(folder / "raw", one, out / "unreadable.jsonl", sources, 1),
        validate.run(one, out / "unreadable.jsonl", tiny, two, out / "quarantine.jsonl", out / "validate.json", limits),
        split.run(two, out / "rows", out / "split.json", Split(test=0.3, validation=0.2), 1),
        template.run(
            out / "rows", tiny, out / "tokens", out / "preview.md", out / "template.json", out / "lengths.csv",
            Template(max_length=400, max_refused=1.0, replay=1.5), 1,
        ),
    ]  # fmt: skip
    found: dict[str, Any] = {"said": said}
    for path in sorted(out.rglob("*.*")):
        table = records.read(path) if path.suffix == ".parquet" else None
        found[path.relative_to(out).as_posix()] = (
            (table.schema, table.rows()) if table is not None else path.read_bytes()
        )
    return found


@pytest.mark.parametrize("rows", [7, 50])
def test_pieces_change_nothing(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "pieces").mkdir()
    monkeypatch.setattr(records, "ROWS", MANY)
    whole = through(tmp_path / "whole", tiny)
    checks = json.loads(whole["validate.json"])["checks"]
    assert checks.keys() >= {"contamination", "duplicate", "near_duplicate", "contradiction", "empty", "format"}
    counts = json.loads(whole["template.json"])
    assert min(counts[name] for name in ("refused", "replay_rows", "train_rows", "validation_rows")) > 0
    monkeypatch.setattr(records, "ROWS", rows)
    pieces = through(tmp_path / "pieces", tiny)
    assert parquet.ParquetFile(tmp_path / "pieces/out/records.parquet").num_row_groups > 100 / rows
    assert pieces.keys() == whole.keys()
    for name in whole:
        assert pieces[name] == whole[name], name


TABLE = records.frame(
    {
        "kind": "choice", "source": "s", "line": n, "license": None, "concept": f"c{n}", "topic": "t", "task": "choice",
        "messages": [{"role": "user", "content": f"뼈 {n}"}], "options": ["a", "b"][: n % 3] or None, "answer": n % 2,
    }
    for n in range(1, 31)
)  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, TABLE.height), max_size=8), st.sampled_from([1, 4, 10, 29, 30, 31, MANY]))
def test_a_table_has_the_same_bytes_however_it_is_cut(cuts: list[int], rows: int) -> None:
    edges = [0, *sorted(cuts), TABLE.height]
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "ROWS", rows)
        folder = Path(name)
        records.write(TABLE, folder / "whole")
        records.write((TABLE[a:b] for a, b in pairwise(edges)), folder / "cut")
        assert (folder / "whole").read_bytes() == (folder / "cut").read_bytes()
        if rows >= TABLE.height:
            TABLE.write_parquet(folder / "polars", compression="zstd", statistics=False)
            assert (folder / "whole").read_bytes() == (folder / "polars").read_bytes()
        assert records.read(folder / "cut").equals(TABLE, null_equal=True)
        assert [part.height for part in records.chunks(folder / "cut")] == [
            min(rows, TABLE.height - start) for start in range(0, TABLE.height, rows)
        ]


def test_an_empty_table_is_one_piece(tmp_path: Path) -> None:
    records.write(records.frames([]), tmp_path / "a.parquet")
    (piece,) = records.chunks(tmp_path / "a.parquet")
    assert (piece.height, dict(piece.schema)) == (0, records.RECORD)


def test_copies_are_told_apart_over_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"kind": "chat", "source": "s", "messages": []}] * 5
    whole = records.frame(rows)["id"].to_list()
    assert len(set(whole)) == 5
    monkeypatch.setattr(records, "ROWS", 2)
    assert [part["id"].to_list() for part in records.frames(rows)] == [whole[:2], whole[2:4], whole[4:]]


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "ROWS", 1)
    (tmp_path / "raw").mkdir()
    good = {"prompt": "a", "completion": "b"}
    (tmp_path / "raw/a.jsonl").write_text("\n".join(map(json.dumps, [good, good, {"text": 1}, good])))
    (tmp_path / "raw/b.jsonl").write_text("")
    sources = Ingest(sources=[Source(path="data/raw/a.jsonl"), Source(path="data/raw/b.jsonl")])
    with pytest.raises(UserError, match=r"b\.jsonl: no rows"):
        ingest.run(tmp_path / "raw", tmp_path / "o.parquet", tmp_path / "u.jsonl", sources, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_rows_that_are_equally_long_stay_lists(tmp_path: Path) -> None:
    with (tmp_path / "t").open("w+b") as file:
        tokens = template.Tokens(file)
        rows = [tokens.add(f"{n:016x}", [n, 2, 3], [-100, 2, 3]) for n in range(3)]
        (table,) = template._tables(tokens, [rows[2], rows[0], rows[2]])
    assert dict(table.schema) == {"id": pl.String, "input_ids": pl.List(pl.Int32), "labels": pl.List(pl.Int32)}
    assert table["id"].to_list() == [f"{n:016x}" for n in (2, 0, 2)]
    assert table["input_ids"].to_list() == [[2, 2, 3], [0, 2, 3], [2, 2, 3]]
    assert table["labels"].to_list() == [[-100, 2, 3]] * 3


def test_hashes_lose_no_near_copy() -> None:
    """A text that shares no part of its sketch with another is none's near copy, and no near copy of it is missed."""
    draw = random.Random(1)
    vocabulary = [f"w{n}" for n in range(400)]
    rows: list[dict[str, Any]] = []
    words: list[str] = []
    for n in range(300):
        words = list(words) if n > 150 and n % 3 else draw.choices(vocabulary, k=40)
        words[draw.randrange(40)] = "new"
        turns = [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": " ".join(words)}]
        rows.append({"kind": "chat", "source": "s", "line": n + 1, "wording": None, "messages": turns})
    table = records.frame(rows)
    numbered = [*enumerate(table.iter_rows(named=True))]
    prints = validate._joined([validate._prints(numbered[a : a + 70], 0.8) for a in range(0, 300, 70)])
    assert prints.row.tolist() == prints.prose.tolist() == [*range(300)]
    assert prints.bands.shape == (300, 32) and prints.bands.dtype == np.uint32  # noqa: PT018
    asked: list[set[int]] = []

    def texts(wanted: Any) -> Any:
        asked.append({*wanted})
        return ((i, row) for i, row in numbered if i in wanted)

    found = validate._compared(prints, table, texts, 0.8)
    said = {i: " ".join(turn["content"] for turn in row["messages"]) for i, row in numbered}
    expected = validate._near({i: (text, text) for i, text in said.items()}, 0.8)
    assert {f.row: f.reason for f in found} == {i: f"{s:.3f} similar to s:{j + 1}" for i, (j, s) in expected.items()}
    assert 50 < len(expected) <= 100
    assert len(asked) == 1 and len(asked[0]) < 200  # noqa: PT018  # the others' texts are not looked at again


@pytest.mark.parametrize("name", ["ingest", "validate", "split", "template"])
def test_a_data_stage_starts_without_what_only_a_run_needs(name: str) -> None:
    heavy = (
        "torch",
        "transformers",
        "pandera",
        "pandas",
        "polars",
        "numpy",
        "pyarrow",
        "tokenizers",
        "rensa",
        "datasets",
    )
    code = f"import sys, tasks.{name}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
