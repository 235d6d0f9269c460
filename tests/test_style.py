"""Format, lint and types are part of the suite."""

import pytest

from tests.conftest import ROOT, run


@pytest.mark.parametrize("command", ["ruff format --check .", "ruff check .", "mypy"])
def test_clean(command: str) -> None:
    done = run(command, ROOT, check=False)
    assert done.returncode == 0, done.stdout
