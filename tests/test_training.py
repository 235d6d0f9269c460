"""sft, reference, dpo and merge on the tiny model: the exact quantities, not "runs"."""

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainerState

from tasks import base as base_stage
from tasks import dpo, fast, merge, models, records, reference, render, sft, training
from tasks.params import Merge, Reference, Template, UserError
from tests.conftest import LORA, NF4, ROOT

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
}
CONVERSATIONS = [
    [
        {"role": "user", "content": f"What is thumb {i}?"},
        {"role": "assistant", "content": f"A short thumb, number {i}." * (1 + i % 3)},
    ]
    for i in range(16)
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # checkpoints go below the current folder


@pytest.fixture(scope="module")
def facts(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = models.load(tiny, None)
    path = tmp_path_factory.mktemp("facts") / "facts.json"
    path.write_text(json.dumps(base_stage.describe(model, render.load_tokenizer(tiny), "tiny", "none")))
    return path


@pytest.fixture(scope="module")
def rows(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = render.load_tokenizer(tiny)
    folder = tmp_path_factory.mktemp("rows")
    for name, part in (("train", CONVERSATIONS[:12]), ("validation", CONVERSATIONS[12:])):
        encoded = [render.encode(tokenizer, c, None) for c in part]
        table = pl.DataFrame(
            {
                "id": [str(i) for i in range(len(part))],
                "input_ids": [e[0] for e in encoded],
                "labels": [e[1] for e in encoded],
            }
        )
        records.write(table, folder / f"{name}.parquet")
    return folder


def _sft(tiny: Path, facts: Path, rows: Path, out: Path, **changes: Any) -> dict[str, Any]:
    out.mkdir(parents=True)
    given = SETTINGS | changes.pop("params", {})
    args = {"lora": LORA, "quantization": NF4, "seed": 3} | changes
    sft.run(tiny, facts, rows, out / "adapter", out / "plots", out / "metrics.json", params=given, **args)
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def trained(tiny: Path, facts: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sft") / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out.parent)  # two workers would have the same checkpoints
        _sft(tiny, facts, rows, out)
    return out


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_inputs_give_same_bytes_and_the_seed_matters(
    tiny: Path, facts: Path, rows: Path, trained: Path, tmp_path: Path
) -> None:
    result = _sft(tiny, facts, rows, tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(trained)
    assert result["loss_last"] < result["loss_first"]
    _sft(tiny, facts, rows, tmp_path / "other", seed=4)
    assert bytes_of(tmp_path / "other/adapter") != bytes_of(trained / "adapter")


def test_plots_hold_curves_and_no_event(trained: Path) -> None:
    plots = {str(p.relative_to(trained / "plots")) for p in (trained / "plots").rglob("*.tsv")}
    assert {"metrics/train/loss.tsv", "metrics/eval/loss.tsv"} <= plots
    assert not [name for name in plots if "runtime" in name or "per_second" in name]
    lines = (trained / "plots/metrics/train/loss.tsv").read_text().splitlines()
    assert len(lines) == 1 + 6
    assert not (Path.cwd() / ".checkpoints").exists()


def test_loss_is_the_mean_over_supervised_tokens_of_the_whole_batch(
    tiny: Path, facts: Path, rows: Path, tmp_path: Path
) -> None:
    """Accumulating twice two rows is one batch of four, though rows differ in length."""
    whole = _sft(
        tiny,
        facts,
        rows,
        tmp_path / "whole",
        quantization=None,
        params={"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential", "bf16": False},
    )
    parts = _sft(
        tiny,
        facts,
        rows,
        tmp_path / "parts",
        quantization=None,
        params={
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "train_sampling_strategy": "sequential",
            "bf16": False,
        },
    )
    assert parts["loss_first"] == pytest.approx(whole["loss_first"], rel=2e-3)
    table = records.read(rows / "train.parquet").head(4)
    model = models.load(tiny, None)
    total, count = 0.0, 0
    for ids, labels in table.select("input_ids", "labels").iter_rows():
        at = next(i for i, label in enumerate(labels) if label != render.IGNORED)
        scores = models.answer_logprobs(model, [(ids[:at], ids[at:])], 1)[0]
        total, count = total - sum(scores), count + len(scores)
    assert whole["loss_first"] == pytest.approx(total / count, rel=2e-3)


def test_whatever_changes_has_other_checkpoints(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(inputs: Path = rows, rate: float = 1.0) -> Path:
        return training.checkpoint_folder("sft", [inputs], {"learning_rate": rate})

    one = folder()
    assert one == folder()
    assert one != folder(rate=2.0)
    moved = tmp_path / "elsewhere"
    shutil.copytree(rows, moved)
    assert one == folder(moved)
    with (moved / "train.parquet").open("ab") as file:
        file.write(b"x")
    assert one != folder(moved)
    (tmp_path / "models.py").write_text("x = 1\n")
    with monkeypatch.context() as patch:  # an edit of the code
        patch.setattr(models, "__file__", str(tmp_path / "models.py"))
        assert one != folder()
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == "trl" else version(name))
    assert one != folder()


def test_not_a_number_stops_with_the_usual_causes() -> None:
    watch = training.Watch()
    state = type("State", (), {"global_step": 7})()
    with pytest.raises(UserError, match="loss is nan at step 7; usual causes: learning_rate"):
        watch.on_log(None, state, None, {"loss": math.nan})


def test_a_training_whose_loss_becomes_no_number_ends(tiny: Path, rows: Path, tmp_path: Path) -> None:
    """transformers would log the mean of the losses before it, and 0 in the end."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Breaks(SFTTrainer):
        def compute_loss(self, *args: Any, **more: Any) -> Any:
            found = super().compute_loss(*args, **more)
            return found * (math.nan if self.state.global_step == 2 and self.model.training else 1.0)

    given = {"max_steps": 6, "logging_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no"}
    settings = training.arguments(given, 0, tmp_path / "run", False) | {"max_length": None}
    table = records.read(rows / "train.parquet").select("input_ids", "labels").head(8)
    trainer = Breaks(
        model=models.new_adapter(models.load(tiny, None), {"r": 2}, 0),
        args=SFTConfig(**settings, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=Dataset.from_list(table.to_dicts()),
        processing_class=render.load_tokenizer(tiny),
        callbacks=[training.Watch()],
    )
    with pytest.raises(UserError, match="loss is nan at step 4; usual causes"):
        trainer.train()
    with pytest.raises(UserError, match="the validation loss is inf at step 4"):
        training.Watch().on_log(None, trainer.state, None, {"eval_loss": math.inf})


@pytest.mark.parametrize(("given", "times"), [({}, 1), ({"fast": True}, 1), ({"fast": False}, 0)])
def test_a_cpu_trains_by_the_fast_paths_unless_they_are_turned_off(
    tiny: Path,
    facts: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    times: int,
) -> None:
    installed: list[torch.nn.Module] = []
    real = fast.install
    monkeypatch.setattr(fast, "install", lambda model, **how: installed.append(model) or real(model, **how))
    _sft(tiny, facts, rows, tmp_path / "one", params=given | {"max_steps": 1, "eval_strategy": "no"})
    assert len(installed) == times


@pytest.mark.parametrize("quantization", [NF4, None])
def test_packed_weights_train_the_same(
    tiny: Path, facts: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: Any
) -> None:
    """The parameter has its effect, on every adapted layer and the head; losses differ by rounding only, in bf16 nothing does."""
    made: list[fast._Frozen] = []
    own = fast._Frozen._packed

    def noted(frozen: fast._Frozen, x: torch.Tensor) -> Any:
        made.extend([frozen] if own(frozen, x) and frozen not in made else [])
        return own(frozen, x)

    monkeypatch.setattr(fast._Frozen, "_packed", noted)
    params = {"max_steps": 3, "eval_strategy": "no"}
    every = 7 * json.loads(facts.read_text())["layers"] + 1
    half = models.compute_dtype() == torch.bfloat16
    out, found = {}, {}
    for pack, count in ((False, 0), (True, every), (None, every if half else 0)):
        made.clear()
        out[pack] = tmp_path / str(pack)
        asked = params | {"pack_weights": pack}
        found[pack] = _sft(tiny, facts, rows, out[pack], params=asked, quantization=quantization)
        assert len(made) == count
    assert found[True]["loss_first"] == pytest.approx(found[False]["loss_first"], rel=1e-2)
    assert found[True]["loss_last"] == pytest.approx(found[False]["loss_last"], rel=1e-2)
    assert bytes_of(out[None]) == bytes_of(out[False])
    if half:
        assert bytes_of(out[True]) == bytes_of(out[False])


@pytest.mark.parametrize(
    ("params", "said", "then"),
    [
        ({"fast": False}, "`fast` is off", ""),
        ({}, "oneDNN multiplies by no packed", "frozen weights are as they are (pack_weights)"),
    ],
)
def test_packing_without_effect_says_so(
    tiny: Path, facts: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], params: dict[str, Any], said: str, then: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(fast, "packs", lambda dtype: False)
    few = {"max_steps": 1, "eval_strategy": "no", "pack_weights": True}
    _sft(tiny, facts, rows, tmp_path / "out", params=few | params)
    out = capsys.readouterr().out
    assert f"note: pack_weights has no effect: {said}" in out
    assert then in out
    assert "weights are packed" not in out


def test_an_optimizer_that_is_not_installed_is_one_line(tiny: Path, facts: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"optim: grokadamw: .*pip install grokadamw"):
        _sft(tiny, facts, rows, tmp_path / "out", params={"optim": "grokadamw", "eval_strategy": "no"})


class Walks(TrainerCallback):
    """Of each step, the walks over all modules of the model; and the modes its modules are in, then and in a validation."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now: list[str] = []
        self.steps: list[list[str]] = []
        self.modes: dict[str, list[set[bool]]] = {"step": [], "validation": []}
        self.model: Any = None
        for name in ("named_modules", "train"):
            patch.setattr(torch.nn.Module, name, self.counted(name, getattr(torch.nn.Module, name)))

    def counted(self, name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def walk(module: Any, *args: Any, **named: Any) -> Any:
            self.now.append(name)
            return own(module, *args, **named)

        return walk

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.now, self.model = [], model

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.steps.append([*self.now])
        self.modes["step"].append({module.training for module in model.modules()})

    def on_prediction_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.modes["validation"].append({module.training for module in model.modules()})


def test_a_step_walks_over_no_modules(
    tiny: Path, facts: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What spares it neither keeps a validation from reaching every module nor outlives the training."""
    seen, given = Walks(monkeypatch), training.early_stopping
    monkeypatch.setattr(training, "early_stopping", lambda *named: [*given(*named), seen])
    _sft(tiny, facts, rows, tmp_path / "one", params={"logging_steps": 2})
    assert len(seen.steps) == 6
    assert [walks for number, walks in enumerate(seen.steps) if number % 3] == [[]] * 4  # not the first of an epoch
    assert seen.modes == {"step": [{True}] * 6, "validation": [{False}] * 2}
    base = seen.model.get_base_model()
    assert not {"parameters", "train", "num_parameters"} & ({*vars(seen.model)} | {*vars(base)})


def test_the_best_validation_is_the_lowest() -> None:
    logged: list[dict[str, float]] = [
        {"loss": 3.0},
        {"eval_loss": 2.0},
        {"eval_loss": 1.0},
        {"loss": 0.5},
        {"eval_loss": 1.5},
    ]
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=9, log_history=logged), model=torch.nn.Linear(2, 3))
    assert training.summary(trainer, training.Watch()) == {
        "steps": 9, "trainable_parameters": 9, "loss_first": 3.0, "loss_last": 0.5, "eval_loss_first": 2.0,
        "eval_loss_best": 1.0, "eval_loss_last": 1.5, "notes": [],
    }  # fmt: skip


def test_early_stopping_needs_no_best_model(tmp_path: Path) -> None:
    given = {"early_stopping_patience": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings = training.arguments(given, 0, tmp_path, True)
    assert settings["metric_for_best_model"] == "loss"
    assert "metric_for_best_model" not in training.arguments({}, 0, tmp_path, True)


@pytest.mark.parametrize(
    ("asked", "used"),
    [
        ("paged_adamw_32bit", "adamw_torch_fused"),
        ("paged_adamw_8bit", "adamw_torch_fused"),
        ("paged_lion_32bit", "lion_32bit"),
        ("paged_lion_8bit", "lion_8bit"),
        ("paged_ademamix_32bit", "ademamix"),
        ("paged_ademamix_8bit", "ademamix_8bit"),
        ("rmsprop_bnb_8bit", "rmsprop_bnb_8bit"),
    ],
)
def test_an_optimizer_off_cuda_is_of_the_same_algorithm(
    asked: str, used: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And takes a step: bitsandbytes 0.50.2 has kernels for the CPU, but none for MPS in 8 bits."""
    assert used in list(transformers.training_args.OptimizerNames)
    assert training.arguments({"optim": asked}, 0, tmp_path, False)["optim"] == used
    layer = torch.nn.Linear(64, 80, bias=False)  # of fewer than 4,096 weights the state is in 32 bits
    before = layer.weight.detach().clone()
    given = transformers.TrainingArguments(output_dir=str(tmp_path), optim=used, use_cpu=True, report_to="none")
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(given, layer)
    optimizer = kind(layer.parameters(), **settings)
    layer(torch.ones(1, 64)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)
    states = {t.dtype for t in optimizer.state[layer.weight].values() if isinstance(t, torch.Tensor)}
    assert (torch.uint8 in states) == ("8bit" in used) == (used in training.EIGHT_BITS)
    monkeypatch.setattr(models, "device", lambda: torch.device("mps"))
    with (
        pytest.raises(UserError, match=r"optim: .*_8bit does not run on mps")
        if "8bit" in used
        else contextlib.nullcontext()
    ):
        training.arguments({"optim": asked}, 0, tmp_path, False)


def test_spikes_and_overfitting_are_named() -> None:
    watch = training.Watch()
    state = type("State", (), {"global_step": 7})()
    for loss in (1.0, 1.1, 0.9, 1.0, 1.0, 5.0):
        watch.on_log(None, state, None, {"loss": loss})
    for loss in (1.0, 0.9, 1.2):
        watch.on_log(None, state, None, {"eval_loss": loss})
    assert "loss spike at step 7" in watch.notes[0]
    assert "over-fitting" in watch.notes[1]


@pytest.fixture(scope="module")
def scored(tiny: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    pairs = [
        {
            "id": f"{i:016x}",
            "concept": str(i),
            "kind": "known",
            "messages": c[:1],
            "chosen": "Kindly, " + c[1]["content"],
            "rejected": c[1]["content"],
            "part": "train" if i < 12 else "validation",
        }
        for i, c in enumerate(CONVERSATIONS)
    ]
    schema = {"messages": pl.List(records.MESSAGE)}
    records.write(pl.DataFrame(pairs, schema_overrides=schema), folder / "pairs.parquet")
    return _score(tiny, trained / "adapter", folder / "pairs.parquet", folder)


def _score(tiny: Path, adapter: Path, pairs: Path, folder: Path) -> Path:
    """`pairs` under the reference `adapter`."""
    out = folder / "scored.parquet"
    settings = {"params": Reference(), "template": Template(), "quantization": NF4}
    reference.run(pairs, tiny, adapter, out, folder / "scored.json", **settings)
    return out


def _dpo(
    tiny: Path, adapter: Path, pairs: Path, out: Path, quantization: dict[str, Any] | None = NF4, **changes: Any
) -> dict[str, Any]:
    out.mkdir(parents=True)
    given = SETTINGS | {"learning_rate": 1e-3, "beta": 0.3} | changes
    dpo.run(
        tiny,
        adapter,
        pairs,
        out / "adapter",
        out / "plots",
        out / "metrics.json",
        params=given,
        quantization=quantization,
        seed=3,
    )
    return json.loads((out / "metrics.json").read_text())


def test_reference_scores_are_sums_over_the_answer(tiny: Path, trained: Path, scored: Path) -> None:
    model = models.load_adapter(models.load(tiny, NF4), trained / "adapter", trainable=False)
    row = records.read(scored).row(0, named=True)
    ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
    dtype = models.compute_dtype()
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(ids).logits[0].float().log_softmax(-1)
    start = len(row["prompt_ids"])
    wanted = sum(logits[start - 1 + i, token].item() for i, token in enumerate(row["chosen_ids"]))
    assert row["ref_chosen_logps"] == pytest.approx(wanted, rel=2e-2)
    assert row["chosen_ids"][-1] == model.config.eos_token_id


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_score_that_is_no_number_is_no_reference(
    tiny: Path, trained: Path, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.setattr(models, "answer_logprobs", lambda _, asked, *__, **___: [[-1.0]] * (len(asked) - 1) + [[value]])
    with pytest.raises(
        UserError, match=f"pair 0{{15}}f: the reference's log-probability of its rejected answer is {value}"
    ):
        _score(tiny, trained / "adapter", scored.with_name("pairs.parquet"), tmp_path)
    assert not (tmp_path / "scored.parquet").exists()


def test_dpo_starts_at_log_two_learns_and_repeats(tiny: Path, trained: Path, scored: Path, tmp_path: Path) -> None:
    one = _dpo(tiny, trained / "adapter", scored, tmp_path / "one")
    assert one["loss_first"] == pytest.approx(math.log(2), abs=0.03)
    assert one["loss_last"] < one["loss_first"]
    assert one["rewards_accuracies"] > 0.5
    assert one["kl_to_reference"] > 0
    _dpo(tiny, trained / "adapter", scored, tmp_path / "two")
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    assert bytes_of(tmp_path / "one/adapter") != bytes_of(trained / "adapter")
    assert "metrics/eval/kl_to_reference.tsv" in bytes_of(tmp_path / "one/plots")


def test_dpo_leaves_only_the_adapter_trainable(tiny: Path, trained: Path, scored: Path, tmp_path: Path) -> None:
    metrics = _dpo(tiny, trained / "adapter", scored, tmp_path / "one", num_train_epochs=1)
    adapter = models.load_adapter(models.load(tiny, None), trained / "adapter", trainable=True)
    assert metrics["trainable_parameters"] == sum(p.numel() for p in adapter.parameters() if p.requires_grad)


def test_dpo_starts_from_the_adapter_that_sft_left(tiny: Path, trained: Path, scored: Path, tmp_path: Path) -> None:
    """trl rounds what is trained on a quantised base to bf16, 4e-3 of each value."""
    metrics = _dpo(tiny, trained / "adapter", scored, tmp_path / "one", learning_rate=1e-12, weight_decay=0.0)
    assert metrics["kl_to_reference"] == pytest.approx(0, abs=1e-7)  # the copy that is the reference, too
    before, after = (load_file(f / "adapter/adapter_model.safetensors") for f in (trained, tmp_path / "one"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("lora", [LORA, LORA | {"modules_to_save": ["lm_head"]}], ids=["layers", "the head too"])
@pytest.mark.parametrize("scored", [models.SCORED, 2], ids=["at once", "in pieces"])
@pytest.mark.filterwarnings("ignore:.*tied:UserWarning")
def test_kl_to_reference_is_that_of_each_chosen_token(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any], scored: int
) -> None:
    """By hand from whole logits, and far from what the other direction, the other side, or a mean of rows would be."""
    from datasets import Dataset

    monkeypatch.setattr(models, "SCORED", scored)
    model = models.new_adapter(models.load(tiny, None).float(), lora, 0)
    model.add_adapter("ref", model.peft_config["default"])
    with torch.no_grad():
        for seed, (name, spread) in enumerate({"default": 0.3, "ref": 0.1}.items()):
            drawn = torch.Generator().manual_seed(seed)
            for key, parameter in model.named_parameters():
                if f"lora_B.{name}" in key or f"modules_to_save.{name}" in key:
                    parameter.add_(torch.randn(parameter.shape, generator=drawn), alpha=spread)
    model.set_adapter("default")
    rows = [
        {"prompt_ids": [1, 5, 9], "chosen_ids": [7, 2], "rejected_ids": [8, 8, 2]},
        {"prompt_ids": [1, 4], "chosen_ids": [8, 20, 30, 9, 2], "rejected_ids": [3, 2]},
        {"prompt_ids": [1, 3, 3, 6], "chosen_ids": [2], "rejected_ids": [11, 12, 13, 2]},
    ]
    trainer = SimpleNamespace(
        model=model,
        eval_dataset=Dataset.from_list(rows),
        args=SimpleNamespace(per_device_eval_batch_size=2),
        accelerator=SimpleNamespace(autocast=contextlib.nullcontext),
    )
    most: list[int] = []
    model.get_base_model().lm_head.register_forward_hook(lambda _, given, __: most.append(len(given[0])))
    found = dpo.CachedReferenceTrainer.kl_to_reference(trainer)
    assert max(most) == min(scored, 7)  # of the two longest rows
    assert model.active_adapter == "default"

    def logps(adapter: str, prompt: list[int], answer: list[int]) -> torch.Tensor:
        model.set_adapter(adapter)
        with torch.no_grad():
            return model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)

    def kl(one: str, other: str, side: str) -> list[torch.Tensor]:
        """Of each token, by row."""
        both = [[logps(name, row["prompt_ids"], row[side]) for name in (one, other)] for row in rows]
        return [(p.exp() * (p - q)).sum(-1) for p, q in both]

    wanted = kl("default", "ref", "chosen_ids")
    assert found == pytest.approx(float(torch.cat(wanted).mean()), rel=1e-4)
    wrong = (
        torch.cat(kl("ref", "default", "chosen_ids")).mean(),
        torch.cat(kl("default", "ref", "rejected_ids")).mean(),
        torch.stack([row.mean() for row in wanted]).mean(),
        torch.cat(wanted).sum(),
    )
    assert [float(value) for value in wrong if abs(value / found - 1) < 0.02] == []


@pytest.mark.parametrize("computing", [torch.float32, torch.bfloat16])
def test_dpo_computes_in_the_precision_of_its_reference(
    monkeypatch: pytest.MonkeyPatch, computing: torch.dtype
) -> None:
    monkeypatch.setattr(models, "compute_dtype", lambda: computing)
    bf16 = computing == torch.bfloat16
    dpo.check_precision({"bf16": bf16, "fp16": False})
    dpo.check_precision({})
    said = rf"dpo\.bf16: expected {bf16}, found {not bf16}: .* in {computing}".lower().replace("torch.", "")
    with pytest.raises(UserError, match=said):
        dpo.check_precision({"bf16": not bf16})
    with pytest.raises(UserError, match=r"dpo\.fp16: expected false, found true"):
        dpo.check_precision({"fp16": True})


def test_another_precision_is_refused_before_a_model_is_loaded(
    tiny: Path, trained: Path, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(models, "load")
    other = {key: not value for key, value in training.precision().items()}
    with pytest.raises(UserError, match=r"dpo\.bf16: expected"):
        _dpo(tiny, trained / "adapter", scored, tmp_path / "one", **other)


def test_a_validation_leaves_trainable_what_was(
    tiny: Path, facts: Path, rows: Path, scored: Path, tmp_path: Path
) -> None:
    """A whole module that is trained beside the adapter, too; the second epoch would stop training it."""
    lora = LORA | {"modules_to_save": ["norm"]}
    _sft(tiny, facts, rows, tmp_path / "sft", lora=lora, params={"num_train_epochs": 1})
    _dpo(
        tiny,
        tmp_path / "sft/adapter",
        _score(tiny, tmp_path / "sft/adapter", scored.with_name("pairs.parquet"), tmp_path),
        tmp_path / "dpo",
    )
    trained = models.load_adapter(models.load(tiny, None), tmp_path / "dpo/adapter", trainable=True)
    metrics = json.loads((tmp_path / "dpo/metrics.json").read_text())
    assert metrics["trainable_parameters"] == sum(p.numel() for p in trained.parameters() if p.requires_grad)


def test_without_validation_rows(tiny: Path, facts: Path, rows: Path, scored: Path, tmp_path: Path) -> None:
    """Few rows of one's own may leave none for it; early stopping and the best epoch have nothing to go by then."""
    few = tmp_path / "few"
    few.mkdir()
    records.write(records.read(rows / "train.parquet"), few / "train.parquet")
    records.write(records.read(rows / "validation.parquet").head(0), few / "validation.parquet")
    watched = {"early_stopping_patience": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    found = _sft(tiny, facts, few, tmp_path / "sft", params=watched)
    assert found["steps"] == 6
    assert found["eval_loss_best"] is None
    pairs = _score(tiny, tmp_path / "sft/adapter", scored.with_name("pairs.parquet"), tmp_path)
    records.write(records.read(pairs).with_columns(part=pl.lit("train")), few / "pairs.parquet")
    found = _dpo(tiny, tmp_path / "sft/adapter", few / "pairs.parquet", tmp_path / "dpo", **watched)
    assert "kl_to_reference" not in found


def test_fewer_steps_than_are_logged(tiny: Path, facts: Path, rows: Path, tmp_path: Path) -> None:
    one = _sft(tiny, facts, rows, tmp_path / "one", params={"logging_steps": 5, "max_steps": 3})
    assert one["steps"] == 3
    assert one["loss_first"] == one["loss_last"] > 0


class Killed(BaseException):
    """As a signal: nothing but the interpreter's own handlers see it."""


class Kill(TrainerCallback):
    """Ends the run after an optimizer step, before anything is logged, saved or evaluated."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def kill_at(patch: pytest.MonkeyPatch, step: int | None) -> None:
    """None: when the training is over and its adapter is about to be written."""
    if step is None:

        def killed(*_: Any) -> None:
            raise Killed

        patch.setattr(models, "save_adapter", killed)
    else:
        given = training.early_stopping
        patch.setattr(training, "early_stopping", lambda *named: [*given(*named), Kill(step)])


def checkpoints() -> list[str]:
    return sorted(p.name for p in Path(".checkpoints").glob("*/checkpoint-*"))


# 12 rows in batches of 2: 6 steps an epoch, 2 epochs
RANDOM = {"per_device_train_batch_size": 2, "logging_steps": 5}
STEPS = RANDOM | {"save_strategy": "steps", "save_steps": 2}
BEST = STEPS | {
    "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
    "greater_is_better": False, "early_stopping_patience": 2,
}  # fmt: skip
BY_LENGTH = {"train_sampling_strategy": "group_by_length"}  # of sft only; dpo's rows are shuffled
WORSE = BEST | {"greater_is_better": True}  # the loss falls, so that the first one stays the best: it stops early


@pytest.mark.parametrize(
    ("stages", "params", "kills", "left"),
    [
        pytest.param("sft dpo", RANDOM, [9], "checkpoint-6", id="at the start of an epoch"),
        pytest.param("sft dpo", STEPS, [5, 11], "checkpoint-10", id="twice, within an epoch, between two logs"),
        pytest.param(
            "sft",
            STEPS | {"gradient_accumulation_steps": 2, "logging_steps": 1},
            [5],
            "checkpoint-4",
            id="accumulating",
        ),
        pytest.param(
            "sft", STEPS | {"save_steps": 3}, [8], "checkpoint-3", id="saved before the validation of its epoch"
        ),
        pytest.param("sft", STEPS | {"max_steps": 9}, [None], "checkpoint-8", id="saved before the last validation"),
        pytest.param("sft dpo", BEST, [9], "checkpoint-8", id="the best is to be kept"),
        pytest.param("sft", WORSE, [5], "checkpoint-4", id="patience half used up"),
        pytest.param("sft", WORSE | {"eval_on_start": True}, [5], "checkpoint-4", id="validated before the first step"),
        pytest.param("sft dpo", WORSE, [None], "checkpoint-6", id="stopped early, nothing written"),
    ],
)
def test_resumed_it_gives_the_same_bytes(
    stages: str, params: dict[str, Any], kills: list[int | None], left: str, tiny: Path, facts: Path, rows: Path, trained: Path, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    dropout = {"lora_dropout": 0.2}  # draws from the random state at every step
    shutil.copytree(trained / "adapter", tmp_path / "start")
    config = json.loads((tmp_path / "start/adapter_config.json").read_text())
    (tmp_path / "start/adapter_config.json").write_text(json.dumps(config | dropout))

    def train(stage: str, out: Path) -> dict[str, Any]:
        if stage == "sft":
            return _sft(tiny, facts, rows, out, lora=LORA | dropout, params=BY_LENGTH | params)
        return _dpo(tiny, tmp_path / "start", scored, out, **params)

    for stage in stages.split():
        whole = train(stage, tmp_path / stage / "whole")
        for number, step in enumerate(kills):
            with monkeypatch.context() as patch:
                kill_at(patch, step)
                with pytest.raises(Killed):
                    train(stage, tmp_path / stage / f"broken-{number}")
        assert left in checkpoints()
        capfd.readouterr()
        assert train(stage, tmp_path / stage / "resumed") == whole
        assert f"/{left}\n" in capfd.readouterr().out
        assert bytes_of(tmp_path / stage / "resumed") == bytes_of(tmp_path / stage / "whole")
        assert not Path(".checkpoints").exists()


def _checkpoint(folder: Path, step: int, best: str | None = None) -> Path:
    """Whole, as `training.Checkpoints` leaves it, without a model."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"):
        (path / name).write_bytes(f"{name} {step}".encode())
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.iterdir()}
    (path / training.SEAL).write_text(json.dumps({"files": files, "best": best}))
    return path


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda p: (p / training.SEAL).unlink(), id="killed while it was written"),
        pytest.param(lambda p: (p / training.SEAL).write_text('{"files": {"optim'), id="torn seal"),
        pytest.param(lambda p: (p / "trainer_state.json").write_text('{"epoch": 1.'), id="torn state"),
        pytest.param(lambda p: os.truncate(p / "optimizer.pt", 0), id="empty after a power loss"),
        pytest.param(lambda p: (p / "rng_state.pth").unlink(), id="missing file"),
        pytest.param(lambda p: flip(p / "adapter_model.safetensors"), id="flipped bit"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_none(harm: Callable[[Path], object], tmp_path: Path) -> None:
    _checkpoint(tmp_path, 9)
    harm(_checkpoint(tmp_path, 10))
    assert training.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    assert not (tmp_path / "checkpoint-10").exists()


def test_a_checkpoint_whose_best_is_gone_is_none(tmp_path: Path) -> None:
    """transformers would go on, and in the end keep the last weights instead."""
    assert training.last_checkpoint(tmp_path) is None
    best = _checkpoint(tmp_path, 2, best=str(tmp_path / "checkpoint-2"))
    _checkpoint(tmp_path, 4, best=str(best))
    assert training.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    flip(best / "adapter_model.safetensors")
    assert training.last_checkpoint(tmp_path) is None


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_the_order_of_a_checkpoints_files_is_that_of_transformers_5_23() -> None:
    """While trainer_state.json is written after the optimizer and neither atomically nor synced, `whole.json` is needed."""
    source = inspect.getsource(Trainer._save_checkpoint)
    order = ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state", "save_to_json", "rotate_checkpoints"]
    assert sorted(order, key=source.index) == order
    assert "fsync" not in inspect.getsource(TrainerState.save_to_json)


def test_the_profile_looks_for_functions_that_are_there() -> None:
    """What `bench` counts as loading and saving: a name that is gone counts as work."""
    parts = runpy.run_path(str(ROOT / "bench/profile/sitecustomize.py"))["PARTS"]
    sources = [*(ROOT / "tasks").glob("*.py"), *Path(transformers.__file__).parent.glob("*.py")]
    sources += Path(transformers.__file__).parent.glob("models/auto/*.py")
    for file, function in {place for places in parts.values() for place in places}:
        if not file.startswith("<"):
            found = "".join(path.read_text() for path in sources if path.name == file)
            assert re.search(rf"^\s*def {function}\(", found, re.MULTILINE), (file, function)


def test_a_foreign_reference_is_refused(tiny: Path, facts: Path, rows: Path, scored: Path, tmp_path: Path) -> None:
    _sft(tiny, facts, rows, tmp_path / "other", seed=9, params={"num_train_epochs": 4})
    with pytest.raises(UserError, match="not those of this policy"):
        _dpo(tiny, tmp_path / "other/adapter", scored, tmp_path / "dpo")


def test_collapse_of_chosen_logprobs_stops() -> None:
    """40 nats are a collapse of an answer of 30 tokens, and a drift of one of 300."""
    state = type("State", (), {"global_step": 50})()
    args = type("Args", (), {"beta": 0.1})()
    short, long = dpo.Watch(30.0), dpo.Watch(300.0)
    for _ in range(3):
        long.on_log(args, state, None, {"rewards/chosen": -4.0})
    short.on_log(args, state, None, {"rewards/chosen": -4.0})
    with pytest.raises(UserError, match=r"chosen log-probabilities collapse: 1\.3 nats per token below"):
        short.on_log(args, state, None, {"rewards/chosen": -4.0})


@pytest.mark.parametrize(
    ("off", "refused"), [(0.3, None), (3.0, r"0\.194 nats per token apart"), (math.nan, "nan nats per token apart")]
)
def test_the_reference_is_checked_over_all_tokens(
    monkeypatch: pytest.MonkeyPatch, off: float, refused: str | None
) -> None:
    """Noise in an answer of two tokens is none of the policy; an offset in all of them is."""
    lengths = [2, 20, 20, 20]
    rows = [{"prompt_ids": [1], "chosen_ids": [2] * n, "ref_chosen_logps": -1.0 * n - off} for n in lengths]
    model = SimpleNamespace(eval=lambda: None, train=lambda: None)
    trainer: Any = SimpleNamespace(
        train_dataset=rows, model=model, accelerator=SimpleNamespace(autocast=contextlib.nullcontext)
    )
    monkeypatch.setattr(models, "answer_logprobs", lambda *_: [[-1.0] * n for n in lengths])
    with pytest.raises(UserError, match=refused) if refused else contextlib.nullcontext():
        dpo.check_reference(trainer)


def test_a_step_that_recovers_is_no_collapse() -> None:
    watch = dpo.Watch(20)
    state = SimpleNamespace(global_step=50)
    args = SimpleNamespace(beta=0.1)
    for reward in (-4.0, -1.0, -4.0, 0.5, -4.0):
        watch.on_log(args, state, None, {"rewards/chosen": reward})
    with pytest.raises(UserError, match=r"chosen log-probabilities collapse: 2\.5 nats per token below"):
        watch.on_log(args, state, None, {"rewards/chosen": -5.0})


def test_a_finished_run_to_start_from_is_refused() -> None:
    """Policy and reference that are equal give log 2 at first, not 0."""
    args = SimpleNamespace(beta=0.1)
    logs = {"loss": 0.0, "rewards/chosen": 0.0}
    dpo.Watch(20).on_log(args, SimpleNamespace(global_step=1), None, logs | {"loss": math.log(2)})
    dpo.Watch(20).on_log(args, SimpleNamespace(global_step=2), None, logs)
    with pytest.raises(UserError, match="the loss is 0 at step 1"):
        dpo.Watch(20).on_log(args, SimpleNamespace(global_step=1), None, logs)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Validated rows, of which the card reads source and licence."""
    path = tmp_path_factory.mktemp("sources") / "records.parquet"
    turns = [{"role": "user", "content": "What is a thumb?"}, {"role": "assistant", "content": "A finger."}]
    row = {"kind": "chat", "source": "data/raw/own.jsonl", "line": 1, "license": "CC-BY-4.0", "concept": "c", "topic": "t",
           "task": "answer", "messages": turns}  # fmt: skip
    records.write(records.frame([row]), path)
    return path


@pytest.fixture
def merged(facts: Path, trained: Path, rows: Path, sources: Path, tmp_path: Path) -> Callable[..., str]:
    """`merge` of the trained adapter into a base, to `model` and `metrics.json` in the test's folder."""

    def run(base: Path, *settings: Any) -> str:
        inputs = base, facts, trained / "adapter", trained / "metrics.json", rows, sources
        return merge.run(*inputs, tmp_path / "model", tmp_path / "metrics.json", *settings)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_measures_both_and_keeps_the_closer(
    tiny: Path, trained: Path, merged: Callable[..., str], tmp_path: Path, dtype: torch.dtype
) -> None:
    """The merged model is saved in the dtype of the base's files, whatever this machine computes in."""
    stored = shutil.copytree(tiny, tmp_path / "base")
    models.load(tiny, None).to(dtype).save_pretrained(stored)
    merged(stored, Merge(max_kl=1.0), NF4, Template(system="You explain."))
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["kept"] == "dequantized"
    assert found["candidates"]["dequantized"]["kl"] < found["candidates"]["16bit"]["kl"]
    listed = sorted(p.name for p in (tmp_path / "model").iterdir())
    assert "data/raw/own.jsonl: CC-BY-4.0." in (tmp_path / "model/README.md").read_text()
    assert found["prompt"] == {"system": "You explain.", "question": ""}  # a user's own row is not published
    assert listed == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    reloaded = models.load(tmp_path / "model", None)
    again = models.cast(models.load_merged(stored, trained / "adapter", NF4), models.compute_dtype())
    frequencies = [m.model.rotary_emb.inv_freq for m in (reloaded, again)]
    assert torch.equal(*frequencies)  # not rounded with the weights, as `Module.to` does
    assert frequencies[1].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(reloaded.parameters(), again.parameters(), strict=True))
    with safe_open(tmp_path / "model/model.safetensors", "pt") as saved:
        assert {saved.get_tensor(name).dtype for name in saved.keys()} == {dtype}  # noqa: SIM118  (no mapping)
    assert f"torch.{json.loads((tmp_path / 'model/config.json').read_text())['dtype']}" == str(dtype)
    assert "quantization_config" not in json.loads((tmp_path / "model/config.json").read_text())


def test_merge_fails_above_its_limit(tiny: Path, merged: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"more than merge\.max_kl"):
        # in 32 bits the closer one may be no further than 0
        merged(tiny, Merge().model_copy(update={"max_kl": -1.0}), NF4, Template())
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("found", "kept"), [((math.nan, 0.5), "16bit"), ((0.5, math.nan), "dequantized"), ((math.nan, math.inf), None)]
)
def test_what_can_not_be_compared_is_not_kept(
    tiny: Path, merged: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    found: tuple[float, float], kept: str | None,
) -> None:  # fmt: skip
    """NaN is neither less nor more than any limit."""
    left = list(found)
    monkeypatch.setattr(merge, "compare", lambda target, _: {"kl": left.pop(0), "top1": 1.0})
    monkeypatch.setattr(merge, "_distributions", lambda *_: [])
    refused = pytest.raises(UserError, match="nan nats per token from the adapter on its base: some of its logits")
    with contextlib.nullcontext() if kept else refused:
        merged(tiny, Merge(max_kl=1.0), NF4, Template())
    assert (tmp_path / "model").exists() == bool(kept)
    assert kept in (None, json.loads((tmp_path / "metrics.json").read_text())["kept"])


def test_a_merged_model_ends_where_its_evaluation_does(tiny: Path, merged: Callable[..., str], tmp_path: Path) -> None:
    """Whoever serves it reads generation_config.json alone: the token trained on, and those of the model."""
    stored = shutil.copytree(tiny, tmp_path / "base")
    config = json.loads((stored / "generation_config.json").read_text()) | {"eos_token_id": 7}
    (stored / "generation_config.json").write_text(json.dumps(config))
    merged(stored, Merge(max_kl=1.0), None, Template())
    ends = json.loads((tmp_path / "model/generation_config.json").read_text())["eos_token_id"]
    assert ends == sorted({7, render.load_tokenizer(tiny).eos_token_id})


def test_what_merge_compares_fits_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = {"id": pl.String, "input_ids": pl.List(pl.Int32), "labels": pl.List(pl.Int32)}
    table = pl.DataFrame([(str(i), [1, 2, 3, 4], [-100, 2, 3, 4]) for i in range(9)], schema, orient="row")
    records.write(table, tmp_path / "rows.parquet")
    monkeypatch.setattr(merge, "MOST_TOKENS", 8)
    assert merge.answers(tmp_path / "rows.parquet", 9) == [([1], [2, 3, 4])] * 2 + [([1], [2, 3])]


def test_kl_of_a_distribution_to_itself_is_zero() -> None:
    some = [torch.randn(3, 11, generator=torch.Generator().manual_seed(0)).log_softmax(-1)]
    other = [torch.randn(3, 11, generator=torch.Generator().manual_seed(1)).log_softmax(-1)]
    assert merge.compare(some, some) == {"kl": 0.0, "top1": 1.0}
    wanted = torch.nn.functional.kl_div(other[0], some[0], log_target=True, reduction="batchmean")
    assert merge.compare(some, other)["kl"] == pytest.approx(float(wanted), abs=1e-5)


def test_top1_is_how_many_tokens_have_the_same_likeliest() -> None:
    def likeliest(*tokens: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(tokens), 5).float().log_softmax(-1)

    found = merge.compare([likeliest(0, 1, 2), likeliest(3)], [likeliest(0, 1, 4), likeliest(2)])
    assert found["top1"] == 0.5


@pytest.mark.parametrize(
    ("kind", "section", "given", "said"),
    [
        ("SFTConfig", "sft", {"optim": "adamm"}, "sft: adamm is not a valid OptimizerNames"),
        ("DPOConfig", "dpo", {"eval_strategy": "never"}, "dpo: never is not a valid IntervalStrategy"),
    ],
)
def test_what_the_library_refuses_is_one_line(kind: str, section: str, given: dict[str, str], said: str) -> None:
    import trl

    with pytest.raises(UserError, match=said):
        training.config(getattr(trl, kind), section, given | {"output_dir": "out", "use_cpu": True})


def test_of_several_visible_gpus_one_is_used(tmp_path: Path) -> None:
    """Without a launcher transformers would take DataParallel, which trl refuses. No GPU here: their number is given."""
    import trl

    def two(**given: Any) -> Any:
        made = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, **given)
        assert made.n_gpu == 0
        vars(made)["_n_gpu"] = 2
        return made

    assert training.config(two, "sft", {}).n_gpu == 1
