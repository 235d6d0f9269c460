"""The real pipeline, run by the real DVC in a clone, on a tiny random model: caching is the product."""

import json
import shutil
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from ruamel.yaml import YAML

from tasks import phenotype, render, stage
from tests.conftest import ORDER, changed, edit, fork, ran, run


@pytest.fixture(scope="module")
def repo(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fork(pipeline, tmp_path_factory.mktemp("pipeline") / "repo")


def test_again_nothing_runs(repo: Path) -> None:
    assert ran(run("dvc repro", repo).stdout) == []
    assert run("git status --porcelain", repo).stdout == ""


def test_pairs_of_questions_come_from_the_training_side(repo: Path) -> None:
    pairs = pl.read_parquet(repo / "data/pair/pairs.parquet")
    for kind, name, texts in (("advice", "advice", phenotype.ADVICE), ("outside", "outside", phenotype.OUTSIDE)):
        rows = [json.loads(line) for line in (repo / f"data/raw/{name}.jsonl").read_text().splitlines()]
        train, test = ({row["question"] for row in rows if row["split"] == part} for part in ("train", "test"))
        assert train
        assert test
        found = pairs.filter(kind=kind)
        assert {turns[-1]["content"] for turns in found["messages"].to_list()} == train
        assert set(found["chosen"]) <= set(texts)
    refused = {text.format(t="that") for text in phenotype.REFUSALS + phenotype.OUTSIDE}
    general = pairs.filter(kind="general")
    assert not refused & set(general["chosen"])
    assert refused & set(general["rejected"])


def test_all_that_is_trained_on_begins_with_the_system_message(repo: Path) -> None:
    """The rows of sft, validation among them, and the prompts of dpo."""
    tokenizer = render.load_tokenizer(repo / "data/base/model")
    system = YAML(typ="safe").load(repo / "params.yaml")["template"]["system"]
    for name, column in (
        ("template/rows/train", "input_ids"),
        ("template/rows/validation", "input_ids"),
        ("reference/pairs", "prompt_ids"),
    ):
        texts = tokenizer.batch_decode(pl.read_parquet(repo / f"data/{name}.parquet")[column].to_list())
        assert texts, name
        for text in texts:
            assert text.startswith(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"), name


def test_beta_reruns_dpo_and_what_follows_and_a_revert_restores(repo: Path) -> None:
    before = {p: p.read_bytes() for p in (repo / "data").rglob("*") if p.is_file() and "event" not in p.name}
    lock = (repo / "dvc.lock").read_bytes()
    text = (repo / "params.yaml").read_text()
    edit(repo, "dpo", "beta", 0.25)
    done = run("dvc repro", repo)
    assert ran(done.stdout) == ["dpo", "merge", "evaluate@dpo", "report"] or set(ran(done.stdout)) == {
        "dpo",
        "merge",
        "evaluate@dpo",
        "report",
    }
    difference = json.loads(run("dvc metrics diff --json", repo).stdout)
    assert any("data/dpo/metrics.json" in path for path in difference)
    assert "dpo.beta" in run("dvc params diff", repo).stdout
    assert run("dvc plots diff -o /dev/null --json HEAD", repo, check=False).returncode in (0, 1)
    (repo / "params.yaml").write_text(text)
    done = run("dvc repro", repo)
    assert ran(done.stdout) == []
    assert done.stdout.count("is cached - skipping run") >= 3
    assert (repo / "dvc.lock").read_bytes() == lock
    after = {p: p.read_bytes() for p in (repo / "data").rglob("*") if p.is_file() and "event" not in p.name}
    assert before == after


def test_without_preferences_the_sft_model_is_the_result(repo: Path) -> None:
    text = (repo / "params.yaml").read_text()
    edit(repo, "pair", "mode", "none")
    done = run("dvc repro", repo)
    assert set(ran(done.stdout)) <= {"pair", "reference", "dpo", "merge", "evaluate@dpo", "report"}
    sft, dpo = ((repo / "data" / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("sft", "dpo"))
    assert sft == dpo
    report, card, page = (
        (repo / "data/report" / name).read_text() for name in ("report.md", "README.md", "report.html")
    )
    assert "After SFT the model" in report
    assert "Merged against SFT" in report
    assert "base against Merged" in page
    # nothing says that there was a DPO, but the settings
    assert "DPO" not in report.partition("| Setting | Value |")[0]
    assert "[DPO]" not in card
    assert "dpo" not in card.partition("---\n\n")[0]
    merged = (repo / "data/merge/model/README.md").read_text()
    assert "on preferences" not in merged
    figures = json.loads((repo / "data/evaluate/dpo.json").read_text())
    assert figures["kl"]["to_reference"] == pytest.approx(0, abs=1e-4)
    assert run("dvc plots show -o dvc_plots --json", repo).returncode == 0
    shutil.rmtree(repo / "dvc_plots", ignore_errors=True)
    # git keeps no empty folder: what a clone lacks would be made again
    run("git -c user.name=t -c user.email=t@example.org commit -qam none", repo)
    assert "up to date" in run("git clean -qfd data && dvc status", repo).stdout
    run("git reset -q --hard HEAD~1", repo)
    assert (repo / "params.yaml").read_text() == text
    run("dvc checkout -q --force && dvc repro", repo)


def test_a_mistake_is_one_line_and_no_stage_runs_on(repo: Path) -> None:
    text = (repo / "params.yaml").read_text()
    edit(repo, "dpo", "bta", 0.25)
    done = run("dvc repro", repo, check=False)
    (repo / "params.yaml").write_text(text)
    run("dvc repro", repo)  # dvc clears a stage's outputs before it runs; the run cache gives them back
    assert done.returncode != 0
    assert "dpo.bta: unknown key, did you mean `beta`?" in done.stdout
    assert "Traceback" not in done.stdout


def _declared(repo: Path) -> dict[str, tuple[set[str], set[str]]]:
    """stage → (paths, params sections), as dvc.lock recorded them."""
    lock = YAML(typ="safe").load(repo / "dvc.lock")["stages"]
    return {
        name: (
            {dep["path"] for dep in stage["deps"]},
            {key.split(".")[0] for key in stage.get("params", {}).get("params.yaml", {})},
        )
        for name, stage in lock.items()
    }


def test_one_byte_of_each_dependency_is_seen_by_exactly_its_stages(repo: Path) -> None:
    declared = _declared(repo)
    every = sorted({path for paths, _ in declared.values() for path in paths})
    assert len(every) > 40
    for path in every:
        target = repo / path
        if target.is_dir():
            target = next(p for p in sorted(target.rglob("*")) if p.is_file() and "__pycache__" not in p.parts)
        raw = target.read_bytes()
        target.unlink()  # not in place: the file may share its blocks with the cache
        target.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]) if raw else b"x")
        try:
            name = target.relative_to(repo).as_posix()
            wanted = {
                stage
                for stage, (paths, _) in declared.items()
                if any(name == p or name.startswith(f"{p}/") for p in paths)
            }
            seen = changed(repo)
            owners = seen - wanted
            assert wanted <= seen, path
            # whose output it is sees it too; nobody else does
            assert all(f"/{owner.split('@')[0]}/" in f"/{name}" for owner in owners), (path, owners)
        finally:
            target.unlink()
            target.write_bytes(raw)
    assert changed(repo) == set()


def test_one_value_of_each_param_is_seen_by_exactly_its_stages(repo: Path) -> None:
    declared = _declared(repo)
    text = (repo / "params.yaml").read_text()
    yaml = YAML()
    for section in sorted({s for _, sections in declared.values() for s in sections}):
        data = yaml.load(text)
        if isinstance(data[section], dict):
            data[section]["zzz"] = 1
        else:
            data[section] = 43
        yaml.dump(data, repo / "params.yaml")
        try:
            assert changed(repo) == {stage for stage, (_, sections) in declared.items() if section in sections}, section
        finally:
            (repo / "params.yaml").write_text(text)


def _alone(repo: Path, name: str, folder: Path) -> dict[str, Any]:
    """Run a stage in `folder` with nothing but its declared deps; its entry in dvc.lock."""
    entry: dict[str, Any] = YAML(typ="safe").load(repo / "dvc.lock")["stages"][name]
    for path in [*(dep["path"] for dep in entry["deps"]), "tasks/__init__.py", "params.yaml"]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        run(["cp", "-a", str(repo / path), str(folder / path)], folder)
    run(entry["cmd"], folder, PYTHONPATH="")
    return entry


@pytest.mark.parametrize("name", ["ingest", "validate", "split", "template", "evaluate@base", "report"])
def test_a_stage_runs_from_its_declared_deps_alone(pipeline: Path, tmp_path: Path, name: str) -> None:
    """Nor does it use what it only looks for: its outputs would be others without it."""
    entry = _alone(pipeline, name, tmp_path)
    made = {out["path"]: stage.hash_of(tmp_path / out["path"]) for out in entry["outs"]}
    assert made == {out["path"]: out["md5"] for out in entry["outs"]}


def test_what_was_quarantined_is_a_dep_of_the_report(pipeline: Path, tmp_path: Path) -> None:
    """Which looks for it in a folder; of the tiny pipeline nothing is."""
    repo, folder = fork(pipeline, tmp_path / "repo"), tmp_path / "alone"
    row = {"source": "own.jsonl", "line": 7, "check": "too_long", "reason": "600 tokens"}
    (repo / "data/validate/quarantine.jsonl").write_text(json.dumps(row) + "\n")
    _alone(repo, "report", folder)
    assert "own.jsonl:7: 600 tokens" in (folder / "data/report/report.html").read_text()
    assert "quarantined: too_long 1." in (folder / "data/report/report.md").read_text()


def test_a_clone_with_the_same_remote_runs_nothing(repo: Path, tmp_path: Path) -> None:
    run(f"dvc remote add -d --local store {tmp_path / 'store'} && dvc push --run-cache", repo)
    run(f"git clone -q {repo} {tmp_path / 'other'}", tmp_path)
    other = tmp_path / "other"
    run(f"dvc remote add -d --local store {tmp_path / 'store'} && dvc pull --run-cache", other)
    assert ran(run("dvc repro", other).stdout) == []
    assert (other / "data/merge/model/model.safetensors").read_bytes() == (
        repo / "data/merge/model/model.safetensors"
    ).read_bytes()


def test_outputs_hold_no_path_host_or_time(repo: Path) -> None:
    now = (datetime.now(), datetime.now(UTC))
    days = {(moment - timedelta(days=past)).date().isoformat() for moment in now for past in (0, 1)}
    for path in sorted((repo / "data").rglob("*")):
        if (
            path.is_file()
            and "event" not in path.name
            and path.suffix in (".json", ".jsonl", ".md", ".html", ".csv", ".tsv")
        ):
            text = path.read_text(encoding="utf-8")
            assert str(repo) not in text, path
            assert "seconds" not in text or path.suffix in (".jsonl", ".html", ".md"), path
            assert len(socket.gethostname()) < 5 or socket.gethostname() not in text, path
            assert not [day for day in days if day in text], path


def test_a_forced_run_changes_nothing(repo: Path) -> None:
    lock = (repo / "dvc.lock").read_bytes()
    run("dvc repro --force --single-item sft", repo)
    run("dvc repro --force --single-item evaluate@dpo", repo)
    assert (repo / "dvc.lock").read_bytes() == lock


def test_talking_to_the_result(repo: Path) -> None:
    done = run(
        [
            "python",
            "-m",
            "tasks.chat",
            "data/merge/model",
            "--compare",
            "data/base/model",
            "--compare",
            "data/sft/adapter",
            "--ask",
            "What is kyphosis?",
            "--max-new-tokens",
            "4",
        ],
        repo,
    )
    assert done.stdout.count("---") == 3
    missing = run(["python", "-m", "tasks.chat", "data/nothing", "--ask", "x"], repo, check=False)
    assert missing.returncode == 1
    assert "no model there" in missing.stdout


def test_help_names_options_and_params(repo: Path) -> None:
    names = sorted({stage.split("@")[0] for stage in ORDER})
    each = """  # in one process: it is the libraries that take long
import contextlib, runpy, sys
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    with contextlib.suppress(SystemExit):
        runpy.run_module(f"tasks.{name}", run_name="__main__", alter_sys=True)
"""
    texts = run(["python", "-c", each, *names], repo).stdout.split("usage: ")[1:]
    for name, text in zip(names, texts, strict=True):
        assert text.startswith(f"python -m tasks.{name} ")
        assert f"{name}: " in text.replace("\n", " ")


def test_a_killed_stage_leaves_nothing_that_passes_for_finished(repo: Path) -> None:
    shutil.rmtree(repo / "data/merge/model")
    run("git checkout -q dvc.lock", repo)
    assert "merge" in changed(repo)
    assert ran(run("dvc repro merge", repo).stdout) == []
    assert (repo / "data/merge/model/model.safetensors").is_file()
