"""Canonical records: their schema, reading sources of every common format, and Parquet that is the same byte for byte.

One table holds all kinds of rows. `kind` is

- `chat`: a conversation that ends with the assistant's answer; trained on, or asked in a test;
- `replay`: general chat, mixed into training against forgetting;
- `question`: a conversation that ends with the user; asked in a test, and a prompt for composed preference pairs;
- `choice`: a multiple-choice item of the general test, `options` and `answer` (the right option's index);
- `preference`: a prompt with a `chosen` and a `rejected` answer;
- `ratings`: a prompt with several `responses`, each rated by several annotators.
"""

import csv
import hashlib
import io
import json
import math
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandera.polars as pa
import polars as pl

from tasks.params import Source, UserError

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
    "wording": pl.String(),  # train, validation, test; null: any
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
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
LONGEST_LINE = 20_000_000  # characters; a longer line is quarantined, not parsed


def schema() -> pa.DataFrameSchema:
    """Column types and the values that every stage may rely on."""
    columns = {name: pa.Column(dtype, nullable=name not in _REQUIRED) for name, dtype in RECORD.items()}
    columns["id"] = pa.Column(pl.String, pa.Check.str_matches(r"^[0-9a-f]{16}$"), unique=True)
    columns["kind"] = pa.Column(pl.String, pa.Check.isin(KINDS))
    columns["line"] = pa.Column(pl.Int64, pa.Check.ge(1))
    return pa.DataFrameSchema(columns, strict=True, ordered=True)


_REQUIRED = {"id", "kind", "source", "line", "license", "concept", "topic", "task", "messages"}


def frame(rows: Iterable[dict[str, Any]]) -> pl.DataFrame:
    """Rows as a table with every column of `RECORD`, an id for each, in the order given."""
    full, seen = [], dict[str, int]()
    for row in rows:
        identifier = row.get("id") or identify(row)
        seen[identifier] = seen.get(identifier, 0) + 1
        if seen[identifier] > 1:  # an exact copy within a source: an id of its own, for the quarantine to name
            identifier = hashlib.sha256(f"{identifier} {seen[identifier]}".encode()).hexdigest()[:16]
        full.append({name: row.get(name) for name in RECORD} | {"id": identifier})
    return pl.DataFrame(full, schema=RECORD, orient="row")


def identify(row: dict[str, Any]) -> str:
    """Stable id of a row: a hash of what it says and where it is from, not of where it stands."""
    said = {
        k: row.get(k) for k in ("kind", "source", "messages", "options", "chosen", "rejected", "responses", "ratings")
    }
    return hashlib.sha256(
        json.dumps(said, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ).hexdigest()[:16]


def write(table: pl.DataFrame, path: Path) -> None:
    """Parquet; same rows, same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table.write_parquet(path, compression="zstd", statistics=False)


def read(path: Path) -> pl.DataFrame:
    """A Parquet table of records.

    Raises:
        UserError: not there, or not Parquet.
    """
    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.ComputeError) as error:
        raise UserError(f"{path}: can't be read as Parquet: {error}") from None


def write_jsonl(rows: Iterable[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


class Unreadable(ValueError):
    """A row that can't be parsed or has no known form; `column` names the culprit."""

    def __init__(self, column: str, check: str, reason: str) -> None:
        super().__init__(reason)
        self.column, self.check = column, check


Parsed = tuple[int, dict[str, Any] | Unreadable, str]  # line, row or what is wrong, original content


def rows_of_file(path: Path) -> Iterator[Parsed]:
    """Rows of a JSONL, JSON, CSV or Parquet file, unreadable ones included.

    Raises:
        UserError: the file as a whole can't be read.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            for number, row in enumerate(pl.read_parquet(path).iter_rows(named=True), start=1):
                yield number, row, json.dumps(row, ensure_ascii=False, default=str)
            return
        raw = path.read_bytes()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    if suffix in (".jsonl", ".ndjson"):
        for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
            if line.strip():
                yield number, *_json_line(line)
    elif suffix == ".json":
        text = _text(raw, path)
        try:
            data = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(data, list):
            raise UserError(
                f"{path}: expected a list of rows, found {type(data).__name__}; for one row a line, name it .jsonl"
            )
        for number, row in enumerate(data, start=1):
            content = json.dumps(row, ensure_ascii=False)
            wrong = Unreadable("(row)", "object", f"expected an object, found {type(row).__name__}")
            yield number, row if isinstance(row, dict) else wrong, content
    elif suffix == ".csv":
        try:
            reader = csv.DictReader(io.StringIO(_text(raw, path), newline=""), strict=True, restkey="(extra)")
            for row in reader:
                content = json.dumps(row, ensure_ascii=False)
                if "(extra)" in row or None in row.values():
                    found = Unreadable(
                        "(row)", "columns", f"expected {len(reader.fieldnames or [])} columns, found another number"
                    )
                    yield reader.line_num, found, content
                else:
                    yield reader.line_num, row, content
        except csv.Error as error:
            raise UserError(f"{path}: not valid CSV: {error}") from None
    else:
        raise UserError(f"{path}: unknown kind of file; known are .jsonl, .json, .csv, .parquet")


def _text(raw: bytes, path: Path) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"duplicate key {next(k for k in keys if keys.count(k) > 1)!r}")
    return dict(pairs)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _json_line(line: bytes) -> tuple[dict[str, Any] | Unreadable, str]:
    content = line.decode("utf-8", "backslashreplace").rstrip("\r")
    if len(line) > LONGEST_LINE:
        return Unreadable("(row)", "length", f"line of {len(line)} bytes, at most {LONGEST_LINE} are read"), content[
            :10_000
        ]
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return Unreadable("(row)", "encoding", f"not UTF-8 at byte {error.start}"), content
    except (ValueError, RecursionError) as error:
        return Unreadable("(row)", "json", f"not valid JSON: {error}"), content
    if not isinstance(row, dict):
        return Unreadable("(row)", "object", f"expected an object, found {type(row).__name__}"), content
    return row, content


def detect(row: dict[str, Any]) -> str:
    """The format of a row by its columns: the field's own names."""
    keys = set(row)
    if {"conversations", "chosen", "rejected"} <= keys:
        return "ranking"
    if {"prompt", "chosen", "rejected"} <= keys or {"instruction", "chosen", "rejected"} <= keys:
        return "preference"
    if {"responses", "ratings"} <= keys:
        return "ratings"
    if "messages" in keys:
        return "messages"
    if "conversations" in keys:
        return "sharegpt"
    if {"prompt", "completion"} <= keys:
        return "completion"
    if {"instruction", "output"} <= keys:
        return "alpaca"
    if {"question", "options", "answer"} <= keys:
        return "choice"
    if "question" in keys:
        return "question"
    raise Unreadable("(row)", "format", f"columns {sorted(keys)} are those of no known format")


def convert(row: dict[str, Any], source: Source) -> dict[str, Any]:
    """A row of any known format in canonical columns (`id`, `line` and `source` are the caller's).

    Raises:
        Unreadable: naming the column at fault.
    """
    form = detect(row) if source.format == "auto" else source.format
    out: dict[str, Any] = {"kind": source.kind}
    if form == "alpaca":
        # "Instruction-Input-Response": the input stands below the instruction in one user turn
        asked = _string(row, "instruction")
        extra = row.get("input") or ""
        if not isinstance(extra, str):
            raise Unreadable("input", "type", f"expected text, found {type(extra).__name__}")
        out["messages"] = _turns(
            ("system", row.get("system")),
            ("user", f"{asked}\n\n{extra}" if extra.strip() else asked),
            ("assistant", _string(row, "output")),
        )
    elif form == "completion":
        out["messages"] = [*_prompt(row, "prompt"), *_answer(row, "completion")]
    elif form in ("messages", "sharegpt"):
        out["messages"] = _conversation(row, "messages" if form == "messages" else "conversations", row.get("system"))
    elif form in ("preference", "ranking"):
        out["kind"] = "preference"
        if form == "ranking":
            out["messages"] = _conversation(row, "conversations", row.get("system"))
        elif "prompt" in row:
            out["messages"] = _prompt(row, "prompt")
        else:
            out["messages"] = _turns(("system", row.get("system")), ("user", _string(row, "instruction")))
        out["chosen"], out["rejected"] = (_answer(row, side)[-1]["content"] for side in ("chosen", "rejected"))
    elif form == "ratings":
        out["kind"] = "ratings"
        out["messages"] = _prompt(row, "prompt")
        out["responses"] = [str(r) for r in _json_list(row, "responses")]
        out["ratings"] = [_rating(r, len(out["responses"])) for r in _json_list(row, "ratings")]
    elif form == "choice":
        out["kind"] = "choice"
        out["messages"] = _turns(("user", _string(row, "question")))
        out["options"] = [str(o) for o in _json_list(row, "options")]
        try:
            out["answer"] = int(row["answer"])
        except (TypeError, ValueError):
            raise Unreadable("answer", "type", f"expected the index of an option, found {row['answer']!r}") from None
        if not 0 <= out["answer"] < len(out["options"]) or len(set(out["options"])) < len(out["options"]):
            raise Unreadable("options", "choice", "expected different options and the index of one")
    elif form == "question":
        out["kind"] = "question"
        out["messages"] = _turns(("user", _string(row, "question")))
    if out["kind"] in ("chat", "replay") and (not out["messages"] or out["messages"][-1]["role"] != "assistant"):
        raise Unreadable("messages", "roles", "the last turn must be the assistant's answer")
    for name in ("concept", "topic", "task", "term", "lay", "license"):
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise Unreadable(name, "type", f"expected text, found {type(value).__name__}")
        out[name] = value or None
    wording = row.get("wording", row.get("split"))
    out["wording"] = wording if wording in ("train", "validation", "test") else None
    out["topic"] = out["topic"] or source.topic
    out["task"] = out["task"] or (
        "answer" if out["kind"] == "chat" else source.topic if out["kind"] == "question" else out["kind"]
    )
    out["license"] = out["license"] or source.license
    asked = " ".join(m["content"] for m in out["messages"] if m["role"] == "user")
    out["concept"] = (
        out["concept"]
        or hashlib.sha256(" ".join(asked.casefold().split()).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    )
    return {key: _nfc(value) for key, value in out.items()}


def _nfc(value: Any) -> Any:
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    if isinstance(value, list):
        return [_nfc(item) for item in value]
    if isinstance(value, dict):
        return {key: _nfc(item) for key, item in value.items()}
    return value


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
        if isinstance(content, str) and (content or role != "system")
    ]


def _json_list(row: dict[str, Any], column: str) -> list[Any]:
    value = row.get(column)
    if isinstance(value, str):  # a CSV cell
        try:
            value = json.loads(value)
        except ValueError:
            raise Unreadable(column, "json", "expected a JSON list") from None
    if not isinstance(value, list):
        raise Unreadable(column, "type", f"expected a list, found {type(value).__name__}")
    return value


def _conversation(row: dict[str, Any], column: str, system: Any = None) -> list[dict[str, str]]:
    turns = []
    for index, turn in enumerate(_json_list(row, column)):
        if not isinstance(turn, dict):
            raise Unreadable(column, "turn", f"turn {index + 1}: expected an object, found {type(turn).__name__}")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise Unreadable(column, "role", f"turn {index + 1}: unknown role {role!r}, known are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise Unreadable(column, "type", f"turn {index + 1}: expected text, found {type(content).__name__}")
        turns.append({"role": ROLES[role], "content": content})
    spoken = [t["role"] for t in turns if t["role"] != "system"]
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"] * (len(spoken) % 2):
        raise Unreadable(column, "roles", "expected user and assistant in turn, the user first")
    if any(t["role"] == "system" for t in turns[1:]):
        raise Unreadable(column, "roles", "a system message stands first or not at all")
    if isinstance(system, str) and system and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    return turns


def _prompt(row: dict[str, Any], column: str) -> list[dict[str, str]]:
    """A prompt as text or as messages."""
    if isinstance(row.get(column), list):
        return _conversation(row, column)
    return _turns(("user", _string(row, column)))


def _answer(row: dict[str, Any], column: str) -> list[dict[str, str]]:
    """An answer as text, as one message, or as a list of one."""
    value = row.get(column)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        value = value.get("content", value.get("value"))
    if not isinstance(value, str):
        raise Unreadable(column, "type", f"expected text or one message, found {type(value).__name__}")
    return _turns(("assistant", value))


def _rating(value: Any, responses: int) -> dict[str, Any]:
    try:
        response, score = int(value["response"]), float(value["score"])
        annotator = str(value["annotator"])
    except (TypeError, KeyError, ValueError):
        raise Unreadable("ratings", "rating", "expected {annotator, response, score}") from None
    if not 0 <= response < responses or not math.isfinite(score):
        raise Unreadable("ratings", "rating", f"expected response in 0 … {responses - 1} and a number as score")
    return {"annotator": annotator, "response": response, "score": score}
