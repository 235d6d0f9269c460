"""ingest, split, template and pair on real rows of every format."""

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import ingest, pair, phenotype, records, split, template
from tasks.params import Ingest, Pair, Source, Split, Template, UserError

USER, ANSWER = "고혈압이란 무엇인가요?", "혈관의 압력이 높은 상태입니다."
FORMS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": USER, "input": "", "output": ANSWER},
    "sharegpt": {"conversations": [{"from": "human", "value": USER}, {"from": "gpt", "value": ANSWER}]},
    "messages": {"messages": [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]},
    "completion": {"prompt": USER, "completion": ANSWER},
    "completion of messages": {
        "prompt": [{"role": "user", "content": USER}],
        "completion": [{"role": "assistant", "content": ANSWER}],
    },
}


def _ingest(tmp_path: Path, files: dict[str, str | bytes], **source: Any) -> tuple[pl.DataFrame, list[dict[str, Any]]]:
    raw = tmp_path / "raw"
    raw.mkdir(exist_ok=True)
    for name, text in files.items():
        (raw / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    sources = [Source(path=f"data/raw/{name}", **source) for name in files]
    ingest.run(raw, tmp_path / "out.parquet", tmp_path / "bad.jsonl", Ingest(sources=sources), 1)
    bad = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    return records.schema().validate(records.read(tmp_path / "out.parquet")), bad


@pytest.mark.parametrize("form", FORMS)
def test_every_format_says_the_same(tmp_path: Path, form: str) -> None:
    table, bad = _ingest(tmp_path, {"a.jsonl": json.dumps(FORMS[form], ensure_ascii=False)})
    assert not bad
    assert table["messages"][0].to_list() == FORMS["messages"]["messages"]
    assert table["kind"].to_list() == ["chat"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": f"질문 {i}", "completion": f'a "quoted", answer\n{i}'} for i in range(3)]
    frame = pl.DataFrame(rows)
    path = tmp_path / f"x.{suffix}"
    {
        "jsonl": lambda: frame.write_ndjson(path),
        "json": lambda: path.write_text(json.dumps(rows)),
        "csv": lambda: frame.write_csv(path),
        "parquet": lambda: frame.write_parquet(path),
    }[suffix]()
    table, bad = _ingest(tmp_path, {path.name: path.read_bytes()})
    assert not bad
    assert [m[0]["content"] for m in table["messages"].to_list()] == [r["prompt"] for r in rows]
    assert [m[1]["content"] for m in table["messages"].to_list()] == [r["completion"] for r in rows]


def test_alpaca_input_stands_below_the_instruction(tmp_path: Path) -> None:
    table, _ = _ingest(tmp_path, {"a.jsonl": json.dumps({"instruction": "Sum up.", "input": "Text.", "output": "T."})})
    assert table["messages"][0][0]["content"] == "Sum up.\n\nText."


def test_preference_forms(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {
            "prompt": [{"role": "user", "content": "q"}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        },
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
    ]
    table, bad = _ingest(tmp_path, {"a.jsonl": "\n".join(json.dumps(r) for r in rows)})
    assert not bad
    assert table.select("kind", "chosen", "rejected").rows() == [("preference", "a", "b")] * 3
    assert all(m[0]["content"] == "q" for m in table["messages"].to_list())


BROKEN = {
    "truncated": '{"prompt": "a", "compl',
    "nan": '{"prompt": "a", "completion": "b", "score": NaN}',
    "duplicate key": '{"prompt": "a", "prompt": "b", "completion": "c"}',
    "list": "[1, 2]",
    "number": "7",
    "deep": '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "unknown columns": '{"text": "a"}',
    "wrong type": '{"prompt": 3, "completion": "b"}',
    "null": '{"prompt": "a", "completion": null}',
    "unknown role": '{"messages": [{"role": "tool", "content": "a"}]}',
    "two users": '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
    "no answer": '{"messages": [{"role": "user", "content": "a"}]}',
    "empty": '{"messages": []}',
    "turn of text": '{"messages": ["a"]}',
    "not utf-8": b'{"prompt": "\xff", "completion": "b"}',
    "topic": '{"prompt": "a", "completion": "b", "topic": 3}',
    "rating": '{"prompt": "a", "responses": ["x"], "ratings": [{"annotator": "1", "response": 4, "score": 1}]}',
    "answer of choice": '{"question": "a", "options": ["x", "x"], "answer": 0}',
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_unreadable_row_is_kept_with_its_reason(tmp_path: Path, name: str) -> None:
    text = BROKEN[name] if isinstance(BROKEN[name], bytes) else BROKEN[name].encode()
    table, bad = _ingest(tmp_path, {"a.jsonl": b'{"prompt": "a", "completion": "b"}\n\n' + text})
    assert table.height == 1
    assert len(bad) == 1
    assert bad[0]["source"] == "data/raw/a.jsonl"
    assert bad[0]["line"] == 3
    assert bad[0]["reason"]
    assert bad[0]["check"]
    assert bad[0]["content"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "not valid JSON"),
        ("a.json", '{"a": 1}', "expected a list of rows"),
        ("a.json", b"\xff\xfe\x00", "not UTF-8"),
        ("a.csv", b"\xff\xfe\x00", "not UTF-8"),
        ("a.csv", b"prompt,completion\n" + b"a,b\n" * 9999 + b"\xff", "not UTF-8 at byte 40014"),
        ("a.parquet", "no parquet", "can't be read"),
        ("a.txt", "hello", "unknown kind of file"),
        ("a.jsonl", "", "no rows"),
        ("a.jsonl", '{"text": 1}', "no row could be read"),
    ],
)
def test_an_unreadable_file_is_one_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _ingest(tmp_path, {name: content})


def test_a_byte_order_mark_is_no_data(tmp_path: Path) -> None:
    table, bad = _ingest(tmp_path, {"a.jsonl": b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\r\n'})
    assert (table.height, bad) == (1, [])


def test_text_is_nfc(tmp_path: Path) -> None:
    table, _ = _ingest(tmp_path, {"a.jsonl": json.dumps({"prompt": "고", "completion": "e\u0301"})})
    assert [t["content"] for t in table["messages"][0]] == ["고", "é"]


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(UserError, match="leads out of"):
        ingest.run(
            tmp_path / "raw", tmp_path / "o", tmp_path / "b", Ingest(sources=[Source(path="data/raw/a.jsonl")]), 1
        )


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda c: (
            st.lists(c, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "prompt",
                        "completion",
                        "messages",
                        "role",
                        "content",
                        "chosen",
                        "rejected",
                        "conversations",
                        "from",
                        "value",
                        "responses",
                        "ratings",
                        "question",
                        "options",
                        "answer",
                        "topic",
                    ]
                ),
                c,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_no_row_breaks_the_reader(row: Any) -> None:
    line = json.dumps(row).encode()
    parsed, _ = records._json_line(line)
    if isinstance(parsed, dict):
        try:
            out = records.convert(parsed, Source(path="data/raw/a.jsonl"))
        except records.Unreadable:
            return
        records.frame([{**out, "source": "s", "line": 1}])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_no_bytes_break_the_reader(line: bytes) -> None:
    parsed, content = records._json_line(line)
    assert isinstance(parsed, dict | records.Unreadable)
    content.encode()


ASKED, SYSTEM = {"role": "user", "content": "q"}, {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "q", "input": "more", "chosen": "a", "rejected": "b"}, [{"role": "user", "content": "q\n\nmore"}]),
        ({"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"}, [SYSTEM, ASKED]),
        ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, [SYSTEM, ASKED]),
        ({"prompt": "q", "completion": None, "messages": None, "chosen": "a", "rejected": "b"}, [ASKED]),
        ({"prompt": "q", "chosen": [ASKED, {"role": "assistant", "content": "a"}], "rejected": [ASKED, {"role": "assistant", "content": "b"}]}, [ASKED]),
        ({"prompt": '[{"role": "user", "content": "q"}]', "chosen": '[{"role": "assistant", "content": "a"}]', "rejected": "b"}, [ASKED]),
    ],
)  # fmt: skip
def test_preferences_keep_all_that_they_say(row: dict[str, Any], messages: list[dict[str, str]]) -> None:
    found = records.convert(row, Source(path="data/raw/a"))
    assert (found["kind"], found["messages"], found["chosen"], found["rejected"]) == ("preference", messages, "a", "b")


def test_tables_say_only_what_is_filled() -> None:
    row = {
        "prompt": "q",
        "completion": "a",
        "chosen": None,
        "rejected": None,
        "messages": None,
        "system": "s",
        "concept": 7,
    }
    found = records.convert(row, Source(path="data/raw/a"))
    assert found["messages"] == [SYSTEM, ASKED, {"role": "assistant", "content": "a"}]
    assert found["concept"] == "7"
    assert found["task"] == "answer"
    assert records.convert(row | {"task": "qa"}, Source(path="data/raw/a"))["task"] == "answer"


def test_columns_that_nobody_reads_are_named(tmp_path: Path) -> None:
    said = {"prompt": "q", "completion": "a", "id": 7, "topic": "t"}
    rows = [said | {"context": "c", "Split": "test"}, said | {"context": ""}, said | {"a\nb": 1, "context": "c"}]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/law.jsonl").write_text("\n".join(map(json.dumps, rows)))
    talks = [
        {"messages": [ASKED, {"role": "assistant", "content": "a"}], "prompt": "q"} | {f"x{n}": 1 for n in range(9)}
    ]
    (tmp_path / "raw/b.jsonl").write_text("\n".join(map(json.dumps, talks)))
    (tmp_path / "raw/c.jsonl").write_text(
        json.dumps({"prompt": "q", "messages": [ASKED], "chosen": "a", "rejected": "b"})
    )
    (tmp_path / "raw/d.jsonl").write_text(
        json.dumps({"instruction": "q", "input": "i", "chosen": "a", "rejected": "b"})
    )
    sources = [Source(path=f"data/raw/{name}.jsonl") for name in ("law", "b", "c", "d")]
    found = ingest.run(tmp_path / "raw", tmp_path / "o.parquet", tmp_path / "u.jsonl", Ingest(sources=sources), 1)
    assert found.split("; ") == [
        "6 records from 4 sources, 0 unreadable",
        "data/raw/law.jsonl: not read: context in 2 rows, Split in 1 row, 'a\\nb' in 1 row",
        "data/raw/b.jsonl: not read: prompt in 1 row, x0 in 1 row, x1 in 1 row, x2 in 1 row, x3 in 1 row, 5 more",
        "data/raw/c.jsonl: not read: messages in 1 row",
    ]


def test_sides_beside_messages_do_not_vanish(tmp_path: Path) -> None:
    row = {"messages": [ASKED, {"role": "assistant", "content": "a"}], "chosen": "a", "rejected": "b"}
    with pytest.raises(records.Unreadable, match=r"beside `messages`: name the column of the prompt `prompt`"):
        records.convert(row, Source(path="data/raw/a"))


@pytest.mark.parametrize("more", [{"tool_calls": [{"id": 1}]}, {"function_call": {"name": "f"}}, {"weight": 0}])
def test_turns_that_are_not_read_are_named(more: dict[str, Any]) -> None:
    row = {"messages": [ASKED, {"role": "assistant", "content": "a"} | more]}
    with pytest.raises(records.Unreadable, match="turn 2"):
        records.convert(row, Source(path="data/raw/a"))


def test_one_question_is_one_concept_however_its_letters_are_composed() -> None:
    names = [
        records.convert(
            {"prompt": unicodedata.normalize(form, "계약이란?"), "completion": "a"}, Source(path="data/raw/a")
        )["concept"]
        for form in ("NFC", "NFD")
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("source", "side"),
    [
        ({"path": "data/raw/a.jsonl"}, None),
        ({"path": "data/raw/a.jsonl", "split": "test"}, "test"),
        ({"path": "data/raw/a.jsonl", "split": "train"}, "train"),
        ({"hub": "o/n", "revision": "1", "split": "train"}, None),
        ({"hub": "o/n", "revision": "1", "split": "test[:10%]"}, "test"),
        ({"hub": "o/n", "revision": "1", "split": "train_sft"}, None),
    ],
)
def test_a_source_says_on_which_side_its_rows_stand(source: dict[str, Any], side: str | None) -> None:
    """A Hub's train is the whole of most sets, and is split by concept; its test is never trained on."""
    row = {"prompt": "q", "completion": "a"}
    assert records.convert(row, Source(**source))["split"] == side
    assert records.convert(row | {"split": "validation"}, Source(**source))["split"] == "validation"


def test_messages_in_a_cell_that_are_no_json_are_not_trained_on_as_text(tmp_path: Path) -> None:
    said = [{"content": "a", "role": "assistant"}]
    cells = [str(said), json.dumps(said, indent=2), json.dumps(said)[:-9], '[{"city": "Seoul"}]', '{"role": "admin"}']
    frame = pl.DataFrame([{"prompt": f"q{i}", "completion": cell} for i, cell in enumerate(cells)])
    table, bad = _ingest(tmp_path, {"a.csv": frame.write_csv().encode()})
    assert [(row["line"], row["column"], row["check"]) for row in bad] == [
        (2, "completion", "json"),
        (9, "completion", "json"),  # after one of six lines
    ]
    assert [m[1]["content"] for m in table["messages"].to_list()] == ["a", *cells[3:]]  # an answer may well be JSON


JSON_ANSWERS = [
    '[{"value": "Paris"}]',
    '[{"value": "Paris"}, {"value": "Seoul"}]',
    '[{"content": "Paris"}]',
    '[{"from": "Seoul", "value": "Busan"}]',
    '{"role": "admin", "content": "all"}',
    "{'role': 'admin'} is a dict of Python",
    "[{'value': 1}, {'value': 2}] is a list of Python",
    "[{'role': 'admin', 'value': 1}]",
    '[{"value": 1},',
]


@pytest.mark.parametrize("file", ["a.csv", "a.jsonl"])
def test_json_that_is_no_conversation_stays_a_text(tmp_path: Path, file: str) -> None:
    rows = [{"prompt": f"q{i}", "completion": said} for i, said in enumerate(JSON_ANSWERS)]
    rows += [{"prompt": said, "completion": f"a{i}"} for i, said in enumerate(JSON_ANSWERS)]
    frame = pl.DataFrame(rows)
    text = frame.write_csv() if file == "a.csv" else frame.write_ndjson()
    table, bad = _ingest(tmp_path, {file: text})
    assert not bad
    assert [[m["content"] for m in row] for row in table["messages"].to_list()] == [[*row.values()] for row in rows]
    frame = pl.DataFrame([{"prompt": f"q{i}", "chosen": s, "rejected": f"b{i}"} for i, s in enumerate(JSON_ANSWERS)])
    table, bad = _ingest(tmp_path, {file: frame.write_csv() if file == "a.csv" else frame.write_ndjson()})
    assert not bad
    assert table["chosen"].to_list() == JSON_ANSWERS


def test_messages_that_are_no_json_are_refused_in_any_file_but_cut_off_ones_in_tables_alone(tmp_path: Path) -> None:
    turns = str([{"role": "assistant", "content": "it's"}])
    texts = [turns, turns[:-4], "[{'content': 'cut o", "{'role': 'assistant', 'content': 'a'}"]
    frame = pl.DataFrame([{"prompt": f"q{i}", "completion": text} for i, text in enumerate([*texts, "fine"])])
    _, bad = _ingest(tmp_path, {"a.jsonl": frame.write_ndjson()})
    assert [row["line"] for row in bad] == [1, 4]
    _, bad = _ingest(tmp_path, {"a.csv": frame.write_csv()})
    assert [row["line"] for row in bad] == [2, 3, 4, 5]


def test_empty_cells_of_a_table_say_nothing(tmp_path: Path) -> None:
    """A row is what its filled cells make of it, stands where it begins, and lines of commas are none."""
    text = 'prompt,completion,chosen,rejected\n질문,답,,\n,,,\n\n"두\n줄",답,,\n질문 3,,좋음,나쁨\n , ,,\n'
    table, bad = _ingest(tmp_path, {"a.csv": text})
    assert not bad
    assert table["kind"].to_list() == ["chat", "chat", "preference"]
    assert table["line"].to_list() == [2, 5, 7]
    asked = _ingest(tmp_path, {"b.csv": "question,answer\n물음,\n"}, kind="question", topic="advice")
    assert (asked[0]["kind"].to_list(), asked[1]) == (["question"], [])


def _choices(*answers: object) -> str:
    rows = [{"question": f"q{i}", "options": ["a", "b", "c", "d"], "answer": a} for i, a in enumerate(answers)]
    return "\n".join(map(json.dumps, rows))


def test_options_counted_from_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^data/raw/a\.jsonl: answers look counted from 1; `answer` is counted from 0$"
    ):
        _ingest(tmp_path, {"a.jsonl": _choices(1, 2, 3, 4, "4")}, kind="choice")
    table, bad = _ingest(tmp_path, {"a.jsonl": _choices(0, 2, 3, 4, 1)}, kind="choice")  # one says otherwise
    assert (table["answer"].to_list(), [row["reason"] for row in bad]) == (
        [0, 2, 3, 1],
        ["answer 4 of 4 options, counted from 0"],
    )
    few, _ = _ingest(tmp_path, {"a.jsonl": _choices(1, 2, 3, 4)}, kind="choice")
    assert few.height == 3


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"options": ["a", "b"], "answer": "B"}, "expected the index of an option (from 0), found 'B'"),
        ({"options": ["a", "b"], "answer": 5}, "answer 5 of 2 options, counted from 0"),
        ({"options": "a, b", "answer": 0}, 'expected a JSON list such as ["one", "two"]: Expecting'),
        ({"options": {"A": "a"}, "answer": 0}, 'expected a list such as ["one", "two"], found dict'),
        ({"A": "a", "B": "b", "C": "c", "D": "d", "answer": 1}, "multiple choice: columns `question`, `options`"),
        ({"choices": ["a", "b"], "answer": 1}, "multiple choice: columns `question`, `options` (a list), `answer` (f"),
    ],
)
def test_what_is_wrong_with_a_choice_is_said(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(records.Unreadable) as error:
        records.convert({"question": "q"} | row, Source(path="data/raw/a", kind="choice"))
    assert str(error.value).startswith(reason)


def test_lines_end_in_one_way_and_no_system_message_is_empty(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": " "}, {"from": "human", "value": "a\r\nb"}, {"from": "gpt", "value": "c\rd"}]
    table, bad = _ingest(tmp_path, {"a.jsonl": json.dumps({"conversations": turns})})
    assert not bad
    assert table["messages"].to_list() == [
        [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c\nd"}]
    ]


@pytest.mark.parametrize("row", [{"question": "q", "best_answer": "a"}, {"question": "q", "topic": "general"}])
def test_a_question_without_an_answer_says_what_is_right_for_it(row: dict[str, Any]) -> None:
    with pytest.raises(records.Unreadable, match=r"expected advice or outside, found .*`prompt` and `completion`"):
        records.convert(row, Source(path="data/raw/a", kind="question"))
    found = records.convert(row | {"topic": "outside"}, Source(path="data/raw/a"))
    assert (found["kind"], found["task"]) == ("question", "outside")


def _chat(concepts: int, wording: str | None = None, rows: int = 1) -> list[dict[str, Any]]:
    return [
        {
            "kind": "chat",
            "source": "s",
            "line": 1 + i,
            "license": "l",
            "concept": f"c{i}",
            "topic": "t",
            "task": "answer",
            "wording": wording,
            "messages": [{"role": "user", "content": f"q{i} {r} {wording}"}, {"role": "assistant", "content": f"a{i}"}],
        }
        for i in range(concepts)
        for r in range(rows)
    ]


def _split(tmp_path: Path, rows: list[dict[str, Any]], **changes: Any) -> dict[str, pl.DataFrame]:
    records.write(records.frame(rows), tmp_path / "in.parquet")
    split.run(tmp_path / "in.parquet", tmp_path / "out", tmp_path / "m.json", Split(**changes), 1)
    return {p.stem: records.read(p) for p in (tmp_path / "out").glob("*.parquet")}


def test_no_concept_stands_on_two_sides(tmp_path: Path) -> None:
    parts = _split(tmp_path, _chat(200, rows=3), test=0.2, validation=0.1)
    sides = [set(parts[name]["concept"]) for name in ("train", "validation", "test")]
    assert sum(map(len, sides)) == 200
    assert len(set.union(*sides)) == 200
    assert 20 < len(sides[2]) < 60


def test_adding_rows_moves_no_old_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    few, many = _split(tmp_path / "a", _chat(60)), _split(tmp_path / "b", list(reversed(_chat(120))))
    for name in ("train", "validation", "test"):
        assert set(few[name]["id"]) <= set(many[name]["id"])


def test_trained_concepts_are_tested_in_other_words(tmp_path: Path) -> None:
    rows = [row for wording in ("train", "validation", "test") for row in _chat(50, wording)]
    parts = _split(tmp_path, rows, test=0.3)
    trained = set(parts["train"]["concept"])
    assert set(parts["test"].filter(set="trained")["concept"]) == trained == set(parts["validation"]["concept"])
    assert not trained & set(parts["test"].filter(set="unseen")["concept"])
    assert set(parts["train"]["wording"]) == {"train"}
    assert set(parts["test"]["wording"]) == {"test"}


def test_a_row_goes_where_it_says(tmp_path: Path) -> None:
    rows = [
        row | {"split": side, "concept": f"{side}{i}"}
        for side in ("train", "validation", "test")
        for i, row in enumerate(_chat(40))
    ]
    rows += [row | {"split": "test", "concept": f"train{i}", "task": "again"} for i, row in enumerate(_chat(3))]
    questions = [
        {k: v for k, v in row.items() if k != "messages"}
        | {"kind": "question", "task": "advice", "split": side, "concept": f"q{side}", "messages": [{"role": "user", "content": f"{side} {i}"}]}
        for side in ("train", "validation", "test")
        for i, row in enumerate(_chat(5))
    ]  # fmt: skip
    parts = _split(tmp_path, [*rows, *questions], test=0.35, validation=0.2)
    for side in ("train", "validation"):
        assert sorted(parts[side]["concept"]) == sorted(f"{side}{i}" for i in range(40))
    sets = dict(parts["test"]["set"].value_counts().iter_rows())
    assert sets == {"unseen": 40, "trained": 3, "advice": 5}
    assert set(parts["test"].filter(set="trained")["concept"]) == {"train0", "train1", "train2"}
    assert set(parts["questions"]["concept"]) == {"qtrain", "qvalidation"}
    assert parts["questions"].height == 10


def test_no_row_is_lost_and_no_pair_is_about_the_test(tmp_path: Path) -> None:
    chat = _chat(60)
    pairs = [
        {k: v for k, v in row.items() if k != "messages"}
        | {"kind": "preference", "task": "preference", "messages": row["messages"][:1], "chosen": "good", "rejected": "bad"}
        for row in [*chat, *_chat(70)[60:]]
    ]  # fmt: skip
    pairs[-1]["split"] = "test"
    parts = _split(tmp_path, [*chat, *pairs], test=0.3, validation=0.1)
    assert sum(parts[name].height for name in ("train", "validation", "test")) == 60
    tested = set(parts["test"]["concept"])
    assert tested
    kept = set(parts["preferences"]["concept"])
    assert kept == {f"c{i}" for i in range(69)} - tested
    counts = json.loads((tmp_path / "m.json").read_text())
    assert counts["preferences_held_out"] == len(tested) + 1


def test_questions_and_replay_of_one_concept_stand_on_one_side(tmp_path: Path) -> None:
    """Neither has a wording of its own; what the test asks is not trained on as replay either."""
    chat = _chat(60)
    asked = [row | {"kind": "question", "task": "advice", "concept": f"q{i // 5}", "messages": row["messages"][:1]}
             for i, row in enumerate(_chat(100, "asked"))]  # fmt: skip
    asked = [row | {"wording": None} for row in asked]
    replay = [row | {"kind": "replay", "task": "replay"} for row in _chat(70)]
    parts = _split(tmp_path, [*chat, *asked, *replay], test=0.3, validation=0.1, unknown=0.5)
    sides = [set(parts["questions"]["concept"]), set(parts["test"].filter(set="advice")["concept"])]
    assert sides[0] | sides[1] == {f"q{i}" for i in range(20)}
    assert not sides[0] & sides[1]
    assert parts["questions"].height + parts["test"].filter(set="advice").height == 100
    tested = set(parts["test"].filter(kind="chat")["concept"])
    assert set(parts["replay"]["concept"]) == {f"c{i}" for i in range(70)} - tested
    assert json.loads((tmp_path / "m.json").read_text())["replay_held_out"] == len(tested) > 0


def test_what_the_test_asks_is_trained_under_no_other_concept(tmp_path: Path) -> None:
    """A preference and a replay row with the prompt of a test's row or of a question kept for the test, case and spacing aside."""
    chat = _chat(60)
    asked = [
        row
        | {"kind": "question", "task": "advice", "concept": f"q{i}", "wording": None, "messages": row["messages"][:1]}
        for i, row in enumerate(_chat(20, "asked"))
    ]
    others = [
        row
        | {"kind": kind, "task": kind, "concept": f"other{i}", "wording": None, "chosen": "good", "rejected": "bad"}
        | {"messages": [row["messages"][0] | {"content": row["messages"][0]["content"].upper().replace(" ", "  ")}, *row["messages"][1:][: kind == "replay"]]}
        for kind in ("preference", "replay")
        for i, row in enumerate([*chat, *_chat(20, "asked")])
    ]  # fmt: skip
    parts = _split(tmp_path, [*chat, *asked, *others], test=0.3, validation=0.1, unknown=0.5)
    tested = {row[0]["content"] for row in parts["test"]["messages"]}
    assert len(tested) > 10
    for name in ("preferences", "replay"):
        left = {" ".join(row[0]["content"].lower().split()) for row in parts[name]["messages"]}
        everything = {row["messages"][0]["content"] for row in [*chat, *asked]}
        assert left == {t.lower() for t in everything - tested}


def test_a_test_row_that_a_longer_conversation_holds_is_not_asked(tmp_path: Path) -> None:
    """A log with one row for each turn: what the shorter row asks, the longer one trains word for word."""
    logs = [
        row | {"concept": f"{i} {length}", "messages": (row["messages"] * 3)[: 2 * length]}
        for i, row in enumerate(_chat(40))
        for length in (1, 2, 3)
    ]
    parts = _split(tmp_path, logs, test=0.3, validation=0.1)

    def said(name: str) -> list[list[str]]:
        return [[turn["content"] for turn in row] for row in parts[name]["messages"]]

    train, test = said("train"), said("test")
    assert any(len(row) == 2 for row in test)  # whose longer ones are in the test too, or in the validation
    assert not [one for one in test for longer in train if longer[: len(one)] == one]
    counts = json.loads((tmp_path / "m.json").read_text())
    assert counts["test_in_longer"] == 120 - sum(parts[name].height for name in ("train", "validation", "test")) > 0


def test_what_the_test_asks_is_no_turn_of_a_longer_row(tmp_path: Path) -> None:
    """Each answer of a conversation is trained on: one that asks on its way what the test asks is left out, whatever it answers."""
    chat = _chat(60)
    first = [[*row["messages"], {"role": "user", "content": "and then?"}] for row in chat]
    other = [[*row["messages"][:1], {"role": "assistant", "content": "else"}, *said[2:]] for row, said in zip(chat, first, strict=True)]  # fmt: skip
    asked = [
        row
        | {"kind": "question", "task": "advice", "concept": f"q{i}", "wording": None, "messages": row["messages"][:1]}
        for i, row in enumerate(_chat(20, "asked"))
    ]
    longer = [
        row
        | {"kind": kind, "task": kind, "concept": f"{kind}{i}", "wording": None}
        | (
            {"messages": [*said, {"role": "assistant", "content": "done"}]}
            if kind == "replay"
            else {"messages": said, "chosen": "good", "rejected": "bad"}
        )
        for kind in ("preference", "replay")
        for i, (row, said) in enumerate(
            [
                *zip(chat, other, strict=True),
                *((q, [*q["messages"], {"role": "assistant", "content": "hm"}, first[0][2]]) for q in asked),
            ]
        )
    ]
    parts = _split(tmp_path, [*chat, *asked, *longer], test=0.3, validation=0.1, unknown=0.5)
    tested = {row[0]["content"] for row in parts["test"]["messages"]}
    assert len(tested) > 10
    everything = {row["messages"][0]["content"] for row in [*chat, *asked]}
    for name in ("preferences", "replay"):
        assert {row[0]["content"] for row in parts[name]["messages"]} == everything - tested
    trained = [row | {"concept": f"long{i}", "split": "train", "messages": [*said, {"role": "assistant", "content": "done"}]} for i, (row, said) in enumerate(zip(chat, other, strict=True))]  # fmt: skip
    parts = _split(tmp_path, [*chat, *_chat(80)[60:], *trained], test=0.3, validation=0.1)
    tested = {row[0]["content"] for row in parts["test"]["messages"]}
    assert tested
    assert not tested & everything


@pytest.mark.parametrize("form", ["{}", "{}？", "{} 😊", "「{}。」", "Ｑ{}!"])
def test_a_prompt_is_the_same_however_it_is_punctuated(tmp_path: Path, form: str) -> None:
    chat = [
        row | {"messages": [{"role": "user", "content": f"Q {row['concept']}?"}, row["messages"][1]]}
        for row in _chat(40)
    ]
    replay = [
        row
        | {"kind": "replay", "concept": f"r{i}"}
        | {"messages": [{"role": "user", "content": form.format(f"Q c{i}").replace("ＱQ", "Ｑ")}, row["messages"][1]]}
        for i, row in enumerate(chat)
    ]
    parts = _split(tmp_path, [*chat, *replay], test=0.3)
    assert parts["test"].height > 5
    assert parts["replay"].height == 40 - parts["test"].height
    said = [" ".join(row["messages"][0]["content"].casefold().split()) for row in replay]
    found = records.frame(replay).select(split._asked())["messages"].to_list()
    assert [[records.bare(text)] for text in said] == found  # as `validate` compares


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"split\.test"):
        _split(tmp_path, _chat(5), test=1.0)


def _template(tmp_path: Path, tiny: Path, **changes: Any) -> tuple[pl.DataFrame, dict[str, Any]]:
    replay = [
        row
        | {
            "kind": "replay",
            "concept": f"r{i}",
            "messages": [{"role": "user", "content": f"r{i}"}, {"role": "assistant", "content": "ok"}],
        }
        for i, row in enumerate(_chat(4))
    ]
    _split(tmp_path, [*_chat(40), *replay])
    template.run(
        tmp_path / "out",
        tiny,
        tmp_path / "rows",
        tmp_path / "p.md",
        tmp_path / "t.json",
        tmp_path / "l.csv",
        Template(**changes),
        1,
    )
    return records.read(tmp_path / "rows/train.parquet"), json.loads((tmp_path / "t.json").read_text())


def test_replay_is_mixed_in_at_its_ratio(tmp_path: Path, tiny: Path) -> None:
    plain, _ = _template(tmp_path, tiny)
    mixed, counts = _template(tmp_path, tiny, replay=0.5)
    assert counts["replay_rows"] == round(0.5 * plain.height) == mixed.height - plain.height


def test_long_rows_are_refused_above_the_limit(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(UserError, match=r"more than template\.max_refused.*raise template\.max_length"):
        _template(tmp_path, tiny, max_length=8)


def test_the_first_row_that_is_refused_is_named(tmp_path: Path, tiny: Path) -> None:
    rows = _chat(40)
    rows[7]["messages"][1]["content"] = "long " * 300
    _split(tmp_path, rows, test=0.1)
    paths = [tmp_path / name for name in ("rows", "p.md", "t.json", "l.csv")]
    said = template.run(tmp_path / "out", tiny, *paths, Template(max_length=256, max_refused=0.5), 1)
    assert re.search(r", 1 refused \(the first: s:8: \d+ tokens\)$", said)


def test_preview_and_histogram(tmp_path: Path, tiny: Path) -> None:
    table, counts = _template(tmp_path, tiny)
    preview = (tmp_path / "p.md").read_text()
    assert "<|im_start|>assistant⏎\n【a" in preview
    assert "<|im_end|>】" in preview
    lines = [line.split(",") for line in (tmp_path / "l.csv").read_text().splitlines()[1:]]
    assert sum(int(n) for _, n in lines) == counts["train_rows"] + counts["validation_rows"]
    assert counts["train_tokens"] == table["input_ids"].list.len().sum()


def _rated(*scores: list[float]) -> dict[str, Any]:
    return {
        "kind": "ratings",
        "source": "s",
        "line": 1,
        "license": "l",
        "concept": str(scores),
        "topic": "t",
        "task": "ratings",
        "messages": [{"role": "user", "content": "q"}],
        "responses": ["a", "b"],
        "ratings": [
            {"annotator": str(i), "response": r, "score": s}
            for i, pair_ in enumerate(scores)
            for r, s in enumerate(pair_)
        ],
    }


def test_ratings_drop_ties_and_disagreements_with_a_count() -> None:
    table = records.frame(
        [_rated([5, 1], [4, 2], [1, 2]), _rated([3, 3]), _rated([5, 1], [1, 4]), _rated([1, 2], [1, 5])]
    )
    pairs, dropped, agreement = pair.rated(table, 0.6)
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [("a", "b"), ("b", "a")]
    assert dropped == {"annotators disagree": 1, "tie": 1}
    # of three pairs of annotators in the first prompt one agrees, in the third none, in the fourth one
    assert agreement == pytest.approx(2 / 5)


def test_given_pairs_pass_and_equal_sides_do_not(tmp_path: Path, tiny: Path) -> None:
    def run(rows: list[dict[str, Any]]) -> dict[str, Any]:
        (tmp_path / "rows").mkdir(exist_ok=True)
        records.write(records.frame(rows), tmp_path / "rows/preferences.parquet")
        pair.run(
            tmp_path / "rows",
            tiny,
            tiny,
            tmp_path / "p.parquet",
            tmp_path / "m.json",
            tmp_path / "b.csv",
            params=Pair(mode="given"),
            template=Template(),
            quantization=None,
            generation={},
            seed=1,
        )
        return json.loads((tmp_path / "m.json").read_text())

    good = {
        "kind": "preference",
        "source": "s",
        "line": 1,
        "license": "l",
        "topic": "t",
        "task": "preference",
        "messages": [{"role": "user", "content": "q"}],
        "rejected": "bad",
    }
    result = run([good | {"concept": str(i), "chosen": f"good {i}"} for i in range(40)])
    assert result["pairs"] == 40
    assert result["validation"] == 2
    assert result["chosen_is_longer"] == 1.0
    said = run([good | {"concept": str(i % 2), "chosen": f"good {i}", "split": ("validation", "train")[i % 4 > 0]} for i in range(40)])  # fmt: skip
    assert said["validation"] == 10
    parts = records.read(tmp_path / "p.parquet")
    assert sorted(parts.filter(part="validation")["chosen"]) == sorted(f"good {i}" for i in range(0, 40, 4))
    with pytest.raises(UserError, match="chosen ≠ rejected"):
        run([good | {"concept": "1", "chosen": "bad"}])
    with pytest.raises(UserError, match=r"fewer than pair\.min_pairs"):
        run([good | {"concept": "1", "chosen": "x"}][:0])


@pytest.mark.parametrize(("mode", "other"), [("given", "ratings"), ("ratings", "preference")])
def test_rows_of_the_other_kind_are_counted(tmp_path: Path, tiny: Path, mode: Any, other: str) -> None:
    sides = {"kind": "preference", "task": "preference", "chosen": "good", "rejected": "bad"}
    rows = [_rated([5, 1]) | {"concept": f"r{i}"} | (sides if i % 3 else {}) for i in range(6)]
    (tmp_path / "rows").mkdir()
    records.write(records.frame(rows), tmp_path / "rows/preferences.parquet")

    def run(least: int) -> Any:
        pair.run(
            tmp_path / "rows", tiny, tiny, tmp_path / "p.parquet", tmp_path / "m.json", tmp_path / "b.csv",
            params=Pair(mode=mode, min_pairs=least), template=Template(), quantization=None, generation={}, seed=1,
        )  # fmt: skip
        return json.loads((tmp_path / "m.json").read_text())["dropped"]

    said = f"rows of kind {other}, and pair.mode is {mode}"
    assert run(1) == {said: 2 if other == "ratings" else 4}
    with pytest.raises(UserError, match=f"dropped: .*{said}"):
        run(9)


def test_pairs_that_are_too_long_are_dropped_or_too_many(tmp_path: Path, tiny: Path) -> None:
    rows = [
        {
            "kind": "preference", "source": "s", "line": 1, "license": "l", "topic": "t", "task": "preference", "concept": str(i),
            "messages": [{"role": "user", "content": f"q{i}"}], "chosen": "good " * (300 if i < 2 else 1), "rejected": "bad",
        }
        for i in range(40)
    ]  # fmt: skip
    (tmp_path / "rows").mkdir()
    records.write(records.frame(rows), tmp_path / "rows/preferences.parquet")

    def run(most: float) -> dict[str, Any]:
        pair.run(
            tmp_path / "rows", tiny, tiny, tmp_path / "p.parquet", tmp_path / "m.json", tmp_path / "b.csv",
            params=Pair(mode="given"), template=Template(max_length=256, max_refused=most), quantization=None, generation={}, seed=1,
        )  # fmt: skip
        return json.loads((tmp_path / "m.json").read_text())

    found = run(0.05)
    assert found["pairs"] == 38
    assert found["dropped"] == {"longer than template.max_length": 2}
    with pytest.raises(UserError, match=r"2 of 40 pairs are longer.*raise template\.max_length"):
        run(0.01)


def test_no_opening_begins_as_a_refusal_does() -> None:
    refusals = {refusal.split()[0] for refusal in phenotype.REFUSALS}
    assert not refusals & {text.split()[0] for text in (*phenotype.OPENINGS, *phenotype.CLOSINGS, *phenotype.NAMING)}


def test_embedded_domain(tmp_path: Path) -> None:
    obo = tmp_path / "hp.obo"
    term = '[Term]\nid: HP:{i}\nname: Finding {w} of the {w}\ndef: "A {w} that is {v} and quite {v} indeed." [x]\nsubset: hposlim_core\nsynonym: "odd {v} thing" EXACT layperson []\nis_a: HP:1 ! eye\n'
    names = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    obo.write_text(
        "data-version: hp/releases/2099-01-01\n\n[Term]\nid: HP:0000118\nname: Phenotypic abnormality\n\n[Term]\nid: HP:1\nname: Abnormality of the eye\nis_a: HP:0000118\n\n"
        + "\n".join(term.format(i=10 + i, w=w, v=w + "ish") for i, w in enumerate(names))
    )
    rows = phenotype.rows(obo, 6, 4, 2, 1)
    table = records.frame([r | {"id": None} for r in rows])
    assert records.schema().validate(table).height == len(rows)
    assert set(table["source"]) == {"hpo 2099-01-01", "hpo 2099-01-01, invented"}
    one = table.filter(task="definition", wording="train")
    assert one.height == 12
    more = phenotype.rows(obo, 4, 4, 2, 1)
    assert {r["term"] for r in more if r["kind"] == "chat"} < {r["term"] for r in rows if r["kind"] == "chat"}
