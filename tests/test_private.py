"""No secret gets into a file, and nothing phones home: with no route to anywhere all of it works."""

import secrets
import sys
from pathlib import Path

import pytest

import tasks
from tests import small
from tests.conftest import ROOT, clone, fork, ran, run
from tests.namespaces import no_network

NAMES = (
    "HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PREFECT_API_AUTH_STRING",
    "PREFECT_SERVER_API_AUTH_STRING", "WANDB_API_KEY", "GITHUB_TOKEN", "SLACK_WEBHOOK_URL",
)  # fmt: skip
# drawn, so that no file of the repository holds them; half of an auth string is the password
PLANTED = dict(zip(NAMES, (secrets.token_hex(12) for _ in NAMES), strict=True))
SECRETS = PLANTED | dict.fromkeys(
    ("PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING"), f"admin:{PLANTED['PREFECT_API_AUTH_STRING']}"
)


def leaks(folder: Path, said: str) -> list[str]:
    """Which secrets are in what a program said, and in which files below `folder`, those of databases too."""
    texts = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
    texts[Path("its output")] = said.encode()
    return [
        f"{path}: {name}" for path, raw in texts.items() for name, value in PLANTED.items() if value.encode() in raw
    ]


def test_a_leak_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "db").write_bytes(b"\0" + SECRETS["PREFECT_API_AUTH_STRING"].encode() + b"\0")
    assert leaks(tmp_path, SECRETS["HF_TOKEN"]) == [
        f"{tmp_path / 'db'}: PREFECT_API_AUTH_STRING",
        "its output: HF_TOKEN",
    ]


def test_no_secret_of_the_environment_is_in_any_file_of_a_stage(pipeline: Path, tmp_path: Path) -> None:
    """Of a data stage, of one with a model, and of one that fails."""
    repo = fork(pipeline, tmp_path / "repo")
    said = run("dvc repro -v --force -s split && dvc repro -v --force -s base", repo, **SECRETS).stdout
    (repo / "params.yaml").write_text((repo / "params.yaml").read_text() + "\nnonsense: 1\n")
    said += run("dvc repro -v --force -s split", repo, check=False, **SECRETS).stdout
    assert "nonsense: unknown section" in said
    assert leaks(tmp_path, said) == []


def test_no_secret_of_the_environment_is_in_any_file_of_a_flow(tmp_path: Path) -> None:
    """Neither in the repository, nor in what the server keeps: parameters, logs, artifacts."""
    repo = small.make(tmp_path / "repo")
    home = {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_API_URL": "", "PYTHONPATH": str(ROOT)}
    said = run([sys.executable, "-m", "flows.pipeline"], repo, **SECRETS, **home).stdout
    assert "pipeline: 5 ran" in said
    assert leaks(tmp_path, said) == []
    assert any((tmp_path / "home").rglob("*.db"))


def test_telemetry_is_off_by_default() -> None:
    """In stages, in `make`, and for `dvc` run by hand."""
    assert run("dvc config core.analytics && dvc config core.check_update", ROOT).stdout.split() == ["false", "false"]
    assert tasks.ENVIRONMENT["HF_HUB_DISABLE_TELEMETRY"] == tasks.ENVIRONMENT["DO_NOT_TRACK"] == "1"


def test_the_tiny_pipeline_and_its_flow_without_a_network(pipeline: Path, tmp_path: Path) -> None:
    """Every stage runs like this in tests/test_soak.py; here those that could ask a hub, then the flow with its server."""
    repo = fork(pipeline, tmp_path / "repo")
    lock = (repo / "dvc.lock").read_bytes()
    open_to_hubs = {"HF_HUB_OFFLINE": "0", "DO_NOT_TRACK": "", "HF_HUB_DISABLE_TELEMETRY": ""}
    for name in ("base", "ingest", "report"):
        done = run([*no_network(), "dvc", "repro", "--force", "-s", name], repo, **open_to_hubs)
        assert ran(done.stdout) == [name]
    assert (repo / "dvc.lock").read_bytes() == lock
    home = {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_API_URL": ""}
    done = run([*no_network(), sys.executable, "-m", "flows.pipeline"], repo, **open_to_hubs, **home)
    assert "pipeline: 14 unchanged" in done.stdout


def test_the_namespace_has_no_route(tmp_path: Path) -> None:
    """Otherwise the tests above would show nothing."""
    code = "import socket; socket.create_connection(('1.1.1.1', 53), 5)"
    done = run([*no_network(), sys.executable, "-c", code], tmp_path, check=False)
    assert "Network is unreachable" in done.stdout


@pytest.mark.parametrize("name", ["base", "ingest"])
def test_the_real_default_begins_without_a_network(tmp_path: Path, name: str) -> None:
    """Model and terms come out of the packages that are installed."""
    repo = clone(tmp_path / "repo")
    done = run([*no_network(), "dvc", "repro", "-s", name], repo, HF_HUB_OFFLINE="0")
    assert ran(done.stdout) == [name]
    assert "Traceback" not in done.stdout
