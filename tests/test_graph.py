"""dvc.yaml against the source: every import, path and param that a stage reads is declared, and nothing else."""

import ast
import importlib
import inspect
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tasks import params
from tests.conftest import ROOT

GRAPH = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
STAGES = {name: stage.get("do", stage) for name, stage in GRAPH.items()}
ORDER = "base ingest validate split template sft pair reference dpo merge evaluate report".split()
SHARED = {
    "params",
    "records",
    "render",
    "models",
    "decode",
    "stage",
    "training",
    "phenotype",
    "phrases",
    "fast",
    "compare",
    "chart",
    "card",
    "judge",
    "weights",
}


@cache
def imports(module: str) -> frozenset[str]:
    """First-party modules that `tasks.<module>` imports, however deep, itself included."""
    found = {module}
    for node in ast.walk(ast.parse((ROOT / "tasks" / f"{module}.py").read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module == "tasks":
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tasks."):
            names = [(node.module or "").split(".")[1]]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".")[1] for a in node.names if a.name.startswith("tasks.")]
        for name in names:
            if (ROOT / "tasks" / f"{name}.py").is_file() and name not in found:
                found |= imports(name)
    return frozenset(found)


def test_stages_have_the_words_of_the_design() -> None:
    assert list(STAGES) == ORDER
    assert set(ORDER) <= {path.stem for path in (ROOT / "tasks").glob("*.py")}


@pytest.mark.parametrize("name", ORDER)
def test_code_dependencies_are_the_import_closure(name: str) -> None:
    declared = {
        Path(dep).stem for dep in STAGES[name]["deps"] if str(dep).startswith("tasks/") and str(dep).endswith(".py")
    }
    assert declared == imports(name)


@pytest.mark.parametrize("name", ORDER)
def test_params_are_those_that_run_takes(name: str) -> None:
    run = importlib.import_module(f"tasks.{name}").run
    wanted = [p.name for p in inspect.signature(run).parameters.values() if p.annotation not in (Path, str)]
    assert sorted(STAGES[name]["params"]) == sorted(name if w == "params" else w for w in wanted)


@pytest.mark.parametrize("name", ORDER)
def test_every_path_of_a_command_is_declared(name: str) -> None:
    stage = STAGES[name]
    run = importlib.import_module(f"tasks.{name}").run
    words = shlex.split(stage["cmd"])
    assert words[:3] == ["python", "-m", f"tasks.{name}"]
    options = dict(zip([w[2:].replace("-", "_") for w in words[3::2]], words[4::2], strict=True))
    assert set(options) == {p.name for p in inspect.signature(run).parameters.values() if p.annotation in (Path, str)}
    outs = [
        key if isinstance(key, str) else next(iter(key))
        for kind in ("outs", "metrics", "plots")
        for key in stage.get(kind, [])
    ]
    for option, path in options.items():
        known = [*stage["deps"], *outs]
        inside = [k for k in known if k == path or k.startswith(f"{path}/")]
        assert inside, f"--{option} {path} of {name} is neither a dependency nor an output"
    for path in [*outs, *(d for d in stage["deps"] if not d.startswith("tasks/"))]:
        assert any(path == p or path.startswith(f"{p}/") for p in options.values()), f"{path} of {name} is in no option"


@pytest.mark.parametrize("path", sorted((ROOT / "tasks").glob("*.py")), ids=lambda p: p.stem)
def test_layers(path: Path) -> None:
    """Stages import shared modules, never each other; flows is imported by none; params and records load no torch."""
    others = imports(path.stem) - {path.stem} if path.stem != "__init__" else frozenset()
    assert others <= SHARED
    text = path.read_text()
    assert not re.search(r"^\s*(?:from|import) (?:flows|prefect|dvc)\b", text, re.MULTILINE)
    if path.stem in (
        "params",
        "records",
        "stage",
        "phenotype",
        "phrases",
        "ingest",
        "validate",
        "split",
        "compare",
        "chart",
        "card",
        "judge",
        "report",
    ):
        assert not re.search(r"^\s*(?:from|import) (?:torch|transformers|trl|peft)\b", text, re.MULTILINE)


def test_every_section_of_params_is_used() -> None:
    used = {section for stage in STAGES.values() for section in stage["params"]}
    assert used | {"gate"} == {"seed", *params.OWN, *params.LIBRARY}  # the gate is the flows' own


def test_a_stage_that_loads_a_model_holds_the_gpu() -> None:
    held = {name for name, stage in STAGES.items() if stage.get("meta", {}).get("gpu")}
    assert held == {name for name in ORDER if "models" in imports(name)}


def test_a_model_is_measured_against_the_one_that_it_was_trained_from() -> None:
    found = {name: (each["model"], each["reference"]) for name, each in GRAPH["evaluate"]["foreach"].items()}
    assert found == {
        "base": ("data/base/model", "data/base/model"),
        "sft": ("data/sft/adapter", "data/base/model"),
        "dpo": ("data/merge/model", "data/sft/adapter"),
    }


def test_metrics_and_plots_are_in_git_and_models_are_not() -> None:
    for name, stage in STAGES.items():
        for kind in ("metrics", "plots"):
            for entry in stage.get(kind, []):
                assert next(iter(entry.values()))["cache"] is False, name
        assert all(isinstance(entry, str) for entry in stage.get("outs", [])), name
