"""The lock: exact versions, each with the hashes of its files, and all that the project asks for."""

import importlib.metadata
import importlib.util
import re
import tomllib

from tests.conftest import ROOT

TEXT = (ROOT / "requirements.lock").read_text()
# one requirement a paragraph: name==version ; marker, then a line for each hash
ENTRIES = re.findall(
    r"^([A-Za-z0-9._-]+)(\S*)(?: ; [^\\\n]+)?((?: \\\n    --hash=sha256:[0-9a-f]{64})*)$", TEXT, re.MULTILINE
)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_version_is_exact_and_every_file_has_a_hash() -> None:
    lines = [line for line in TEXT.splitlines() if line and not line.startswith(("#", " "))]
    assert len(ENTRIES) == len(lines) > 100
    for name, version, hashes in ENTRIES:
        assert re.fullmatch(r"==\d[\w.+!-]*", version), f"{name}{version}"
        assert hashes, f"{name} has no hash"
    assert "://" not in re.sub(r"^#.*$", "", TEXT, flags=re.MULTILINE)  # no file from elsewhere, no other index


def test_it_holds_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    found = {normal(name): version for name, version, _ in ENTRIES}
    for requirement in asked:
        name, exact = re.match(r"([\w.-]+)(?:\[[\w,]+\])?(==[\w.]+)?", requirement).groups()
        assert normal(name) in found, name
        assert exact is None or found[normal(name)] == exact, requirement


def test_it_is_what_is_installed() -> None:
    """Of the libraries that make the bytes."""
    found = {normal(name): version for name, version, _ in ENTRIES}
    for name in ("transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "polars", "dvc", "prefect"):
        assert found[name] == f"=={importlib.metadata.version(name)}"


def test_make_installs_it_with_its_hashes() -> None:
    """But torch, which goes first and by version alone: which build of it, the machine decides (a CPU wheel, a CUDA index)."""
    makefile = (ROOT / "Makefile").read_text()
    assert '--no-deps "$$torch" && $(PIP) --no-deps --require-hashes -r requirements.lock' in makefile


def test_no_library_can_fetch_code_from_a_hub() -> None:
    """bitsandbytes 0.50.2 loads compiled kernels from `kernels-community` on the Hub as soon as `kernels` is installed."""
    assert not re.search(r"^kernels==", TEXT, re.MULTILINE)
    assert importlib.util.find_spec("kernels") is None
