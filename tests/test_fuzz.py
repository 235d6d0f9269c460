"""Every reader against what nobody thought of: a clear error or a reason, never another exception, never a lost row.

Deterministic and bounded; what a longer search found is in tests/test_corpus.py.
"""

import copy
import csv
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from tasks import ingest, params, records, validate
from tasks.params import Ingest, Source, UserError, Validate
from tests.conftest import ROOT
from tests.test_corpus import ONE_LINE

FUZZ = settings(max_examples=100, deadline=None, derandomize=True, database=None)
anything = st.text(st.characters(exclude_categories=()), max_size=6)  # halves of surrogate pairs too
words = anything | st.sampled_from(
    ["user", "assistant", "system", "human", "train", "", "<|im_end|>", "\u200b", "a\u0301", "\ud83d"]
)
columns = st.sampled_from(
    "prompt completion messages role content chosen rejected conversations from value responses ratings annotator response "
    "score question options answer instruction input output system topic concept term split wording".split()
)
scalars = st.none() | st.booleans() | st.integers() | st.integers(10**18, 10**40) | st.floats() | words
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(columns | anything, v, max_size=4), max_leaves=10
)
turns = st.lists(st.fixed_dictionaries({"role": words, "content": words | scalars}), max_size=3)
rows = st.one_of(
    st.dictionaries(columns, values, max_size=5),
    st.fixed_dictionaries({"prompt": words, "completion": words}, optional={"topic": words, "concept": words, "split": words}),
    st.fixed_dictionaries({"messages": turns}),
    st.fixed_dictionaries({"prompt": words, "chosen": words | turns, "rejected": words}),
    st.fixed_dictionaries({"question": words, "options": st.lists(words, max_size=3), "answer": scalars}),
    st.fixed_dictionaries({
        "prompt": words,
        "responses": st.lists(words, max_size=3),
        "ratings": st.lists(st.fixed_dictionaries({"annotator": words, "response": scalars, "score": scalars}), max_size=3),
    }),
)  # fmt: skip


def one_line(error: UserError) -> None:
    assert ONE_LINE.fullmatch(str(error)), str(error)


def read(name: str, content: bytes, base: Path) -> int | None:
    """Rows of a file, each kept or quarantined with a reason by `ingest` and `validate`; None: refused in one line."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "raw").mkdir()
        (folder / "raw" / name).write_bytes(content)
        out, unreadable, kept, quarantine, metrics = (folder / n for n in ("o.parquet", "u", "v.parquet", "q", "m"))
        try:
            ingest.run(folder / "raw", out, unreadable, Ingest(sources=[Source(path=f"data/raw/{name}")]), 1)
        except UserError as error:
            one_line(error)
            return None
        good = records.schema().validate(records.read(out)).height
        bad = [json.loads(line) for line in unreadable.read_bytes().split(b"\n") if line]
        try:
            validate.run(out, unreadable, base, kept, quarantine, metrics, Validate(max_quarantine=1.0))
        except UserError as error:
            one_line(error)
        rejected = [json.loads(line) for line in quarantine.read_bytes().split(b"\n") if line]
        for row in rejected:
            assert ONE_LINE.fullmatch(row["reason"]), row["reason"]
            assert row["check"] and row["source"] and row["line"] >= 1 and row["column"]  # noqa: PT018
        # what could not be read comes through both files word for word
        last = rejected[len(rejected) - len(bad) :]
        assert [{k: v for k, v in row.items() if k != "also"} for row in last] == bad
        left = records.read(kept).height if kept.exists() else 0
        assert left + len(rejected) == good + len(bad)
        return good + len(bad)


@FUZZ
@given(
    st.lists(
        st.one_of(rows.map(lambda row: json.dumps(row).encode()), st.binary(max_size=30), st.just(b"")), max_size=5
    )
)
def test_jsonl(tiny: Path, lines: list[bytes]) -> None:
    content = b"\n".join(lines)
    found = read("a.jsonl", content, tiny)
    assert found in (None, sum(bool(line.strip()) for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n")))


@FUZZ
@given(
    rows.map(json.dumps).map(str.encode), st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=3)), max_size=3)
)
def test_damaged_jsonl(tiny: Path, line: bytes, edits: list[tuple[int, bytes]]) -> None:
    for at, new in edits:
        at %= len(line) + 1
        line = line[:at] + new + line[at + len(new) :]
    good = json.dumps({"prompt": "What is it?", "completion": "A bone."}).encode()
    assert read("a.jsonl", good + b"\n" + line, tiny) == 1 + sum(bool(part.strip()) for part in line.split(b"\n"))


@FUZZ
@given(st.lists(rows | values, max_size=4))
def test_json(tiny: Path, given_rows: list[Any]) -> None:
    text = json.dumps(given_rows)
    found = read("a.json", text.encode(), tiny)
    assert found in (None, len(given_rows))
    if not any(word in text for word in ("NaN", "Infinity")) and found is None:
        assert not any(
            isinstance(row, dict) and row.keys() == {"prompt", "completion"} and _plain(row) for row in given_rows
        )


def _plain(row: dict[str, Any]) -> bool:
    return all(isinstance(value, str) and value.isascii() and value.isalpha() for value in row.values())


@FUZZ
@given(st.binary(max_size=80) | anything.map(lambda t: t.encode("utf-8", "surrogatepass")))
@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet", "a.jsonl"])
def test_any_bytes(tiny: Path, name: str, content: bytes) -> None:
    read(name, content, tiny)


@FUZZ
@given(st.lists(st.lists(st.text(max_size=6), min_size=2, max_size=2), max_size=4), st.sampled_from(["\n", "\r\n"]))
def test_csv(tiny: Path, cells: list[list[str]], ending: str) -> None:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator=ending, quoting=csv.QUOTE_ALL).writerows([["prompt", "completion"], *cells])
    filled = [row for row in cells if any(map(str.strip, row))]  # empty ones are no rows
    assert read("a.csv", buffer.getvalue().encode(), tiny) in (None, len(filled))


@FUZZ
@given(st.lists(st.tuples(st.text(max_size=6) | st.none(), st.text(max_size=6), st.floats() | st.none()), max_size=4))
def test_parquet(tiny: Path, cells: list[tuple[Any, ...]]) -> None:
    names = ("prompt", "completion", "score")
    buffer = io.BytesIO()
    schema = dict(zip(names, (pl.String, pl.String, pl.Float64), strict=True))
    pl.DataFrame(cells, schema=schema, orient="row").write_parquet(buffer)
    assert read("a.parquet", buffer.getvalue(), tiny) in (None, len(cells))


def _stored() -> bytes:
    buffer = io.BytesIO()
    conversation = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A bone."}]
    pl.DataFrame({"messages": [conversation] * 3, "n": [1, 2, 3]}).write_parquet(buffer, compression="uncompressed")
    return buffer.getvalue()


STORED = _stored()


@settings(FUZZ, max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, len(STORED) - 1), st.integers(0, 255)), max_size=4),
    st.none() | st.integers(0, len(STORED)),
)
def test_damaged_parquet(edits: list[tuple[int, int]], end: int | None) -> None:
    content = bytearray(STORED)
    for at, value in edits:
        content[at] = value
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "a.parquet"
        path.write_bytes(content[:end])
        for reader in (lambda: list(records.rows_of_file(path)), lambda: records.read(path)):
            try:
                found = reader()
            except UserError as error:
                one_line(error)
            else:
                assert len(found) == 3  # a file that says another number than it holds is refused


SHIPPED = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())


def _refused_or_typed(check: Callable[[], Any]) -> None:
    try:
        assert set(check()) == {"seed", *params.OWN, *params.LIBRARY}
    except UserError as error:
        one_line(error)


@settings(FUZZ, max_examples=400)
@given(st.data())
def test_params_with_any_value_anywhere(data: st.DataObject) -> None:
    raw = copy.deepcopy(SHIPPED)
    for _ in range(data.draw(st.integers(1, 3))):
        section = data.draw(st.sampled_from(sorted(raw, key=str)) | anything)
        value = data.draw(values | st.floats() | st.integers(-(2**70), 2**70))
        keys = sorted(raw[section], key=str) if isinstance(raw.get(section), dict) else []
        if keys and data.draw(st.booleans()):
            raw[section][data.draw(st.sampled_from(keys) | anything)] = value
        else:
            raw[section] = value
    _refused_or_typed(lambda: params.check(raw))


@settings(FUZZ, max_examples=150)
@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.text(max_size=3) | st.sampled_from(list("&*!%@`{}[]:,-?|>'\"#\t\n"))),
        max_size=4,
    )
)
def test_damaged_params(edits: list[tuple[int, str]]) -> None:
    text = (ROOT / "params.yaml").read_text()
    for at, new in edits:
        at %= len(text)
        text = text[:at] + new + text[at + 1 :]
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "params.yaml"
        path.write_bytes(text.encode())
        _refused_or_typed(lambda: params.load(path))


@FUZZ
@given(
    st.lists(
        st.dictionaries(
            anything,
            st.recursive(st.none() | st.booleans() | st.integers() | anything, lambda v: st.lists(v, max_size=3)),
            max_size=3,
        ),
        max_size=4,
    )
)
@example([{"\udfff": ["\ud83d", "\x85\u2028"]}])
def test_what_is_written_as_jsonl_is_read_again(written: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "q.jsonl"
        records.write_jsonl(written, path)
        lines = path.read_bytes().decode("utf-8").split("\n")  # UTF-8, whatever the texts hold
        assert [json.loads(line) for line in lines[:-1]] == written
        assert lines[-1] == ""
