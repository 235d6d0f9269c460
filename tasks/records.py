"""Canonical records: their schema, reading sources of every common format, and Parquet that is the same byte for byte.

One table holds all kinds of rows. `kind` is

- `chat`: a conversation that ends with the assistant's answer; trained on, or asked in a test;
- `replay`: general chat, mixed into training against forgetting;
- `question`: a conversation that ends with the user; asked in a test, and a prompt for composed preference pairs;
- `choice`: a multiple-choice item of the general test, `options` and `answer` (the right option's index);
- `preference`: a prompt with a `chosen` and a `rejected` answer;
- `ratings`: a prompt with several `responses`, each rated by several annotators.
"""

import contextlib
import csv
import functools
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from tasks.params import SIDES, UNANSWERED, Source, UserError, short

if TYPE_CHECKING:
    import pandera.polars as pa

ROWS = 16_384  # of a row group, and what a stage holds of a table at once
MESSAGE = pl.Struct({"role": pl.String, "content": pl.String})
RATING = pl.Struct({"annotator": pl.String, "response": pl.Int64, "score": pl.Float64})
RECORD: dict[str, pl.DataType] = {
    "id": pl.String(),  # 16 hex digits over source and content: stable when rows are added or reordered
    "kind": pl.String(),
    "source": pl.String(),
    "line": pl.Int64(),  # 1-based, within the source
    "license": pl.String(),
    "concept": pl.String(),  # rows of one concept never stand on both sides of a split
    "topic": pl.String(),
    "task": pl.String(),  # what is asked: definition, lay_to_clinical, …; `answer` for a user's rows
    "wording": pl.String(),  # the embedded domain's: train, validation, test; null: none of fixed wording
    "split": pl.String(),  # where the row itself says that it belongs: train, validation, test; null: by its concept
    "term": pl.String(),  # the domain term asked about, if known
    "lay": pl.String(),  # its everyday word, if known
    "messages": pl.List(MESSAGE),
    "options": pl.List(pl.String()),
    "answer": pl.Int64(),
    "chosen": pl.String(),
    "rejected": pl.String(),
    "responses": pl.List(pl.String()),
    "ratings": pl.List(RATING),
}
KINDS = ("chat", "replay", "question", "choice", "preference", "ratings")
TASKS = ("definition", "lay_to_clinical", "clinical_to_lay", "group", "answer")  # of chat rows, that stages know
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
# how messages begin in a text, as JSON or as Python prints them, and what tells them from any other JSON
MESSAGES = re.compile(r"""\s*(?:\[\s*\{\s*['"](?:role|from|content|value)|\{\s*['"](?:role|from))['"]\s*:""")
ROLE = re.compile(rf"""['"](?:role|from)['"]\s*:\s*['"](?:{"|".join(ROLES)})['"]""")
# What may stand before and behind a prompt without making another one: spaces, sentence marks, emoji. Signs of code, numbers
# and formulas (C++, -5, 20 %, #1) are none. Read alike by Python's and Rust's regex engines.
_AROUND = "\\s\"'“”‘’«»「」『』\u2600-\u27bf\u2b00-\u2bff\ufe0f\u200d\u20e3\U0001f000-\U0001faff"
BEFORE, BEHIND = f"[{_AROUND}¿¡]", f"[{_AROUND}.!?,:;~…。、·،؛؟।]"
LONGEST_ROW = 20_000_000  # bytes of a line, characters of a row's texts; a longer one is quarantined
LONGEST_NAME = 1_000  # characters of a concept, topic, term, …
MOST_NAMES = 1_000  # columns counted that nobody reads: keys may be data
# Combining marks one after another: UAX 15 ("Stream-Safe Text Format") allows 30, and no language comes near. Bringing n of
# them into order takes n² steps, so that 100 kB would take seconds and 10 MB a day.
MARKS = 30
# What a file begins with that is no UTF-8, whatever its name says.
OTHER_FILES = {
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
    b"\x1f\x8b": "gzip: unpack it",
    b"BZh": "bzip2: unpack it",
    b"\xfd7zXZ": "xz: unpack it",
    b"\x28\xb5\x2f\xfd": "zstd: unpack it",
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save it as CSV",
    b"PAR1": "Parquet: name it .parquet",
}


def schema() -> "pa.DataFrameSchema":
    """Column types and the values that every stage may rely on."""
    import pandera.polars as pa

    columns = {name: pa.Column(dtype, nullable=name not in _REQUIRED) for name, dtype in RECORD.items()}
    columns["id"] = pa.Column(pl.String, pa.Check.str_matches(r"^[0-9a-f]{16}$"), unique=True)
    columns["kind"] = pa.Column(pl.String, pa.Check.isin(KINDS))
    columns["line"] = pa.Column(pl.Int64, pa.Check.ge(1))
    return pa.DataFrameSchema(columns, strict=True, ordered=True)


_REQUIRED = {"id", "kind", "source", "line", "license", "concept", "topic", "task", "messages"}


def frame(rows: Iterable[dict[str, Any]]) -> pl.DataFrame:
    """Rows as a table with every column of `RECORD`, an id for each, in the order given."""
    return pl.concat(frames(rows))


def frames(rows: Iterable[dict[str, Any]]) -> Iterator[pl.DataFrame]:
    """The same in tables of `ROWS` rows, one at least."""
    full, seen, none = list[dict[str, Any]](), dict[str, int](), True
    for row in rows:
        identifier = row.get("id") or identify(row)
        seen[identifier] = seen.get(identifier, 0) + 1
        if seen[identifier] > 1:  # an exact copy within a source: an id of its own, for the quarantine to name
            identifier = hashlib.sha256(f"{identifier} {seen[identifier]}".encode()).hexdigest()[:16]
        full.append({name: row.get(name) for name in RECORD} | {"id": identifier})
        if len(full) == ROWS:
            yield pl.DataFrame(full, schema=RECORD, orient="row")
            full, none = [], False
    if full or none:
        yield pl.DataFrame(full, schema=RECORD, orient="row")


def identify(row: dict[str, Any]) -> str:
    """Stable id of a row: a hash of what it says and where it is from, not of where it stands."""
    said = {
        k: row.get(k) for k in ("kind", "source", "messages", "options", "chosen", "rejected", "responses", "ratings")
    }
    return hashlib.sha256(
        json.dumps(said, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ).hexdigest()[:16]


def write(tables: pl.DataFrame | Iterable[pl.DataFrame], path: Path) -> None:
    """Parquet; same rows, same bytes, however they are cut into `tables`, of which there is one at least.

    Nothing is left at `path` when `tables` raises.
    """
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    groups = _groups([tables] if isinstance(tables, pl.DataFrame) else tables)
    first = next(groups)
    second = next(groups, None)
    if second is None:
        first.write_parquet(path, compression="zstd", statistics=False)
        return
    # polars writes several row groups only of what it holds at once, or out of a thread of its own, where the stage
    # would be deaf to signals until it ends
    schema = _arrow(first).schema
    try:
        with parquet.ParquetWriter(
            path, schema, compression="zstd", write_statistics=False, write_page_checksum=True
        ) as writer:
            for group in chain([first, second], groups):
                writer.write_table(_arrow(group))
    except BaseException:  # the writer has ended the file as if it were whole
        path.unlink(missing_ok=True)
        raise


def _groups(tables: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """The rows in tables of `ROWS` rows, but for the last."""
    held: pl.DataFrame | None = None
    for table in tables:
        held = table if held is None else pl.concat([held, table])
        while held.height > ROWS:
            yield held[:ROWS].rechunk()
            held = held[ROWS:]
    if held is not None:
        yield held.rechunk()


def _arrow(table: pl.DataFrame) -> Any:
    return table.to_arrow(compat_level=pl.CompatLevel.oldest())


def read(path: Path) -> pl.DataFrame:
    """A Parquet table of records.

    Raises:
        UserError: not there, or not Parquet.
    """
    return pl.concat(chunks(path))


def chunks(path: Path) -> Iterator[pl.DataFrame]:
    """The same in tables of at most `ROWS` rows, one at least."""
    found, none = 0, True
    with _parquet_file(path) as file:
        groups = range(file.num_row_groups)  # one at a time: a reader of all of them holds on to several
        for batch in chain.from_iterable(file.iter_batches(ROWS, row_groups=[group]) for group in groups):
            batch.validate(full=True)
            found, none = found + batch.num_rows, False
            yield _polars(batch, path)
        if found != file.metadata.num_rows:
            raise UserError(f"{path}: expected {file.metadata.num_rows} rows, as it says itself, found {found}")
        if none:
            yield _polars(file.schema_arrow.empty_table(), path)


def _polars(batch: Any, path: Path) -> pl.DataFrame:
    try:
        return pl.DataFrame(pl.from_arrow(batch))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:  # a column's damaged name, for one
        raise UserError(f"{path}: can't be read as Parquet: {' '.join(str(error).split())[:300]}") from None


@contextlib.contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    """pyarrow's reader: polars 2.1.0 panics (no Exception) or ends the process when a byte of the file is damaged.

    Needed while tests/test_corpus.py::test_polars_still_dies_of_a_damaged_file passes.

    Raises:
        UserError: not there, or not Parquet, also while it is being read.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read as Parquet: {' '.join(str(error).split())[:300]}") from None


def write_jsonl(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """One object a line; every string comes back as it was, half a surrogate pair too (as its JSON escape)."""
    with jsonl(path) as put:
        for row in rows:
            put(row)


@contextlib.contextmanager
def jsonl(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """The same for a row at a time. Nothing is left at `path` when the block raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:

            def put(row: dict[str, Any]) -> None:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

            yield put
    except BaseException:
        path.unlink(missing_ok=True)
        raise


class Unreadable(ValueError):
    """A row that can't be parsed or has no known form; `column` names the culprit."""

    def __init__(self, column: str, check: str, reason: str) -> None:
        super().__init__(reason)
        self.column, self.check = column, check


class Beyond(Unreadable):
    """The answer of a multiple choice that is the number of its options: their last one, if it is counted from 1."""


class Cells(dict[str, Any]):
    """A row of a CSV file, in which all values are texts."""


Parsed = tuple[int, dict[str, Any] | Unreadable, str]  # line, row or what is wrong, original content


def rows_of_file(path: Path) -> Iterator[Parsed]:
    """Rows of a JSONL, JSON, CSV or Parquet file, unreadable ones included; only blank lines, and those of empty cells, are no rows.

    Raises:
        UserError: the file as a whole can't be read.
    """
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: unknown kind of file; known are .jsonl, .json, .csv, .parquet")
    try:
        with path.open("rb") as file:
            head = file.read(6)
        for start, what in OTHER_FILES.items():
            if head.startswith(start) and reader is not _parquet:
                raise UserError(f"{path}: not UTF-8 text, but {what}")
        yield from reader(path)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror or error}") from None


def _jsonl(path: Path) -> Iterator[Parsed]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_ROW + 1):
            number += 1
            if len(line) > LONGEST_ROW and not line.endswith(b"\n"):
                size = len(line)
                while more := file.readline(LONGEST_ROW):
                    size += len(more)
                    if more.endswith(b"\n"):
                        break
                reason = f"line of {size} bytes, at most {LONGEST_ROW} are read; here are the first 10000"
                yield number, Unreadable("(row)", "length", reason), line[:10_000].decode("utf-8", "backslashreplace")
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, *_json_line(line)


def _json_line(line: bytes) -> tuple[dict[str, Any] | Unreadable, str]:
    content = line.decode("utf-8", "backslashreplace").rstrip("\r\n")
    try:
        return _object(_parse(line.decode("utf-8"))), content
    except UnicodeDecodeError as error:
        return Unreadable("(row)", "encoding", f"not UTF-8 at byte {error.start}; save the file as UTF-8"), content
    except ValueError as error:
        return Unreadable("(row)", "json", f"not valid JSON: {error}"), content


def _json(path: Path) -> Iterator[Parsed]:
    try:
        data = _parse(_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}; for one row a line, name it .jsonl") from None
    if not isinstance(data, list):
        raise UserError(
            f"{path}: expected a list of rows, found {type(data).__name__}; for one row a line, name it .jsonl"
        )
    for number, row in enumerate(data, start=1):
        yield number, _object(row), content(row)


def _csv(path: Path) -> Iterator[Parsed]:
    csv.field_size_limit(LONGEST_ROW)  # the module's own limit, for all readers, would refuse a long answer
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            names = next(reader, [])
            twice = next((name for n, name in enumerate(names) if name in names[:n]), None)
            if twice is not None:
                raise UserError(f"{path}: two columns are named {short(twice)}")
            if len(names) == 1 and re.search("[;\t|]", names[0]):
                raise UserError(f"{path}: expected columns set apart by commas, found {short(names[0])}")
            line = reader.line_num + 1
            for cells in reader:
                first, line = line, reader.line_num + 1
                if not any(map(str.strip, cells)):  # a spreadsheet leaves lines of commas
                    continue
                row = Cells(zip(names, cells, strict=False))
                if len(cells) == len(names):
                    yield first, row, content(row)
                    continue
                row |= dict.fromkeys(names[len(cells) :])
                if len(cells) > len(names):
                    row["(extra)"] = cells[len(names) :]
                reason = f"expected {len(names)} columns, found {len(cells)}"
                yield first, Unreadable("(row)", "columns", reason), content(row)
        except csv.Error as error:
            raise UserError(f"{path}: not valid CSV at line {reader.line_num}: {error}") from None
        except UnicodeDecodeError:  # its place is that within a block
            _text(path)
            raise


def _parquet(path: Path) -> Iterator[Parsed]:
    number = 0
    with _parquet_file(path) as file:
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise UserError(f"{path}: two columns are named {short(max(names, key=names.count))}")
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row, content(row)
        if number != file.metadata.num_rows:
            raise UserError(f"{path}: expected {file.metadata.num_rows} rows, as it says itself, found {number}")


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        excel = " (Excel: 'CSV UTF-8')" if path.suffix.lower() == ".csv" else ""
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8{excel}") from None


def content(row: object) -> str:
    """A row as text for the quarantine; half a surrogate pair as its escape."""
    try:
        return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode()
    except (RecursionError, ValueError):  # what was just deep enough to be read
        return short(row)


def _object(row: object) -> dict[str, Any] | Unreadable:
    if isinstance(row, dict):
        return row
    hint = "; a file that is a list of rows is named .json" if isinstance(row, list) else ""
    return Unreadable("(row)", "object", f"expected an object, found {type(row).__name__}{hint}")


def _parse(text: str) -> Any:
    """JSON as its standard has it: no NaN, no number beyond all others, no key twice in an object.

    Raises:
        ValueError: what it says is one line.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row:
            raise ValueError(f"duplicate key {short(key)}")
        row[key] = value
    return row


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{short(digits)} is beyond all numbers")
    return number


def detect(row: dict[str, Any]) -> str:
    """The format of a row by its columns: the field's own names; of tables, by those that say something in this row."""
    filled = {key for key, value in row.items() if value is not None and value != ""}  # an empty cell of a CSV file too
    with contextlib.suppress(Unreadable):
        return _detect(filled)
    return _detect(set(row))


def _detect(keys: set[str]) -> str:
    if {"conversations", "chosen", "rejected"} <= keys:
        return "ranking"
    if {"chosen", "rejected"} <= keys and keys & {"prompt", "instruction", "question"}:
        return "preference"
    if {"responses", "ratings"} <= keys:
        return "ratings"
    if "messages" in keys:
        if beside := sorted(keys & {"chosen", "rejected"}):
            raise Unreadable(beside[0], "format", "beside `messages`: name the column of the prompt `prompt`")
        return "messages"
    if "conversations" in keys:
        return "sharegpt"
    if {"prompt", "completion"} <= keys:
        return "completion"
    if {"instruction", "output"} <= keys:
        return "alpaca"
    if {"question", "options", "answer"} <= keys:
        return "choice"
    if "question" in keys and ("choices" in keys or {"A", "B"} <= keys):
        raise Unreadable(
            "(row)", "format", "multiple choice: columns `question`, `options` (a list), `answer` (from 0)"
        )
    if "question" in keys:
        answered = sorted(keys & {"answer", "answers", "response", "output", "completion", "solution", "target"})
        if answered:
            raise Unreadable(
                answered[0], "format", "a question with its answer: name the columns `prompt` and `completion`"
            )
        return "question"
    raise Unreadable("(row)", "format", f"columns {short(sorted(map(str, keys)))} are those of no known format")


# What is read of a row: of every one, and of each format. An `id` is not, but says nothing either.
_ALWAYS = frozenset({"id", "concept", "topic", "task", "term", "lay", "license", "wording", "split"})
_READ = {
    form: _ALWAYS | set(columns.split())
    for form, columns in {
        "alpaca": "instruction input output system history",
        "completion": "prompt completion system",
        "messages": "messages system",
        "sharegpt": "conversations system",
        "ranking": "conversations chosen rejected system",
        "ratings": "prompt responses ratings system",
        "choice": "question options answer",
        "question": "question",
    }.items()
}


def _unread(row: dict[str, Any], form: str) -> Iterator[str]:
    """Columns that say something which nobody reads."""
    if form == "preference":
        prompt = next((name for name in ("prompt", "instruction", "question") if row.get(name) is not None), "prompt")
        more = {"instruction", "input", "history"} if prompt == "instruction" else {prompt}
        read = _ALWAYS | more | {"chosen", "rejected", "system"}
    else:
        read = _READ[form]
    return (name for name in row.keys() - read if row[name] is not None and row[name] != "" and row[name] != [])


def convert(row: dict[str, Any], source: Source, unread: dict[str, int] | None = None) -> dict[str, Any]:
    """A row of any known format in canonical columns (`id`, `line` and `source` are the caller's).

    Args:
        unread: takes the number of rows in which a column is not read.

    Raises:
        Unreadable: naming the column at fault.
    """
    form = detect(row) if source.format == "auto" else source.format
    out: dict[str, Any] = {"kind": source.kind}
    if form == "alpaca":
        out["messages"] = [*_instruction(row), *_turns(("assistant", _string(row, "output")))]
    elif form == "completion":
        prompt = _prompt(row, "prompt")
        out["messages"] = _alternating("completion", [*prompt, *_answer(row, "completion", prompt)])
    elif form in ("messages", "sharegpt"):
        out["messages"] = _conversation(
            row, "messages" if form == "messages" else "conversations", _optional(row, "system")
        )
    elif form in ("preference", "ranking"):
        out["kind"] = "preference"
        if form == "ranking":
            out["messages"] = _conversation(row, "conversations", _optional(row, "system"))
        elif row.get("prompt") is not None:
            out["messages"] = _prompt(row, "prompt")
        elif row.get("instruction") is not None:
            out["messages"] = _instruction(row)
        else:
            out["messages"] = _prompt(row, "question" if row.get("question") is not None else "prompt")
        out["chosen"], out["rejected"] = (
            _answer(row, side, out["messages"])[-1]["content"] for side in ("chosen", "rejected")
        )
    elif form == "ratings":
        out["kind"] = "ratings"
        out["messages"] = _prompt(row, "prompt")
        out["responses"] = [_word(r, "responses") for r in _json_list(row, "responses")]
        out["ratings"] = [_rating(r, len(out["responses"])) for r in _json_list(row, "ratings")]
    elif form == "choice":
        out["kind"] = "choice"
        out["messages"] = _turns(("user", _string(row, "question")))
        out["options"] = [_word(o, "options") for o in _json_list(row, "options")]
        try:
            out["answer"] = _integer(row["answer"])
        except ValueError:
            raise Unreadable(
                "answer", "type", f"expected the index of an option (from 0), found {short(row['answer'])}"
            ) from None
        if len(set(out["options"])) < max(2, len(out["options"])):
            raise Unreadable("options", "choice", "expected two or more different options and the index of one")
        if not 0 <= out["answer"] < len(out["options"]):
            kind = Beyond if out["answer"] == len(out["options"]) else Unreadable
            raise kind("answer", "choice", f"answer {out['answer']} of {len(out['options'])} options, counted from 0")
    elif form == "question":
        out["kind"] = "question"
        out["messages"] = _turns(("user", _string(row, "question")))
    if out["kind"] in ("chat", "replay") and (not out["messages"] or out["messages"][-1]["role"] != "assistant"):
        raise Unreadable("messages", "roles", "the last turn must be the assistant's answer")
    for name in ("concept", "topic", "task", "term", "lay", "license"):
        number = name == "concept" and isinstance(row.get(name), int | float)  # an id of the user's own
        out[name] = (_word(row[name], name) if number else _optional(row, name)) or None
        if len(out[name] or "") > LONGEST_NAME:
            raise Unreadable(name, "length", f"expected at most {LONGEST_NAME} characters, found {len(out[name])}")
    for name in ("wording", "split"):
        out[name] = _optional(row, name) or None
        if out[name] not in (None, *SIDES):  # taken for none, a test row would be trained on
            raise Unreadable(name, "split", f"expected train, validation or test, found {short(out[name])}")
    out["topic"] = out["topic"] or source.topic
    out["split"] = out["split"] or source.side
    if out["kind"] == "chat" and out["task"] not in TASKS:  # a data set's own word, which nothing here asks for
        out["task"] = "answer"
    elif out["kind"] == "question":  # its topic says what is right, or that of its source
        out["task"] = next((topic for topic in (out["topic"], source.topic) if topic in UNANSWERED), None)
        if out["task"] is None:
            expected = (
                f"expected {' or '.join(UNANSWERED)}, found {short(out['topic'])}, of a question without an answer"
            )
            raise Unreadable("topic", "topic", f"{expected}; one with its answer has columns `prompt` and `completion`")
    out["task"] = out["task"] or out["kind"]
    out["license"] = out["license"] or source.license
    if unread is not None:
        for name in _unread(row, form):
            if name in unread or len(unread) < MOST_NAMES:
                unread[name] = unread.get(name, 0) + 1
    normal, size = {}, 0
    for key, value in out.items():
        normal[key], length = _nfc(key, value)
        size += length
    if size > LONGEST_ROW:
        raise Unreadable("(row)", "length", f"{size} characters of text, at most {LONGEST_ROW} are taken")
    if not normal["concept"]:
        asked = " ".join(m["content"] for m in normal["messages"] if m["role"] == "user")
        normal["concept"] = hashlib.sha256(" ".join(asked.casefold().split()).encode()).hexdigest()[:16]
    return normal


def _nfc(column: str, value: Any) -> tuple[Any, int]:
    """`value` with its texts in Unicode normal form C and their lines ended by newlines alone, and their characters."""
    if isinstance(value, str):
        value = value.replace("\r\n", "\n").replace("\r", "\n")
        if value.isascii():
            return value, len(value)
        if half := re.search("[\ud800-\udfff]", value):
            reason = f"U+{ord(half[0]):04X} is half a surrogate pair, at character {half.start() + 1}"
            raise Unreadable(column, "surrogate", reason)
        if many := _marks().search(value):
            raise Unreadable(column, "marks", f"more than {MARKS} combining marks at character {many.start() + 1}")
        return unicodedata.normalize("NFC", value), len(value)
    if isinstance(value, list | dict):
        items = [_nfc(column, item) for item in (value.values() if isinstance(value, dict) else value)]
        parts = [part for part, _ in items]
        return dict(zip(value, parts, strict=True)) if isinstance(value, dict) else parts, sum(n for _, n in items)
    return value, 0


def bare(text: str) -> str:
    """A prompt (in lower case, single spaces) whatever its width and the punctuation around it; of marks alone, they are left."""
    if not text.isascii() and (wide := unicodedata.normalize("NFKC", text)) != text:
        text = " ".join(wide.casefold().split())
    before, behind = _edges()
    start, stop = 0, len(text)
    while stop and text[stop - 1] in behind:
        stop -= 1
    while start < stop and text[start] in before:
        start += 1
    return text[start:stop] or text


@functools.cache
def _edges() -> list[frozenset[str]]:
    return [frozenset(re.findall(edge, "".join(map(chr, range(0x1FB00))))) for edge in (BEFORE, BEHIND)]


@functools.cache
def _marks() -> re.Pattern[str]:
    """More than `MARKS` combining characters in a row."""
    marks = "".join(chr(code) for code in range(0x300, 0x1F000) if unicodedata.combining(chr(code)))
    return re.compile(f"[{marks}]{{{MARKS + 1}}}")


def _optional(row: dict[str, Any], column: str) -> str:
    """A text that may be missing or null."""
    return "" if row.get(column) is None else _string(row, column)


def _word(value: Any, column: str) -> str:
    """A text, or a number that stands for one."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise Unreadable(column, "type", f"expected text, found {type(value).__name__ if value is not None else 'nothing'}")


def _integer(value: Any) -> int:
    """A whole number, or a text of one (a CSV cell). Raises: ValueError"""
    if isinstance(value, bool) or not isinstance(value, int | float | str) or value != value:
        raise ValueError(value)
    number = int(value) if not isinstance(value, float) or value.is_integer() else None
    if number is None:
        raise ValueError(value)
    return number


def _string(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise Unreadable(
            column, "type", f"expected text, found {type(value).__name__ if value is not None else 'nothing'}"
        )
    return value


def _turns(*turns: tuple[str, Any]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": content}
        for role, content in turns
        if isinstance(content, str) and (content.strip() or role != "system")
    ]


def _json_list(row: dict[str, Any], column: str) -> list[Any]:
    value = row.get(column)
    example = ' such as ["one", "two"]' if column in ("options", "responses") else ""
    if isinstance(value, str):  # a CSV cell
        try:
            value = _parse(value)
        except ValueError as error:
            raise Unreadable(column, "json", f"expected a JSON list{example}: {error}") from None
    if not isinstance(value, list):
        raise Unreadable(column, "type", f"expected a list{example}, found {type(value).__name__}")
    return value


def _conversation(row: dict[str, Any], column: str, system: str = "") -> list[dict[str, str]]:
    turns = []
    for index, turn in enumerate(_json_list(row, column)):
        if not isinstance(turn, dict):
            raise Unreadable(column, "turn", f"turn {index + 1}: expected an object, found {type(turn).__name__}")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise Unreadable(
                column, "role", f"turn {index + 1}: unknown role {short(role)}, known are {', '.join(ROLES)}"
            )
        if turn.get("tool_calls"):
            raise Unreadable(column, "turn", f"turn {index + 1}: tool calls are not read")
        if turn.get("function_call"):
            raise Unreadable(column, "turn", f"turn {index + 1}: function calls are not read")
        if turn.get("weight") == 0:
            raise Unreadable(
                column, "turn", f"turn {index + 1}: an answer that is not to be trained (`weight: 0`) would be"
            )
        if not isinstance(content, str):
            raise Unreadable(column, "type", f"turn {index + 1}: expected text, found {type(content).__name__}")
        if ROLES[role] != "system" or content.strip():  # an empty one would stand in the way of `template.system`
            turns.append({"role": ROLES[role], "content": content})
    if system and turns and turns[0]["role"] == "system" and turns[0]["content"] != system:
        raise Unreadable("system", "roles", f"another system message than the one in {column}")
    if system and turns and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    return _alternating(column, turns)


def _alternating(column: str, turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """The turns as given.

    Raises:
        Unreadable: they are not user and assistant in turn, with a system message first or not at all.
    """
    spoken = [turn["role"] for turn in turns if turn["role"] != "system"]
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"] * (len(spoken) % 2):
        raise Unreadable(column, "roles", "expected user and assistant in turn, the user first")
    if any(turn["role"] == "system" for turn in turns[1:]):
        raise Unreadable(column, "roles", "a system message stands first or not at all")
    return turns


def _instruction(row: dict[str, Any]) -> list[dict[str, str]]:
    """ "Instruction-Input-Response": the input stands below the instruction in one user turn."""
    asked, extra = _string(row, "instruction"), _optional(row, "input")
    if row.get("history"):
        raise Unreadable("history", "format", "earlier turns are not read: write the row as `messages`")
    return _turns(("system", _optional(row, "system")), ("user", f"{asked}\n\n{extra}" if extra.strip() else asked))


def _cell(row: dict[str, Any], column: str) -> Any:
    """The value of a column; a text may hold messages, as a cell of a CSV file has to.

    Messages are what has a role in every turn: an answer may well be JSON of something else, and stays a text.

    Raises:
        Unreadable: it holds messages and is no JSON: Python's own spelling of a list, or cut off by a spreadsheet.
    """
    value = row.get(column)
    if not isinstance(value, str) or not MESSAGES.match(value):
        return value
    try:
        found = _parse(value)
    except ValueError as error:
        if _is_broken(value, isinstance(row, Cells)):
            raise Unreadable(column, "json", f"expected messages as JSON: {error}") from None
        return value
    turns = found if isinstance(found, list) else [found]
    return found if all(map(_is_turn, turns)) else value


def _is_turn(turn: Any) -> bool:
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return isinstance(role, str) and role in ROLES and bool({"content", "value"} & set(turn))


def _is_broken(text: str, cell: bool) -> bool:
    """Whether a text that begins as messages do, and is no JSON, was meant as such; a `cell` may be cut off."""
    several, named = text.lstrip().startswith("["), ROLE.search(text)
    if re.search(r"\}\s*\]\s*$" if several else r"\}\s*$", text):
        return bool(named)
    if not cell:
        return False
    if several:  # cut off in its first turn, the role may be lost
        return not re.search(r"\}\s*\]", text) and bool(named or re.match(r"""\s*\[\s*\{\s*['"]content""", text))
    return "}" not in text and bool(named)


def _prompt(row: dict[str, Any], column: str) -> list[dict[str, str]]:
    """A prompt as text or as messages, with the row's system message."""
    value, system = _cell(row, column), _optional(row, "system")
    if isinstance(value, list):
        return _conversation({column: value}, column, system)
    return _turns(("system", system), ("user", _string(row, column)))


def _answer(row: dict[str, Any], column: str, asked: list[dict[str, str]]) -> list[dict[str, str]]:
    """An answer as text, as one message, as a list of one, or of all turns, `asked` among them."""
    value = _cell(row, column)
    if (
        isinstance(value, list)
        and len(value) > 1
        and all(isinstance(t, dict) and {"role", "from"} & set(t) for t in value)
    ):
        turns = _conversation({column: value}, column)
        spoken = [[turn for turn in part if turn["role"] != "system"] for part in (turns[:-1], asked)]
        if spoken[0] != spoken[1]:
            raise Unreadable(column, "turn", "expected one answer, or all turns with the prompt's before it")
        value = value[-1:]
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        role = value.get("role", value.get("from"))
        if role is not None and ROLES.get(str(role)) != "assistant":
            raise Unreadable(column, "role", f"expected the assistant's message, found {short(role)}'s")
        value = value.get("content", value.get("value"))
    if not isinstance(value, str):
        raise Unreadable(column, "type", f"expected text or one message, found {type(value).__name__}")
    return _turns(("assistant", value))


def _rating(value: Any, responses: int) -> dict[str, Any]:
    try:
        response, score = _integer(value["response"]), float(value["score"])
        annotator = _word(value["annotator"], "ratings")
    except (TypeError, KeyError, ValueError, OverflowError):
        raise Unreadable("ratings", "rating", "expected {annotator, response, score}") from None
    if not 0 <= response < responses or not math.isfinite(score):
        raise Unreadable("ratings", "rating", f"expected response in 0 … {responses - 1} and a number as score")
    return {"annotator": annotator, "response": response, "score": score}
