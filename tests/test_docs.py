"""What the docs name is there: tests, files, links."""

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT, run

PAGES = [ROOT / name for name in run(["git", "ls-files", "*.md"], ROOT).stdout.split() if (ROOT / name).is_file()]


def test_every_guarantee_has_a_test() -> None:
    rows = [line for line in (ROOT / "docs/guarantees.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith(("| guarantee", "| ---"))]
    assert len(rows) > 50
    for row in rows:
        named = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", row)
        assert named, row
        for path, test in named:
            text = (ROOT / path).read_text()
            assert re.search(rf"^ *def {test or 'test_'}", text, re.MULTILINE), f"{path}::{test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_make_targets_that_the_docs_name_are_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"(?:^    |`|\$ )(?:\w+=\S+ )*make ([a-z]+)", page.read_text(), re.MULTILINE)
        assert set(named) <= targets, page


def test_programs_that_the_docs_name_are_there() -> None:
    for page in PAGES:
        for module in re.findall(r"python -m ((?:tasks|flows|bench)\.\w+)", page.read_text()):
            path = ROOT / f"{module.replace('.', '/')}.py"
            assert path.is_file() or module == "tasks.NAME", f"{page.name}: {module}"
