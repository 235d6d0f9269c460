"""What `sft` and `dpo` share: arguments for a trl trainer, checkpoints to resume from, curves, and an eye on bad signs."""

import hashlib
import json
import math
import os
import shutil
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from dvclive import Live
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks import fast, models, stage
from tasks.params import ADDED, UserError

CHECKPOINTS = Path(".checkpoints")
# of an event, not of the run's result: they differ between two equal runs, or between one and its resumption
EVENTFUL = ("runtime", "per_second", "total_flos", "num_tokens", "train_loss")


def arguments(given: dict[str, Any], seed: int, folder: Path, validated: bool) -> dict[str, Any]:
    """`given` (a section of params.yaml) with what reforge decides: precision, optimizer, paths, seeds.

    Args:
        folder: for checkpoints, see `checkpoint_folder`.
        validated: there are validation rows.
    """
    dtype, kind = models.compute_dtype(), models.device().type
    out: dict[str, Any] = {
        "optim": "paged_adamw_32bit",
        "logging_steps": 5,
        "save_total_limit": 2,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16 and kind == "cuda",
    }
    out |= {key: value for key, value in given.items() if key not in ADDED["sft"]}
    if "paged" in out["optim"] and kind != "cuda":
        print(f"optimizer: {out['optim']} pages to host memory and needs CUDA; on {kind} it is adamw_torch", flush=True)
        out["optim"] = "adamw_torch"
    else:
        print(f"optimizer: {out['optim']}", flush=True)
    if not validated:
        out |= {"eval_strategy": "no", "load_best_model_at_end": False}
    return out | {
        "output_dir": str(folder),
        "seed": seed,
        "data_seed": seed,
        "use_cpu": kind == "cpu",
        "report_to": "none",
        "dataloader_pin_memory": kind == "cuda",
        "save_only_model": False,
    }


def checkpoint_folder(name: str, inputs: Iterable[Path], settings: dict[str, Any]) -> Path:
    """A git-ignored folder keyed by everything the run depends on: a changed input never resumes an old run."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for path in inputs:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(file.name.encode())
                with file.open("rb") as handle:
                    digest.update(hashlib.file_digest(handle, "sha256").digest())
    return CHECKPOINTS / f"{name}-{digest.hexdigest()[:16]}"


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint: `trainer_state.json` is written last."""
    found = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    found.sort(key=lambda p: int(p.name.rsplit("-", 1)[-1]))
    return str(found[-1]) if found else None


def train(trainer: Any, folder: Path, given: dict[str, Any]) -> None:
    """Train, from the last checkpoint if there is one; checkpoints are removed when it is done.

    The adapter is trained in float32, and on a CPU by the paths of `tasks.fast`, unless `given` turns them off.
    """
    models.adapter_float32(trainer.model)
    if given.get("fast", True) and models.device().type == "cpu":
        fast.keep_pages()
        for note in fast.install(trainer.model):
            print(f"note: {note}", flush=True)
    resume = last_checkpoint(folder)
    if resume:
        print(f"resuming from {resume}", flush=True)
    trainer.train(resume_from_checkpoint=resume)
    runtime = next((e["train_runtime"] for e in reversed(trainer.state.log_history) if "train_runtime" in e), 0.0)
    tokens = max((e.get("num_tokens", 0.0) for e in trainer.state.log_history), default=0.0)
    stage.EVENT |= {
        "model_bytes": trainer.model.get_memory_footprint(),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "tokens": tokens,
        "tokens_per_second": None if resume or not runtime else round(tokens / runtime, 1),
        "resumed_from": resume,
    }
    shutil.rmtree(folder, ignore_errors=True)
    if CHECKPOINTS.is_dir() and not os.listdir(CHECKPOINTS):
        CHECKPOINTS.rmdir()


def early_stopping(given: dict[str, Any]) -> list[TrainerCallback]:
    if "early_stopping_patience" not in given:
        return []
    return [EarlyStoppingCallback(given["early_stopping_patience"], given.get("early_stopping_threshold", 0.0))]


class Curves(TrainerCallback):
    """Loss and metric curves as DVC plots (TSV through DVCLive), without anything that differs between equal runs.

    Written once, from the trainer's own history, which survives a resume.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        with Live(str(self.folder), save_dvc_exp=False, dvcyaml=None, report=None, monitor_system=False) as live:
            for entry in state.log_history:
                live.step = int(entry["step"])
                for name, value in sorted(entry.items()):
                    if name not in ("step", "epoch") and not any(part in name for part in EVENTFUL):
                        where, short = ("eval", name[5:]) if name.startswith("eval_") else ("train", name)
                        live.log_metric(f"{where}/{short}", float(value))
        (self.folder / "plots" / "metrics").rename(self.folder / "metrics")
        shutil.rmtree(self.folder / "plots")
        (self.folder / "metrics.json").unlink()


class Watch(TrainerCallback):
    """Names bad signs in plain words, with the usual cause; stops where going on is a waste.

    `notes` is what it saw, for the metrics of the stage.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.losses: list[float] = []
        self.validation: list[float] = []

    def say(self, note: str) -> None:
        self.notes.append(note)
        print(f"note: {note}", flush=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        loss, step = logs.get("loss"), state.global_step
        if loss is not None:
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at step {step}; usual causes: learning_rate too high, fp16 overflow (use bf16), a row without labels"
                )
            if len(self.losses) >= 5 and loss > 3 * statistics.median(self.losses[-10:]):
                self.say(
                    f"loss spike at step {step}: {loss:.3f} after a median of {statistics.median(self.losses[-10:]):.3f}; usual causes: learning_rate too high, too little warm-up, an odd batch"
                )
            self.losses.append(loss)
        if "eval_loss" in logs:
            self.validation.append(logs["eval_loss"])
            if len(self.validation) >= 2 and self.validation[-1] > min(self.validation) * 1.02:
                self.say(
                    f"validation loss rose to {self.validation[-1]:.3f} at step {step} from {min(self.validation):.3f}; usual cause: over-fitting (fewer epochs, lower learning_rate, more data)"
                )


def summary(trainer: Any, watch: Watch) -> dict[str, Any]:
    """Metrics of a finished training, the same for equal runs, resumed ones too; losses in nats per token."""
    state: TrainerState = trainer.state
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    validation = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    return {
        "steps": state.global_step,
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "eval_loss_first": validation[0] if validation else None,
        "eval_loss_best": min(validation) if validation else None,
        "eval_loss_last": validation[-1] if validation else None,
        "notes": watch.notes,
    }
