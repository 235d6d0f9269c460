"""validate: what must not be trained on goes to quarantine, with the reasons and the original row.

Rows in = rows out + rows quarantined, always. Checks come in three layers: the columns of a record, the texts of a row
(Unicode, control tokens, length, …), rows against each other (contamination, copies, contradictions). The last layer
sees only rows that passed the first two, so that a broken copy never displaces a sound one. Near copies are found by
MinHash and locality-sensitive hashing (Broder, "On the resemblance and containment of documents", 1997; Leskovec
et al., "Mining of Massive Datasets", ch. 3) and confirmed by their exact Jaccard similarity.

Rows go through in pieces. What is kept of each are hashes, by which rows are compared; texts are looked at again only
where the hashes say that they may be alike.
"""

import json
import re
import string
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks import stage
from tasks.params import UserError, Validate

if TYPE_CHECKING:
    import numpy as np
    import pandera.polars as pa
    import polars as pl
    from tokenizers import Tokenizer

    Array = np.ndarray[Any, np.dtype[Any]]

Row = dict[str, Any]

# Rust's and Python's regex engines read these alike: a character stands for itself.
CHARACTERS = {
    "control_character": "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]",  # C0 and C1 but for tab, line feed, carriage return
    "replacement_character": "\ufffd",  # what a wrong decoding leaves behind
    "bidirectional_override": "[\u202a-\u202e\u2066-\u2069]",  # shows a reader another text than the model gets
    "zero_width": "[\u200b\u200e\u200f\u2060\ufeff]",  # Persian, Indic scripts and emoji need U+200C and U+200D
}
# Separators, controls and formats, and what is drawn as nothing: fillers of Hangul, braille blank, variation selectors.
BLANK = r"^[\s\p{Z}\p{Cc}\p{Cf}\x{34F}\x{115F}\x{1160}\x{17B4}\x{17B5}\x{2800}\x{3164}\x{FE00}-\x{FE0F}\x{FFA0}]*$"
# Control strings of the common chat templates: a text that holds one was once rendered, or attacks a template.
FOREIGN = (
    r"<[|｜][A-Za-z0-9_▁.:/-]{1,40}[|｜]>|\[\|[A-Za-z0-9_]{1,40}\|\]|<(?:start|end)_of_turn>|</s>|<bos>|<eos>"
    r"|\[/?INST\]|<</?SYS>>|\[/?SYSTEM_PROMPT\]|\[/?AVAILABLE_TOOLS\]|\[TOOL_CALLS\]|\[gMASK\]"
)
# Scripts without spaces, and Hangul, whose particles cling to the word: there a word is no unit to compare by.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3040-\u318f\u3400-\u9fff\uac00-\ud7af]")
EDGES = string.punctuation + "¿¡«»‘’“”…–—。、，！？：；「」『』（）·।؟،"
# What a web page leaves behind in a text; an answer about HTML has it too.
HTML = r"<br ?/?>|</?(?:p|div|span|font|strong|em|ul|ol|li|table|tr|td)(?: [ -;=?-~]{0,200})?>|&(?:nbsp|amp|lt|gt|quot|#[0-9]{2,4});"
PERMUTATIONS = 128
# Kept texts per bucket, and comparisons per text: the work stays linear where thousands of texts share a template and
# differ by just more than the threshold. What a real pair shares besides the template meets in other buckets.
CANDIDATES = 8


class Failure(NamedTuple):
    row: int  # position in the table of records
    column: str
    check: str
    reason: str


def run(
    records: Path, unreadable: Path, base: Path, out: Path, quarantine: Path, metrics: Path, params: Validate
) -> str:
    """Write the sound records to `out`, in their order, and every other row, with all that is wrong, to `quarantine`.

    A line of `quarantine` has `source`, `line`, `column`, `check`, `reason` (of the first failure), `also` (the further
    ones) and `content`: the canonical row, or the original text of what `ingest` could not read. `base` is read for its
    tokenizer only. Lengths are tokens of the texts alone: what the chat template adds is counted by `template`.

    Raises:
        UserError: more than `params.max_quarantine` of the rows are rejected, all of a source, or no row is left; `quarantine`
            and `metrics` are written nevertheless.
    """
    import numpy as np
    import pandera.polars as pa
    import polars as pl
    from tqdm import tqdm

    from tasks import records as recs

    unread = Counter(row["source"] for row in _unread(unreadable))
    tokenizer, specials = _tokenizer(base)
    found = defaultdict[int, list[Failure]](list)
    lights: list[pl.DataFrame] = []
    counted: list[Array] = []
    prints: list[Prints] = []
    pages, tag = 0, ""
    with tqdm(desc="rows", disable=None, delay=3, leave=False) as bar:
        for start, table in _pieces(records):
            failures, tokens, html = _alone(table, records, tokenizer, specials, params.max_tokens)
            broken = {failure.row for failure in failures}
            sound = ((start + i, row) for i, row in enumerate(table.iter_rows(named=True)) if i not in broken)
            prints.append(_prints(sound, params.near_duplicate))
            words = pl.col("source", "kind", "topic").cast(pl.Categorical)
            lights.append(
                table.select(pl.col("id").str.to_integer(base=16, dtype=pl.UInt64, strict=False), "line", words)
            )
            counted.append(np.array(tokens, np.int64))
            pages, tag = pages + html[0], tag or html[1]
            for failure in failures:
                found[start + failure.row].append(failure)
            bar.update(table.height)
    light = pl.concat(lights)

    def texts(wanted: Set[int]) -> Iterator[tuple[int, Row]]:
        for start, table in _pieces(records):
            at = [i for i in range(table.height) if start + i in wanted]
            yield from zip((start + i for i in at), table[at].iter_rows(named=True), strict=True)

    for failure in _compared(_joined(prints), light, texts, params.near_duplicate):
        found[failure.row].append(failure)
    passed = np.ones(light.height, bool)
    passed[list(found)] = False
    kept = light.filter(passed).with_columns(pl.col("kind", "topic").cast(pl.String))
    rows, out_of_it = light.height + unread.total(), len(found) + unread.total()
    assert kept.height + out_of_it == rows, f"{rows} rows in, {kept.height} out, {out_of_it} quarantined"

    failed, first, lost = Counter[str](), dict[str, str](), Counter[str | None]()
    why = defaultdict[str | None, dict[str, Row]](dict)  # source: check: the first row that fails it

    def rejected() -> Iterator[Row]:
        sound = (_quarantined(row, found[i]) for i, row in texts(found.keys()))
        for row in chain(sound, _unread(unreadable)):
            lost[row["source"]] += 1
            why[row["source"]].setdefault(row["check"], {"line": row["line"], "reason": row["reason"]})
            for check in {row["check"], *(other["check"] for other in row["also"])}:
                failed[check] += 1
                first.setdefault(check, _where(row))
            yield row

    recs.write_jsonl(rejected(), quarantine)
    checks = sorted(failed.items(), key=lambda item: (-item[1], item[0]))
    share = out_of_it / rows if rows else 0.0
    topics, warnings = _topics(kept, params.max_topic_share)
    sources = Counter[str | None](light["source"]) + unread
    gone = [source for source in sources if lost[source] == sources[source]]
    copies = [source for source in gone if why[source].keys() <= {"duplicate", "near_duplicate"}]
    if pages:
        warnings.append(f"warning: {pages} row{'s' * (pages > 1)} hold{'s' * (pages == 1)} HTML such as {tag}")
    warnings += [f"warning: {source}: all {sources[source]} rows are copies of others" for source in copies]
    lengths = np.sort(np.concatenate(counted)[passed]).tolist() or [0]
    counts = {
        "rows_in": rows,
        "rows_out": kept.height,
        "quarantined": out_of_it,
        "quarantined_share": round(share, 6),
        "checks": dict(checks),  # rows that fail it, first or not
        "sources": {str(s): {"rows_in": sources[s], "quarantined": lost[s]} for s in sorted(sources, key=str)},
        "kinds": dict(kept["kind"].value_counts().sort("kind").iter_rows()),
        "topics": topics,
        "tokens": {name: lengths[int(q * (len(lengths) - 1))] for name, q in (("p50", 0.5), ("p95", 0.95), ("max", 1))},
        "warnings": warnings,
    }
    metrics.parent.mkdir(parents=True, exist_ok=True)
    metrics.write_text(json.dumps(counts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    said = f"{out_of_it} of {rows} rows ({share:.2%}) quarantined"
    if kept.is_empty() or share > params.max_quarantine:
        limit = (
            "no row is left" if kept.is_empty() else f"at most {params.max_quarantine:.2%} (validate.max_quarantine)"
        )
        worst = ", ".join(f"{check} {count} (as {first[check]})" for check, count in checks[:3])
        raise UserError(f"{said}, {limit}: {worst or 'no rows came in'}; look at {quarantine}")
    # a test of nine rows is lost in thousands of others; where all may fail, nothing is meant to stop
    for source in gone if params.max_quarantine < 1 else ():
        if source not in copies:
            checks_of = [f"{check} (line {row['line']}: {row['reason']})" for check, row in why[source].items()]
            raise UserError(
                f"{source}: all {sources[source]} rows are quarantined: {', '.join(checks_of[:3])}; look at {quarantine}, "
                "mend the file or take it out of ingest.sources"
            )
    pa.DataFrameSchema({"id": pa.Column(pl.UInt64, unique=True)}).validate(kept.select("id"))
    schema = recs.schema()
    parts = (table.filter(passed[start : start + table.height]) for start, table in _pieces(records))
    recs.write((schema.validate(part) for part in parts), out)
    named = ": " + ", ".join(f"{check} {count}" for check, count in checks) if checks else ""
    return "; ".join([said + named, *warnings])


def _pieces(records: Path) -> Iterator[tuple[int, "pl.DataFrame"]]:
    """The table in pieces, each with the position of its first row."""
    from tasks import records as recs

    start = 0
    for table in recs.chunks(records):
        yield start, table
        start += table.height


def _where(row: Row) -> str:
    return f"{row['source']}:{row['line']}"


def _quarantined(row: Row, failures: list[Failure]) -> Row:
    first, *others = ({"column": f.column, "check": f.check, "reason": f.reason} for f in failures)
    return {"source": row["source"], "line": row["line"], **first, "also": others, "content": row}


def _unread(path: Path) -> Iterator[Row]:
    """What `ingest` could not read, in the form of the quarantine."""
    names = ("source", "line", "column", "check", "reason")
    try:
        with path.open("rb") as file:
            for line in file:
                if line != b"\n":
                    row = json.loads(line)
                    yield {**{name: row[name] for name in names}, "also": [], "content": row["content"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: can't be read as what ingest writes: {error}") from None


def _alone(
    table: "pl.DataFrame", path: Path, tokenizer: "Tokenizer", specials: list[str], max_tokens: int
) -> tuple[list[Failure], list[int], tuple[int, str]]:
    """What is wrong with each row by itself, its tokens, and how many of them hold HTML, such as what."""
    import polars as pl

    failures = _columns(table, path)  # first: the others rely on its columns
    texts = _texts(table)
    tokens = _tokens(table.height, texts, tokenizer, max_tokens)
    failures += _contents(pl.concat([texts, _names(table)]), specials) + _wholes(table, tokens, max_tokens)
    html = texts.filter(pl.col("text").str.contains(HTML))
    tag = re.search(HTML, html["text"][0]) if html.height else None
    return failures, tokens, (html["row"].n_unique(), tag[0] if tag else "")


def _failing(schema: "pa.DataFrameSchema", table: "pl.DataFrame") -> Iterator[Row]:
    """pandera's failure cases, all of them: `index` (null: of no single row), `column`, `check`, `failure_case`."""
    import pandera.polars as pa

    try:
        schema.validate(table, lazy=True)
    except pa.errors.SchemaErrors as error:
        yield from error.failure_cases.iter_rows(named=True)


def _unmet(rules: dict[str, "pl.Expr"], table: "pl.DataFrame") -> Iterator[tuple[int, str]]:
    """(row, rule) wherever a rule does not hold, all of them."""
    import pandera.polars as pa

    checks = [pa.Check(lambda data, e=e: data.lazyframe.select(e), name=n, ignore_na=False) for n, e in rules.items()]
    schema = pa.DataFrameSchema({table.columns[0]: pa.Column(checks=checks)})
    return ((case["index"], case["check"]) for case in _failing(schema, table))


def _columns(table: "pl.DataFrame", path: Path) -> list[Failure]:
    """Values that the schema of records forbids.

    Raises:
        UserError: the table has other columns altogether.
    """
    from tasks import records as recs

    failures = []
    for case in _failing(recs.schema(), table):
        if case["check"] == "field_uniqueness":  # rows of one id say the same: `_compared` keeps the first
            continue
        reason = f"expected {case['check']}, found {case['failure_case']}"
        if case["index"] is None:
            raise UserError(f"{path}: no table of records: {case['column'] or 'columns'}: {reason}")
        failures.append(Failure(case["index"], case["column"], "schema", reason))
    return failures


def _texts(table: "pl.DataFrame") -> "pl.DataFrame":
    """Every text of every row: `row`, `column`, `role` (null outside messages), `text`; a missing one is empty."""
    import polars as pl

    out: list[tuple[int, str, str | None, str]] = []
    for i, row in enumerate(table.iter_rows(named=True)):
        for n, turn in enumerate(row["messages"] or [None]):
            role, text = (turn["role"], turn["content"]) if turn else (None, None)
            out.append((i, f"messages[{n}].content", role or "", text or ""))
        for column, kind in (("options", "choice"), ("responses", "ratings")):
            values = row[column] or ([None] if row["kind"] == kind else [])
            out += [(i, f"{column}[{n}]", None, value or "") for n, value in enumerate(values)]
        for column in ("chosen", "rejected"):
            if row["kind"] == "preference" or row[column] is not None:
                out.append((i, column, None, row[column] or ""))
    columns = {"row": pl.Int64, "column": pl.String, "role": pl.String, "text": pl.String}
    return pl.DataFrame(out, schema=columns, orient="row")


def _names(table: "pl.DataFrame") -> "pl.DataFrame":
    """What a row is called, as `_texts` has it: composed pairs, prompts and reports quote it. None need be there."""
    import polars as pl

    names = ("concept", "topic", "task", "term", "lay", "license")
    rows = table.select(pl.int_range(pl.len()).alias("row"), *names)
    long = rows.unpivot(names, index="row", variable_name="column", value_name="text").drop_nulls("text")
    return long.select("row", "column", pl.lit("system").alias("role"), "text")


def _tokenizer(base: Path) -> tuple["Tokenizer", list[str]]:
    """The tokenizer, without the library that would load torch, and every string that it reads as a control token."""
    from tokenizers import Tokenizer

    path, beside = base / "tokenizer.json", base / "tokenizer_config.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
        added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens") or []
        config = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"{path}: can't be read as a tokenizer: {' '.join(str(error).split())}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    names = [token["content"] for token in added if token["special"]]
    for key, value in config.items():
        if key.endswith("_token"):
            names.append(value)
        elif key in ("additional_special_tokens", "extra_special_tokens"):
            names += value.values() if isinstance(value, dict) else value or []
    found = {name["content"] if isinstance(name, dict) else name for name in names}
    # a config may name a plain character (to pad with "!", say), which no text can do without
    return tokenizer, sorted(name for name in found if isinstance(name, str) and len(name) > 1)


def _tokens(rows: int, texts: "pl.DataFrame", tokenizer: "Tokenizer", most: int) -> list[int]:
    """Tokens of each row: its messages and the longest of what may follow them (an answer, an option, a response).

    A text too long for `most` tokens whatever it says is not tokenised, for that takes 100 times its memory: its count is
    the least that it can be.
    """
    messages, following = [0] * rows, [0] * rows
    longest = max(map(len, tokenizer.get_vocab()), default=1)
    limit = max(100_000, most * longest)  # characters; the floor is for tokenizers with a token for unknown words
    lengths = texts["text"].str.len_chars().to_list()
    places = list(zip(texts["row"], texts["role"], strict=True))
    for start, stop in _chunks([min(length, limit) for length in lengths]):
        part = [text if len(text) <= limit else "" for text in texts["text"][start:stop]]
        encoded = tokenizer.encode_batch_fast(part, add_special_tokens=False)
        for n, encoding in enumerate(encoded, start=start):
            count = len(encoding) if lengths[n] <= limit else max(most + 1, lengths[n] // longest)
            row, role = places[n]
            if role is None:
                following[row] = max(following[row], count)
            else:
                messages[row] += count
    return [a + b for a, b in zip(messages, following, strict=True)]


def _chunks(lengths: list[int], texts: int = 512, characters: int = 1_000_000) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of at most so many texts and, but for one alone, so many characters."""
    start = size = 0
    for n, length in enumerate(lengths):
        if n > start and (n - start == texts or size + length > characters):
            yield start, n
            start, size = n, 0
        size += length
    if lengths:
        yield start, len(lengths)


def _contents(texts: "pl.DataFrame", specials: list[str]) -> list[Failure]:
    """What is wrong within one text."""
    import polars as pl

    patterns = CHARACTERS | {"control_token": "|".join([*map(re.escape, specials), FOREIGN])}
    text = pl.col("text")
    rules = {"empty": ~text.str.contains(BLANK) | pl.col("role").eq_missing("system")}
    rules |= {name: ~text.str.contains(pattern) for name, pattern in patterns.items()}
    # Python's Unicode tables, as in `ingest`: those of another version would disagree on new characters
    rules["not_nfc"] = text.map_elements(lambda said: unicodedata.is_normalized("NFC", said), return_dtype=pl.Boolean)
    reasons = {"empty": "no visible character", "not_nfc": "not in Unicode normal form C"}
    failures = []
    for i, check in _unmet(rules, texts):
        row, column, _, said = texts.row(i)
        if check in patterns:
            match = re.search(patterns[check], said)
            assert match, f"{check}: two regex engines disagree"
            name = unicodedata.name(match[0][0], "CONTROL")
            found = repr(match[0]) if len(match[0]) > 1 else f"U+{ord(match[0]):04X} {name}"
            reasons[check] = f"{found} at character {match.start() + 1}"
        failures.append(Failure(row, column, check, reasons[check]))
    return sorted(failures, key=lambda failure: failure.row)


def _wholes(table: "pl.DataFrame", tokens: list[int], max_tokens: int) -> list[Failure]:
    """What is wrong with a row as a whole."""
    import polars as pl

    answered = pl.col("messages").list.last().struct.field("role").eq_missing("assistant")
    chosen, rejected = (pl.col(side).str.strip_chars() for side in ("chosen", "rejected"))
    rules = {
        "too_long": pl.col("tokens") <= max_tokens,
        "last_turn": answered == pl.col("kind").is_in(["chat", "replay"]),
        "same_answers": chosen.is_null() | chosen.ne_missing(rejected),
    }
    failures = []
    for i, check in _unmet(rules, table.select(pl.Series("tokens", tokens, pl.Int64), pl.all())):
        column, reason = {
            "too_long": ("messages", f"{tokens[i]} tokens, at most {max_tokens} (validate.max_tokens)"),
            "last_turn": ("messages", "chat and replay end with the assistant's turn, all other kinds with the user's"),
            "same_answers": ("rejected", "chosen and rejected are the same text"),
        }[check]
        failures.append(Failure(i, column, check, reason))
    return failures


def _normal(text: str | None) -> str:
    return " ".join((text or "").casefold().split())


def _is_test(row: Row) -> bool:
    side = row["split"] or row["wording"]
    return row["kind"] == "choice" or (side == "test" and row["kind"] in ("chat", "question"))


def _claim(row: Row, every: Sequence[str]) -> tuple[Any, Any]:
    """What is asked, and what is answered: rows that ask the same must answer the same; None where they need not."""
    if row["kind"] == "chat":
        return ("chat", every[:-1]), every[-1]
    if row["kind"] == "choice" and row["answer"] is not None:
        return ("choice", every, sorted(row["options"])), row["options"][row["answer"]]
    if row["kind"] == "preference":
        sides = _normal(row["chosen"]), _normal(row["rejected"])
        return ("preference", every, sorted(sides)), sides[0]
    return None, None


def _turns(row: Row) -> tuple[list[str], list[str]]:
    """All turns, and those that are no system message."""
    every = [_normal(turn["content"]) for turn in row["messages"]]
    return every, [text for text, turn in zip(every, row["messages"], strict=True) if turn["role"] != "system"]


def _prose(row: Row, every: list[str], turns: list[str]) -> tuple[tuple[str, ...], str] | None:
    """What near copies have in common, and the text to compare; None: fixed wordings are alike on purpose.

    Compared are rows of one kind and one system message, which is no part of the text.
    """
    if row["kind"] not in ("chat", "preference") or row["wording"] is not None:
        return None
    said = " ".join([*turns, _normal(row["chosen"]), _normal(row["rejected"])])
    return (row["kind"], *every[: len(every) - len(turns)]), said


class Prints(NamedTuple):
    """What rows are compared by. Two of a million different texts have one hash of 64 bits once in 30 million runs."""

    row: "Array"  # position in the table
    copy: "Array"  # hash of all that it says
    claim: "Array"  # hash of what it asks, 0 where that may be answered in many ways
    answer: "Array"
    asker: "Array"  # position of the row that asks the next
    asked: "Array"  # hash of a prompt: a test's, or every one of a conversation, for all of them are trained on
    test: "Array"  # whether it is a test's
    prose: "Array"  # position of the row that has the next
    bands: "Array"  # hashes of parts of its sketch: near copies have one of them in common


def _hash(value: object) -> int:
    return int.from_bytes(blake2b(repr(value).encode(), digest_size=8).digest(), "little")


def _prints(rows: Iterable[tuple[int, Row]], threshold: float) -> Prints:
    """Of these rows and their positions, in the order given."""
    import numpy as np
    import rensa

    from tasks import records as recs

    whole, prompts, prose = list[tuple[int, ...]](), list[tuple[int, int, bool]](), list[tuple[int, int]]()
    digests = list[list[int]]()
    for i, row in rows:
        every, turns = _turns(row)
        test = _is_test(row)
        more = map(_normal, [*(row["options"] or []), row["chosen"], row["rejected"], *(row["responses"] or [])])
        # a test's copy in training is contamination, and must not cost the test its row
        copy = _hash([row["kind"], test, every, *more, row["answer"], row["ratings"]])
        claim, answer = _claim(row, every)
        whole.append((i, copy, 0 if claim is None else _hash(claim), _hash(answer)))
        bare = [recs.bare(text) for text in (turns[:-1] if row["kind"] in ("chat", "replay") else turns)]
        if test:
            prompts.append((i, _hash(bare), True))
        else:
            prompts += [(i, _hash(bare[:n]), False) for n in range(1, len(bare) + 1, 2)]
        if found := _prose(row, every, turns):
            group, said = found
            sketch = rensa.RMinHash(PERMUTATIONS, 0)
            sketch.update(list(_shingles(said)))
            digests.append(sketch.digest())
            prose.append((i, _hash(group)))
    wholes, asked, named = (
        np.array(part, np.uint64).reshape(-1, columns) for part, columns in ((whole, 4), (prompts, 3), (prose, 2))
    )
    width = _width(threshold)
    sketches = np.array(digests, np.uint64).reshape(-1, PERMUTATIONS // width, width)
    bands = np.repeat(named[:, 1:], PERMUTATIONS // width, axis=1)
    for n in range(width):
        bands = (bands ^ sketches[:, :, n]) * np.uint64(0x9E3779B97F4A7C15)
        bands ^= bands >> np.uint64(32)
    return Prints(
        wholes[:, 0].astype(np.int64), wholes[:, 1], wholes[:, 2], wholes[:, 3],
        asked[:, 0].astype(np.int64), asked[:, 1], asked[:, 2].astype(bool),
        named[:, 0].astype(np.int64), bands.astype(np.uint32),
    )  # fmt: skip


def _joined(parts: list[Prints]) -> Prints:
    """Those of all pieces; `parts` is emptied, for two of each would fill the memory."""
    import numpy as np

    columns = [list(column) for column in zip(*parts, strict=True)]
    parts.clear()
    return Prints(*(np.concatenate(columns.pop(0)) for _ in range(len(columns))))


def _compared(
    prints: Prints, light: "pl.DataFrame", texts: Callable[[Set[int]], Iterator[tuple[int, Row]]], threshold: float
) -> list[Failure]:
    """What is wrong with a row beside others; one that is out already neither displaces nor contradicts another.

    `light` has every row's `source`, `line` and `kind`, `texts` yields those that are asked for, in their order.
    """
    import numpy as np

    failures: list[Failure] = []

    def fail(i: int, check: str, reason: str) -> None:
        failures.append(Failure(int(i), "messages", check, reason))

    def where(i: int) -> str:
        return _where(light.row(int(i), named=True))

    def left(positions: "Array") -> "Array":
        return ~np.isin(positions, [failure.row for failure in failures])

    tests, at = np.unique(prints.asked[prints.test], return_index=True)
    if len(tests):
        testers = prints.asker[prints.test][at]
        place = np.minimum(np.searchsorted(tests, prints.asked), len(tests) - 1)
        leaks = np.flatnonzero(~prints.test & (tests[place] == prints.asked))
        rows, firsts = np.unique(prints.asker[leaks], return_index=True)
        for i, n in zip(rows, place[leaks[firsts]], strict=True):
            fail(i, "contamination", f"asks what the test asks at {where(testers[n])}")

    _, at, inverse = np.unique(prints.copy, return_index=True, return_inverse=True)
    for n in np.flatnonzero(at[inverse] != np.arange(len(inverse))):
        fail(prints.row[n], "duplicate", f"the same text as {where(prints.row[at[inverse[n]]])}")

    claimed = np.flatnonzero(left(prints.row) & (prints.claim != 0))
    claimed = claimed[_repeated(prints.claim[claimed])]
    claimed = claimed[np.argsort(prints.claim[claimed], kind="stable")]
    for group in np.split(claimed, np.flatnonzero(np.diff(prints.claim[claimed])) + 1):
        if len(group) > 1 and len({*prints.answer[group].tolist()}) > 1:
            rows, kind = prints.row[group].tolist(), light["kind"][int(prints.row[group[0]])]
            for i in rows:
                others = [where(j) for j in rows[:6] if j != i][:5]
                rest = f" and {len(rows) - 1 - len(others)} more" if len(rows) - 1 > len(others) else ""
                fail(i, "contradiction", f"the same {kind} prompt is answered otherwise at {', '.join(others)}{rest}")

    still = left(prints.prose)
    bands, alike = prints.bands[still], np.zeros(int(still.sum()), bool)
    for band in bands.T:
        alike |= _repeated(band)
    groups = defaultdict[tuple[str, ...], dict[int, tuple[str, str]]](dict)
    tested = set[int]()
    wanted = {*prints.prose[still][alike].tolist()}
    for i, row in texts(wanted) if wanted else ():
        if found := _prose(row, *_turns(row)):
            common, said = found
            groups[common][i] = said, _said(row)
            if _is_test(row):
                tested.add(i)
    for alike_by in groups.values():
        first = sorted(alike_by, key=lambda i: (i not in tested, i))  # training must not cost a test its row
        for i, (j, similarity) in _near({i: alike_by[i] for i in first}, threshold).items():
            fail(i, "near_duplicate", f"{similarity:.3f} similar to {where(j)}")
    return failures


def _said(row: Row) -> str:
    """What a row teaches: the answer, or both sides of a preference."""
    return " ".join(
        [_normal(row["chosen"]), _normal(row["rejected"])]
        if row["chosen"]
        else [_normal(row["messages"][-1]["content"])]
    )


def _repeated(values: "Array") -> "Array":
    """Which of them occur more than once."""
    import numpy as np

    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray(counts[inverse] > 1)


def _width(threshold: float) -> int:
    """The most permutations per band that still bring a pair at the threshold together with probability 0.999."""
    return max((r for r in (2, 4, 8, 16, 32) if (1 - threshold**r) ** (PERMUTATIONS / r) <= 0.001), default=1)


def _shingles(text: str) -> set[str]:
    """3-shingles of words, or 5-shingles of characters where the script does not set words apart by spaces."""
    words = [word for word in (w.strip(EDGES) for w in text.split()) if word] or text.split()
    joined = "".join(words)
    if len(UNSPACED.findall(joined)) > 0.3 * len(joined):
        return {joined[n : n + 5] for n in range(max(1, len(joined) - 4))}
    return {" ".join(words[n : n + 3]) for n in range(max(1, len(words) - 2))}


def _jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def _near(texts: dict[int, tuple[str, str]], threshold: float) -> dict[int, tuple[int, float]]:
    """(Text, its answer) → an earlier one that is kept, and their exact Jaccard similarity, at least `threshold`.

    Their answers alone are at least half as similar: questions about one long passage are alike but for these.
    """
    import rensa
    from tqdm import tqdm

    width = _width(threshold)
    buckets, kept = defaultdict[int, list[int]](list), dict[int, Any]()
    near: dict[int, tuple[int, float]] = {}
    for i, (text, answer) in tqdm(texts.items(), "near duplicates", disable=None, delay=3, leave=False):
        shingles = _shingles(text)
        sketch = rensa.RMinHash(PERMUTATIONS, 0)
        sketch.update(list(shingles))
        digest = sketch.digest()
        bands = [buckets[hash((n, *digest[n : n + width]))] for n in range(0, PERMUTATIONS, width)]
        estimates = {j: sketch.jaccard(kept[j]) for j in chain(*bands)}
        for j in sorted(estimates, key=lambda j: (-estimates[j], j))[:CANDIDATES]:
            similarity = _jaccard(shingles, _shingles(texts[j][0]))
            if similarity >= threshold and _jaccard(_shingles(answer), _shingles(texts[j][1])) >= threshold / 2:
                near[i] = j, similarity
                break
        else:
            kept[i] = sketch
            for bucket in bands:
                if len(bucket) < CANDIDATES:
                    bucket.append(i)
    return near


def _topics(kept: "pl.DataFrame", limit: float) -> tuple[dict[str, Any], list[str]]:
    """Rows and share of each topic among chat rows, and a warning for one above the limit: no single row's fault."""
    topics, chat = kept.filter(kind="chat")["topic"].value_counts(), kept.filter(kind="chat").height
    counts = dict(topics.sort(["count", "topic"], descending=[True, False]).iter_rows())
    said = "warning: topic {!r} is {:.1%} of the chat rows, above {:.1%} (validate.max_topic_share)"
    # one topic alone is a choice, not an imbalance
    heavy = [said.format(t, n / chat, limit) for t, n in counts.items() if n > limit * chat and len(counts) > 1]
    return {topic: {"rows": n, "share": round(n / chat, 6)} for topic, n in counts.items()}, heavy


if __name__ == "__main__":
    stage.main(run)
