"""The plan: what it says is what `dvc repro` then does, it changes nothing, and its bytes are those of the real objects."""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows import memory, plan, stages
from flows.memory import GIB, Batch, Device
from tasks import params
from tests import small
from tests.conftest import CHANGES, LORA, NF4, ORDER, ROOT, edit, fork, make_tiny, ran, run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
ROOMY = Device("cpu", "test", 1 << 50, 1 << 50)


@pytest.fixture
def repo(pipeline: Path, tmp_path: Path) -> Path:
    return fork(pipeline, tmp_path / "repo")


def states(repo: Path, *targets: str) -> dict[str, str]:
    return {line.name: line.state for line in plan.make(repo, targets or None, device=ROOMY).lines}


def why(repo: Path) -> dict[str, list[str]]:
    return {line.name: list(line.why) for line in plan.make(repo, device=ROOMY).lines}


def did(repo: Path, *targets: str) -> tuple[set[str], set[str]]:
    """(stages that ran, stages that were restored) by `dvc repro`."""
    said = run(["dvc", "repro", *targets], repo).stdout
    restored = {line.split("'")[1] for line in said.splitlines() if "is cached - skipping run" in line}
    return set(ran(said)), restored


class TestSaysWhatDvcDoes:
    def test_a_param_and_its_revert(self, repo: Path) -> None:
        assert set(states(repo).values()) == {"unchanged"}
        edit(repo, "dpo", "beta", 0.35)
        found = states(repo)
        follow = {"merge", "evaluate@dpo", "report"}
        own = {"dpo", "report"}  # the report shows the section
        assert found == {n: "run" if n in own else "follows" if n in follow else "unchanged" for n in ORDER}
        said = why(repo)
        assert said["dpo"] == ["dpo.beta 0.3 → 0.35"]
        assert said["merge"] == ["after dpo"]
        assert said["report"] == ["dpo.beta 0.3 → 0.35", "after dpo, merge, evaluate@dpo"]
        assert did(repo) == ({"dpo", *follow}, set())
        edit(repo, "dpo", "beta", 0.3)
        assert states(repo) == {n: "restored" if n in {"dpo", *follow} else "unchanged" for n in ORDER}
        assert why(repo)["dpo"] == ["dpo.beta 0.35 → 0.3"]
        assert did(repo) == (set(), {"dpo", *follow})

    def test_a_data_file(self, repo: Path) -> None:
        path = repo / "data/raw/advice.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:-1]))
        found = states(repo, "split")
        assert found == {
            "base": "unchanged",
            "ingest": "run",
            "validate": "follows",
            "split": "follows",
        }
        said = why(repo)
        assert said["ingest"] == ["data/raw modified (data/raw/advice.jsonl)"]
        assert said["validate"] == ["after ingest"]
        assert did(repo, "split") == ({"ingest", "validate", "split"}, set())

    def test_code_whose_output_stays_the_same(self, repo: Path) -> None:
        with (repo / "tasks/split.py").open("a") as handle:
            handle.write("# nothing\n")
        assert states(repo, "template") == {
            "base": "unchanged",
            "ingest": "unchanged",
            "validate": "unchanged",
            "split": "run",
            "template": "follows",
        }
        assert why(repo)["split"] == ["tasks/split.py modified"]
        assert did(repo, "template") == ({"split"}, set())  # `follows` is a condition, not a promise
        assert states(repo, "template")["template"] == "unchanged"

    def test_outputs_that_are_gone_come_back(self, repo: Path) -> None:
        shutil.rmtree(repo / "data/template/rows")
        assert {n for n, s in states(repo).items() if s != "unchanged"} == {"template"}
        assert states(repo)["template"] == "restored"
        assert why(repo)["template"] == ["data/template/rows not here"]
        assert did(repo) == (set(), {"template"})

    def test_the_command_and_a_stage_never_run(self, repo: Path) -> None:
        graph = repo / "dvc.yaml"
        graph.write_text(graph.read_text().replace("--plots data/dpo/plots", "--plots  data/dpo/plots", 1))
        lock = (repo / "dvc.lock").read_text()
        (repo / "dvc.lock").write_text(lock.replace("  report:\n", "  reports:\n", 1))
        said = why(repo)
        assert said["report"][0] == "never run: dvc.lock does not know it"
        graph.write_text(graph.read_text().replace("--out data/dpo/adapter", "--out data/dpo/other", 1))
        assert "its command: data/dpo/adapter → data/dpo/other" in why(repo)["dpo"]


def test_words_of_params() -> None:
    def leaves(old: Any, new: Any) -> list[tuple[str, str, str]]:
        return [(k, plan._value(a), plan._value(b)) for k, a, b in plan._leaves("x", old, new)]

    assert leaves({"a": 1, "b": {"c": None}}, {"a": 1, "b": {"c": "d"}, "e": True}) == [
        ("x.b.c", "null", '"d"'),
        ("x.e", "(not set)", "true"),
    ]
    assert leaves([{"n": 1}, {"n": 2}], [{"n": 1}, {"n": 3}]) == [("x.1.n", "2", "3")]
    assert leaves({"load_in_4bit": True}, None) == [("x", '{"load_in_4bit": true}', "null")]
    assert leaves(1, 2) == [("x", "1", "2")]


def digest(folder: Path) -> str:
    """Names, bytes and times of all files but DVC's own scratch."""
    out = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith((".dvc/tmp/", ".git/index")) and "__pycache__" not in name:
            out.update(f"{name} {path.stat().st_mtime_ns}".encode() + path.read_bytes())
    return out.hexdigest()


def test_writes_and_runs_nothing_and_answers_for_a_small_machine(repo: Path) -> None:
    edit(repo, "sft", "learning_rate", 1e-5)
    before = digest(repo)
    path = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = run([sys.executable, "-m", "flows.plan"], repo, check=False, **path)
    assert done.returncode == 0, done.stdout
    assert "sft.learning_rate 0.0006 → 1e-05" in done.stdout
    tight = run([sys.executable, "-m", "flows.plan", "--memory", "0.5"], repo, check=False, **path)
    assert tight.returncode == plan.NO_FIT
    assert "sft won't fit" in tight.stdout
    data = json.loads(run([sys.executable, "-m", "flows.plan", "--json", "sft"], repo, **path).stdout)
    entry = {e["name"]: e for e in data["stages"]}["sft"]
    assert entry["state"] == "run"
    assert entry["need"]["total"] == sum(part["bytes"] for part in entry["need"]["parts"])
    wrong = run([sys.executable, "-m", "flows.plan", "sftt"], repo, check=False, **path)
    assert (wrong.returncode, wrong.stdout.strip()) == (1, "plan: sftt: no such stage in dvc.yaml, did you mean `sft`?")
    assert digest(repo) == before


def test_last_time_and_the_check_of_the_estimate(repo: Path) -> None:
    lines = {line.name: line for line in plan.make(repo, device=ROOMY).lines}
    assert lines["sft"].need is not None
    event = {
        "stage": "sft",
        "arguments": {"adapter": "data/sft/adapter"},
        "seconds": 61.0,
        "peak_bytes": lines["sft"].need.total * 2,
    }
    (repo / "data/sft/event.json").write_text(json.dumps(event))
    for path in (repo / "data/dpo").glob("event*.json"):
        path.unlink()
    (repo / "data/evaluate").mkdir(exist_ok=True)
    for path in (repo / "data/evaluate").glob("event*.json"):
        path.unlink()
    instance = {"stage": "evaluate", "arguments": {"answers": "data/evaluate/sft.answers.jsonl"}, "seconds": 5}
    (repo / "data/evaluate/event.json").write_text(json.dumps(instance))
    edit(repo, "sft", "per_device_train_batch_size", 64)
    found = plan.make(repo, device=ROOMY)
    lines = {line.name: line for line in found.lines}
    assert (lines["sft"].seconds, lines["sft"].when) == (61.0, "with other settings")
    assert (lines["dpo"].seconds, lines["dpo"].when) == (None, "not run here yet")
    assert lines["evaluate@sft"].when == "with other inputs"
    assert lines["evaluate@base"].when == "of another instance"
    assert lines["sft"].measured == 2 * (
        lines["sft"].estimated or 0
    )  # of the settings that it ran with, not of the new ones
    assert lines["sft"].estimated != lines["sft"].need.total  # type: ignore[union-attr]
    assert "(-50%)" in plan.text(found)
    assert max(map(len, plan.text(found).splitlines())) <= 120


class TestCaches:
    """On shell stages: what only caches decide."""

    @pytest.fixture
    def shell(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        repo = small.make(tmp_path / "small")
        run("dvc repro && git add -A && git -c user.name=t -c user.email=t@example.org commit -qm ran", repo)
        return repo

    def test_remote(self, shell: Path, tmp_path: Path) -> None:
        """As in a clone: dvc.lock and the metrics are there, nothing else."""
        run(f"dvc remote add -d far {tmp_path / 'far'} && dvc push -q --run-cache", shell)
        shutil.rmtree(shell / ".dvc/cache")
        for path in ("one", "two", "a.out", "b.out", "report.md"):
            (shell / path).unlink()
        assert set(plan._states(stages.plan(shell)).values()) == {"run"}
        assert set(plan._states(stages.plan(shell, remote=True)).values()) == {"remote"}
        assert not (shell / "one").exists()  # looked at, not fetched
        assert not (shell / ".dvc/cache/files").exists()
        run("dvc pull -q", shell)
        assert did(shell) == (set(), set())

    def test_no_remote(self, shell: Path) -> None:
        with pytest.raises(params.UserError, match="no DVC remote"):
            stages.plan(shell, remote=True)

    def test_while_another_dvc_runs_a_stage(self, shell: Path) -> None:
        (shell / "in").write_text("second\n")
        with small.held(shell):
            process = small.start(["dvc", "repro", "slow"], shell)
            small.pids(shell)
            found = {each.name: each for each in stages.plan(shell)}
            now = plan._states(list(found.values()))
            assert (now["first"], now["slow"]) == ("unchanged", "run")
            assert plan._why(shell, found["slow"], {}, now) == ["it is being run by another dvc at this moment"]
            assert process.poll() is None
        small.finish(process)

    def test_restored_upstream_of_what_it_was_made_of(self, shell: Path) -> None:
        """`first` went ahead and back: what lies behind it is unchanged, not restored."""
        (shell / "in").write_text("second\n")
        run("dvc repro --single-item first", shell)
        (shell / "in").write_text("input\n")
        found = plan._states(stages.plan(shell))
        assert found.pop("first") == "restored"
        assert set(found.values()) == {"unchanged"}
        assert did(shell) == (set(), {"first"})

    def test_restored_upstream_of_what_was_never_made(self, shell: Path) -> None:
        (shell / "in").write_text("second\n")
        run("dvc repro --single-item first", shell)
        (shell / "in").write_text("input\n")
        run("dvc repro --single-item first", shell)
        (shell / "in").write_text("second\n")
        found = plan._states(stages.plan(shell))
        assert found == {"first": "restored", "slow": "run", "each@a": "run", "each@b": "run", "report": "follows"}
        assert did(shell) == ({"slow", "each@a", "each@b", "report"}, {"first"})


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def facts(tiny: Path) -> dict[str, Any]:
    from tasks import base, models, render

    found: dict[str, Any] = base.describe(models.load(tiny, None), render.load_tokenizer(tiny), "tiny", "none")
    return found


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_adapter_parameters_are_those_of_peft(tiny: Path, facts: dict[str, Any], targets: Any) -> None:
    from tasks import models

    lora = LORA | {"target_modules": targets}
    adapted = models.new_adapter(models.load(tiny, None), lora, 0)
    real = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert memory.adapter_parameters(facts, lora) == real


@pytest.mark.parametrize(
    "quantization",
    [None, NF4, NF4 | {"bnb_4bit_use_double_quant": False}, {"load_in_8bit": True}],
    ids=["16 bits", "nf4 twice", "nf4", "int8"],
)
def test_weight_bytes_are_those_of_the_loaded_model(tmp_path: Path, quantization: dict[str, Any] | None) -> None:
    """Of layers wide enough that a quantised tensor's own tables are small beside it."""
    from tasks import base, models, render

    folder = make_tiny(tmp_path / "wide", hidden_size=256, intermediate_size=768)
    model = models.load(folder, quantization)
    facts = base.describe(models.load(folder, None), render.load_tokenizer(folder), "wide", "none")
    real = model.get_memory_footprint()
    seen = set()
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        for inner in (state, getattr(state, "state2", None)):
            for tensor in (inner.absmax, inner.code) if inner is not None else ():
                if tensor.data_ptr() not in seen:
                    seen.add(tensor.data_ptr())
                    real += tensor.numel() * tensor.element_size()
        scales = getattr(parameter, "SCB", None)
        if scales is not None:
            real += scales.numel() * scales.element_size()
    width = models.compute_dtype().itemsize
    assert memory.weight_bytes(facts, quantization, width) == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("way", ["fast", "own", "checkpointed"])
def test_kept_activations_are_those_that_autograd_keeps(
    tiny: Path, facts: dict[str, Any], way: str, targets: Any
) -> None:
    """Bytes a token, as the difference of a batch and one of twice the rows: what does not grow with tokens drops out."""
    import torch
    from trl.trainer.utils import add_fused_lm_head

    from tasks import fast, models

    lora = LORA | {"target_modules": targets}
    adapted = models.new_adapter(models.load(tiny, NF4, "eager"), lora, 0).train()
    if way == "checkpointed":
        adapted.gradient_checkpointing_enable()
        adapted.enable_input_require_grads()
    add_fused_lm_head(adapted.get_base_model(), outputs=("log_probs",))
    if way != "own":
        assert fast.install(adapted) == []
    owned = {p.untyped_storage().data_ptr() for p in adapted.parameters()}
    length = 40

    def kept(rows: int) -> int:
        held: dict[int, Any] = {}

        def hold(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned:
                held[storage.data_ptr()] = storage
            return tensor

        ids = torch.randint(5, 300, (rows, length), generator=torch.Generator().manual_seed(rows))
        labels = torch.full_like(ids, -100)
        labels[:, -1] = 7  # hardly any head
        width = models.compute_dtype()
        with (
            torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=width == torch.bfloat16),
        ):
            out = adapted(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True)
        assert out.loss.isfinite()
        return sum(storage.nbytes() for storage in held.values())

    real = (kept(16) - kept(8)) / (8 * length)
    here = Device("cpu", "", 0, 0, models.compute_dtype() == torch.bfloat16)
    if way == "checkpointed":
        said: float = memory.checkpointed_per_token(facts, here, True)
    else:
        said = memory.kept_per_token(facts, lora, here, length, way == "fast", way == "fast")
    if way == "fast":
        more, less = (memory.kept_scores(facts, here, memory.Batch(n * length, n * length, length, 1)) for n in (16, 8))
        said += (more - less) / (8 * length)
    assert said == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_packed_copies_are_two_of_each_weight(tiny: Path, facts: dict[str, Any], targets: Any) -> None:
    import torch
    from trl.trainer.utils import add_fused_lm_head

    from tasks import fast, models

    lora = LORA | {"target_modules": targets}
    adapted = models.new_adapter(models.load(tiny, NF4, "eager"), lora, 0).train()
    add_fused_lm_head(adapted.get_base_model(), outputs=("log_probs",))
    assert fast.install(adapted, pack=True) == []
    ids = torch.randint(5, 300, (2, 20))
    width = models.compute_dtype()
    with torch.autocast("cpu", torch.bfloat16, enabled=width == torch.bfloat16):
        adapted(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True).loss.backward()
    frozen = [vars(m)["forward"].frozen for m in adapted.modules() if isinstance(vars(m).get("forward"), fast._Fused)]
    frozen.append(vars(adapted.get_base_model())["_reforge_head"])
    real = sum(copy.numel() * copy.element_size() for f in frozen for copy in f.packed[1:])
    here = Device("cpu", "", 0, 0, width == torch.bfloat16)
    assert memory.packed_bytes(facts, lora, here, True) == real
    section = {"optim": "adamw_torch_fused", "gradient_checkpointing": False}
    plain, packed = (
        memory.training(facts, section | given, lora, NF4, here, memory.Batch(40, 40, 20, 1)).total
        for given in ({"pack_weights": False}, {"pack_weights": True})
    )
    assert packed - plain == real
    unasked = [
        memory.training(of, section, lora, NF4, on, memory.Batch(40, 40, 20, 1)).parts
        for of, on in (
            (facts, Device("cpu", "", 0, 0, bf16=True)),
            (facts, Device("cpu", "", 0, 0, bf16=False)),
            (facts, Device("cuda", "", 0, 0)),
            (big(), Device("cpu", "", 0, 0, bf16=True)),
        )
    ]
    assert [any(p.name.startswith("packed copies") for p in parts) for parts in unasked] == [True, False, False, False]


def test_copies_are_given_up_first(facts: dict[str, Any], tmp_path: Path) -> None:
    """On a CPU what does not fit is computed without them before anything else changes."""
    every, rows, cpu = params.load(ROOT / "params.yaml"), plan.Rows(tmp_path), Device("cpu", "", GIB, GIB, bf16=True)

    def need(settings: dict[str, Any]) -> memory.Need | None:
        return plan.estimate("sft", settings, facts, cpu, rows)

    found = need(every)
    assert found is not None
    remedies, hopeless = plan.propose("sft", every, need, found.least - 1, rows)
    assert [remedy.change for remedy in remedies] == [{"sft.pack_weights": False}]
    assert not hopeless


def test_tokens_of_a_batch_are_those_of_the_packed_layout() -> None:
    from tasks import fast

    rows = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 9, 9], [7], [1, 2, 5]]
    assert memory.distinct(rows) == fast.lay_out(rows).ids.shape[1]


def test_defaults_are_those_of_the_classes() -> None:
    from trl import DPOConfig, SFTConfig

    for config in (SFTConfig, DPOConfig):
        real = {f.name: f.default for f in dataclasses.fields(config)}
        for key, value in plan.DEFAULTS.items():
            if key != "optim":  # `training.arguments` sets it
                assert real[key] == value, key


def test_constants_are_those_of_the_stages() -> None:
    """The plan loads no torch, so it can't ask them itself."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    from tasks import decode, dpo, fast, merge, models, pair

    assert {CLASSES[kind] for kind in fast.PACKABLE} == memory.PACKABLE
    assert (fast.HEAD_CHUNK, fast.HEAD_PIECE, fast.SCORE_CHUNK) == (
        memory.FAST_HEAD,
        memory.FAST_PIECE,
        memory.FAST_SCORES,
    )
    assert (fast.KEPT_SCORES, models.SCORED) == (memory.FAST_KEPT, memory.SCORED)
    assert (fast.COPIES_MOST, decode.ROOM) == (memory.COPIES_MOST, memory.ROOM)
    assert (pair.BATCH, pair.NEW_TOKENS) == (plan.PAIR_BATCH, plan.PAIR_TOKENS)
    assert dpo.KL_BATCH == plan.DPO_BATCH
    assert (merge.BATCH, merge.MOST_TOKENS) == (plan.MERGE_BATCH, plan.MERGE_TOKENS)


def test_scores_of_long_rows_are_bounded(facts: dict[str, Any]) -> None:
    """By what tasks.fast holds at once, of one row as of many: tests/test_fast.py measures that."""
    heads = facts["attention"]["heads"]
    short, long = (memory.Batch(n, n, n // rows) for n, rows in ((64, 2), (1 << 15, 1)))
    assert memory.score_bytes(facts, short) == 2 * heads * 32**2 * memory.FAST_SCORES_BYTES
    assert memory.score_bytes(facts, long) == memory.FAST_SCORES * memory.FAST_SCORES_BYTES < heads * (1 << 30)


def test_what_evaluate_compares_is_what_the_plan_counts() -> None:
    from tasks import evaluate

    assert (evaluate.KL_ROWS, evaluate.KL_TOKENS, evaluate.KL_BATCH) == (plan.KL_ROWS, plan.KL_TOKENS, plan.KL_BATCH)


def test_what_dpo_compares_is_bounded(facts: dict[str, Any]) -> None:
    """Over the whole vocabulary so many tokens at once and no more, however long the answers."""
    section = plan.DEFAULTS | {"eval_strategy": "epoch"}
    batch = memory.Batch(64, 64, 32)
    device = Device("cpu", "", 0, 0)

    def tables(kl: int) -> int:
        need = memory.training(facts, section, LORA, None, device, batch, batch, copies=1, kl=kl)
        return sum(part.bytes for part in need.parts if part.name.startswith("KL to the reference"))

    assert tables(100) == 20 * 100 * facts["vocabulary"]
    assert tables(4000) == tables(memory.SCORED) == 20 * memory.SCORED * facts["vocabulary"]


def test_what_answers_take_follows_the_device(facts: dict[str, Any]) -> None:
    linear = facts["linear_parameters"] + facts["vocabulary"] * facts["hidden_size"]
    cache = facts["kv_cache_bytes_per_token"]  # in 16 bits

    def parts(facts: dict[str, Any], kind: memory.Kind, bf16: bool = True) -> dict[str, int]:
        device = Device(kind, "test", GIB, GIB, bf16=bf16)
        return {p.name.split(",")[0]: p.bytes for p in memory.generating(facts, device, 4, 10, 6)}

    small = parts(facts, "cpu")
    assert small["packed copies of the linear layers"] == 2 * linear
    assert small["KV cache"] == 4 * (16 + memory.ROOM) * cache
    assert parts(facts, "cpu", bf16=False)["KV cache"] == 2 * small["KV cache"]
    assert parts(facts, "cuda")["KV cache"] == 4 * 16 * cache
    for without in (parts(big(), "cpu"), parts(facts, "cpu", bf16=False), parts(facts, "cuda")):
        assert "packed copies of the linear layers" not in without


def test_optimizers() -> None:
    def of(name: str) -> int:
        return memory.optimizer_bytes(name, 1000)

    assert [of(n) for n in ("adamw_torch", "paged_adamw_32bit", "adamw_8bit", "paged_lion_8bit", "sgd")] == [
        8000,
        8000,
        2000,
        1000,
        0,
    ]


def big() -> dict[str, Any]:
    """A 7B of Mistral's shapes."""
    hidden, inner, layers, key = 4096, 14336, 32, 1024
    shapes = {
        "q_proj": [[hidden, hidden, layers]],
        "k_proj": [[hidden, key, layers]],
        "v_proj": [[hidden, key, layers]],
        "o_proj": [[hidden, hidden, layers]],
        "gate_proj": [[hidden, inner, layers]],
        "up_proj": [[hidden, inner, layers]],
        "down_proj": [[inner, hidden, layers]],
    }
    linear = sum(a * b * n for each in shapes.values() for a, b, n in each)
    return {
        "architecture": "MistralForCausalLM", "parameters": linear + 2 * 32768 * hidden + 65 * hidden,
        "linear_parameters": linear, "linear_modules": sorted(shapes), "linear_shapes": shapes, "layers": layers,
        "hidden_size": hidden, "intermediate_size": inner, "vocabulary": 32768, "context_length": 32768,
        "attention": {"heads": 32, "kv_heads": 8, "head_dim": 128}, "kv_cache_bytes_per_token": 131072,
    }  # fmt: skip


class TestWontFit:
    """A 7B in 16 bits on GPUs that get smaller."""

    def every(self) -> dict[str, Any]:
        return params.load(ROOT / "params.yaml") | {
            "quantization": None,
            "template": params.Template(max_length=1024),
            "sft": {"per_device_train_batch_size": 8, "gradient_checkpointing": False},
            "lora": {"r": 64},
        }

    @pytest.mark.parametrize("gib", [80, 40, 24, 20, 12, 8, 6, 4])
    def test_the_first_combination_that_fits_in_order_of_harm(self, gib: int, tmp_path: Path) -> None:
        facts, every, rows = big(), self.every(), plan.Rows(tmp_path)
        device = Device("cuda", "test", gib * GIB, gib * GIB)

        def need(settings: dict[str, Any]) -> memory.Need | None:
            return plan.estimate("sft", settings, facts, device, rows)

        assert need(every).least > device.free  # type: ignore[union-attr]
        remedies, hopeless = plan.propose("sft", every, need, device.free, rows)
        harm = ["gradient_checkpointing", "per_device_train_batch_size", "max_length", "quantization", "r"]
        kinds = [next(iter(r.change)).rpartition(".")[2] for r in remedies]
        assert kinds == [h for h in harm if h in kinds]
        assert all(r.saves > 0 for r in remedies)
        fits = []
        for count in range(len(remedies) + 1):
            settings = every
            for remedy in remedies[:count]:
                settings = plan._changed(settings, remedy.change)
            fits.append(need(settings).least <= device.free)  # type: ignore[union-attr]
        assert fits == [False] * len(remedies) + [not hopeless]
        assert hopeless == (gib <= 4)
        sizes = [r.change for r in remedies if "sft.per_device_train_batch_size" in r.change]
        assert all(c["sft.per_device_train_batch_size"] * c["sft.gradient_accumulation_steps"] == 8 for c in sizes)

    def test_more_of_anything_needs_more(self, tmp_path: Path) -> None:
        facts, every, rows = big(), self.every(), plan.Rows(tmp_path)
        device = Device("cuda", "test", GIB, GIB)

        def total(**changes: Any) -> int:
            found = plan.estimate(
                "sft", plan._changed(every, {k.replace("__", "."): v for k, v in changes.items()}), facts, device, rows
            )
            assert found is not None
            return found.total

        plain = total()
        assert total(lora__r=128) > plain
        assert total(template__max_length=2048) > plain
        assert total(sft__per_device_train_batch_size=16) > plain
        assert total(quantization=plan.NF4) < total(quantization={"load_in_8bit": True}) < plain
        assert total(sft__optim="paged_adamw_8bit") < plain
        assert total(sft__gradient_checkpointing=True) < plain

    @pytest.mark.parametrize(
        ("asked", "cpu"), [("paged_lion_32bit", "lion_32bit"), ("paged_adamw_32bit", "adamw_torch_fused")]
    )
    def test_off_cuda_an_optimizer_pages_nothing_and_stays_what_it_is(self, asked: str, cpu: str) -> None:
        every = plan._changed(self.every(), {"sft.optim": asked})
        for kind, wanted in (("cpu", cpu), ("cuda", asked)):
            assert plan._section(every, "sft", Device(kind, "test", GIB, GIB))["optim"] == wanted

    def test_seven_billion_parameters_fit_one_gpu(self, tmp_path: Path) -> None:
        """What README.md says of the settings that it proposes, which are these."""
        text = (ROOT / "README.md").read_text().split("## On a GPU")[1]
        proposed = YAML(typ="safe").load(text.split("```yaml")[1].split("```")[0])
        every = params.load(ROOT / "params.yaml")
        changes = {f"{name}.{key}": value for name, keys in proposed.items() for key, value in keys.items()}
        every = plan._changed(every, changes)
        device = Device("cuda", "test", 24 * GIB, 24 * GIB)
        said = {
            "sft": 7,
            "dpo": 7,
            "reference": 6,
            "pair": 22,
            "merge": 19,
            "evaluate@base": 18,
            "evaluate@sft": 19,
            "evaluate@dpo": 19,
        }
        for name, gigabytes in said.items():
            need = plan.estimate(name, every, big(), device, plan.Rows(tmp_path))
            assert need is not None
            assert round(need.total / GIB) == gigabytes, name

    def test_what_a_stage_compares_is_bounded(self, tmp_path: Path) -> None:
        """`merge` and `evaluate` compare so many tokens and no more, however long rows and answers may be."""
        every = params.load(ROOT / "params.yaml")
        long = every | {
            "template": params.Template(max_length=2048),
            "evaluate": every["evaluate"].model_copy(update={"max_new_tokens": 512, "batch_size": 1}),
        }
        facts = big() | {"vocabulary": 151_936}
        table = 4 * 4096 * facts["vocabulary"]  # 2.3 GiB
        for device in (ROOMY, Device("cuda", "test", 1 << 50, 1 << 50)):
            for name, tables in (("merge", 1), ("evaluate@sft", 2), ("evaluate@dpo", 2)):
                need = plan.estimate(name, long, facts, device, plan.Rows(tmp_path))
                assert need is not None
                parts = need.parts if device.kind == "cpu" else need.aside
                (held,) = (part.bytes for part in parts if part.name.startswith("log-probabilities of"))
                assert held == tables * table

    @pytest.mark.parametrize(("ram", "fits"), [(None, True), (64 * GIB, True), (8 * GIB, False)])
    def test_what_waits_beside_a_gpu_needs_a_place(self, tmp_path: Path, ram: int | None, fits: bool) -> None:
        device, every = Device("cuda", "test", 1 << 50, 1 << 50, ram=ram), params.load(ROOT / "params.yaml")
        lines = []
        for name in ("sft", "merge", "evaluate@dpo"):
            bare = plan.Line(name, "run", (), None, "")
            each: Any = SimpleNamespace(name=name, reasons=())
            lines.append(plan._with_memory(bare, each, None, tmp_path, every, big(), device))
        assert [line.fits for line in lines] == [True, fits, True]
        text = " ".join(plan.text(plan.Plan(tuple(lines), device)).split())
        assert "evaluate@dpo, in the machine's own memory: log-probabilities of texts and answers" in text
        assert ("merge won't fit: it keeps" in text) is not fits
        assert "make it" not in text  # no parameter helps there

    def test_every_stage_with_a_model_has_an_estimate(self, tmp_path: Path) -> None:
        every = params.load(ROOT / "params.yaml")
        known = {n: plan.estimate(n, every, big(), ROOMY, plan.Rows(tmp_path)) for n in ORDER}
        with_model = {"sft", "pair", "reference", "dpo", "merge", "evaluate@base", "evaluate@sft", "evaluate@dpo"}
        assert {n for n, need in known.items() if need is not None} == with_model
        totals = {n: need.total for n, need in known.items() if need is not None}
        assert all(total > (0.5 if n in ("sft", "reference", "dpo") else 2) * 7e9 for n, total in totals.items())


def test_tiny_batches_follow_the_rows(repo: Path) -> None:
    """The rows that are there are what the estimate rests on, not the longest that could be."""
    rows = plan.Rows(repo)
    given = plan.DEFAULTS | CHANGES["sft"]
    batch, note = rows.sft("train", 16, 256, given)
    assert batch.longest < 256
    assert batch.tokens < batch.padded <= 16 * batch.longest
    assert f"{batch.longest} tokens" in note
    assert rows.dpo("train", 4, 256, given)[0].padded <= 8 * 256
    nothing = plan.Rows(repo / "docs").sft("train", 16, 256, given)[0]
    assert nothing == Batch(16 * 256, 16 * 256, 256)


@pytest.mark.parametrize(("folder", "names", "prefix"), [
    ("", ("memory.max", "memory.current"), ""),
    ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"),
])  # fmt: skip
def test_files_that_were_read_are_no_used_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, names: tuple[str, str], prefix: str
) -> None:
    """Of a container: the page cache counts as used, and gives way."""
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / names[0]).write_text("1000000\n")
    (tmp_path / folder / names[1]).write_text("900000\n")
    stat = f"anon 1\ninactive_file 7\n{prefix}inactive_file 500000\n{prefix}active_file 200000\n"
    (tmp_path / folder / "memory.stat").write_text(stat)
    monkeypatch.setattr(plan, "CGROUP", tmp_path)
    assert plan._ram() == (1000000, 800000)


@pytest.mark.parametrize(("driver", "cuda", "kind"), [
    ("580.65.06", "13.0", "cuda"), ("535.54.03", "13.0", "cpu"), ("535.54.03", "12.8", "cuda"), ("535.54.03", None, "cpu"),
])  # fmt: skip
def test_a_gpu_is_planned_for_where_the_driver_knows_torchs_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str, cuda: str | None, kind: str
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho 'NVIDIA L4, 23034, 22000, {driver}, GPU-1'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(plan, "_torch_cuda", lambda: cuda)
    device = plan.this_device()
    assert device.kind == kind
    if kind == "cuda":
        assert (device.name, device.free) == ("NVIDIA L4", 22000 * memory.MIB)
        assert device.ram is not None
    else:
        assert ("the driver 535.54.03 of NVIDIA L4 is too old for torch's CUDA 13.0" in device.name) is (
            cuda is not None
        )


BOTH = [["NVIDIA T4", "15360", "15000", "580.65", "GPU-aa1"], ["NVIDIA A100", "81920", "80000", "580.65", "GPU-bb2"]]


@pytest.mark.parametrize(("visible", "order", "card", "note"), [
    (None, "PCI_BUS_ID", 0, ""), ("1", "PCI_BUS_ID", 1, ""), ("1,0", "PCI_BUS_ID", 1, ""),
    (None, None, 0, "card 0 of nvidia-smi: CUDA may mean another one without CUDA_DEVICE_ORDER=PCI_BUS_ID"),
    ("1", "FASTEST_FIRST", 1, "card 1 of nvidia-smi: CUDA may mean another"),
    ("GPU-bb2", None, 1, ""), ("GPU-bb,GPU-aa1", None, 1, ""), ("GPU-c", None, None, "CUDA_VISIBLE_DEVICES=GPU-c names no GPU"),
    ("2", None, None, "CUDA_VISIBLE_DEVICES=2 names no GPU here"), ("-1,0", None, None, "names no GPU here"),
    ("MIG-cc3", None, 0, "nvidia-smi does not list MIG-cc3, give its memory with --memory"),
])  # fmt: skip
def test_the_card_is_the_one_that_cuda_means(
    visible: str | None, order: str | None, card: int | None, note: str
) -> None:
    row, said = plan._card(BOTH, visible, order)
    assert row == (None if card is None else BOTH[card])
    assert note in said
    assert bool(note) is bool(said)


def test_cards_of_one_kind_need_no_order() -> None:
    assert plan._card([BOTH[0], BOTH[0]], "1", None) == (BOTH[0], "")


def test_a_kind_of_device_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The processor of a machine with a GPU has other memory and another dtype; a GPU that is not here has no memory known."""
    asked: list[Device] = []

    def make(*_: object, device: Device, **__: object) -> plan.Plan:
        asked.append(device)
        return plan.Plan((), device)

    monkeypatch.setattr(plan, "make", make)
    gpu, cpu = (
        Device("cuda", "NVIDIA L4", 24 * GIB, 23 * GIB, ram=GIB),
        Device("cpu", "CPU", 8 * GIB, 4 * GIB, bf16=False),
    )
    monkeypatch.setattr(plan, "_cpu", lambda: cpu)
    monkeypatch.setattr(plan, "this_device", lambda: gpu)
    assert plan.main(["--device", "cpu"]) == plan.main(["--device", "cuda"]) == 0
    assert asked == [cpu, gpu]
    monkeypatch.setattr(plan, "this_device", lambda: cpu)
    assert plan.main(["--device", "cuda", "--memory", "24"]) == 0
    assert asked[-1] == Device("cuda", "a cuda device", 24 * GIB, 24 * GIB)
    with pytest.raises(SystemExit):
        plan.main(["--device", "cuda"])
    assert "there is no such GPU here: say how much memory it has, --memory GIB" in capsys.readouterr().err


def test_an_edited_file_is_named_in_its_own_letters(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    (repo / "data/raw").mkdir(parents=True)
    git = "git -c user.name=t -c user.email=t@example.org"
    run(f"git init -q && touch dvc.lock 'data/raw/용어.jsonl' && git add -A && {git} commit -qm one", repo)
    (repo / "data/raw/용어.jsonl").write_text("{}\n")
    (repo / "data/raw/새 것.jsonl").write_text("{}\n")
    assert plan._edited(repo, "data/raw") == ["data/raw/용어.jsonl", "data/raw/새 것.jsonl"]
