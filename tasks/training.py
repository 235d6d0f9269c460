"""What `sft` and `dpo` share: arguments for a trl trainer, checkpoints to resume from, curves, and an eye on bad signs."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import random
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from dvclive import Live
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks import fast, models, stage
from tasks.params import ADDED, UserError, unpaged

Config = TypeVar("Config")
CHECKPOINTS = Path(".checkpoints")
SEAL = "whole.json"  # of a checkpoint, written last
LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
# of an event, not of the run's result: they differ between two equal runs, or between one and its resumption
EVENTFUL = ("runtime", "per_second", "total_flos", "num_tokens", "train_loss")

# optimizers of bitsandbytes 0.50.2 with state in 8 bits: for CUDA and CPUs, for MPS it has no kernel
EIGHT_BITS = ("adamw_bnb_8bit", "adamw_8bit", "ademamix_8bit", "lion_8bit", "rmsprop_bnb_8bit")
NO_NUMBER = "usual causes: learning_rate too high, fp16 overflow (use bf16), a row without labels"


def arguments(given: dict[str, Any], seed: int, folder: Path, validated: bool) -> dict[str, Any]:
    """`given` (a section of params.yaml) with what reforge decides: precision, optimizer, paths, seeds.

    Args:
        folder: for checkpoints, see `checkpoint_folder`.
        validated: there are validation rows.

    Raises:
        UserError: the optimizer can't run on this device.
    """
    kind = models.device().type
    out: dict[str, Any] = {
        "optim": "paged_adamw_32bit",
        "logging_steps": 5,
        "save_total_limit": 2,
        "report_to": "none",
        **precision(),
    }
    out |= {key: value for key, value in given.items() if key not in ADDED["sft"]}
    if "paged" in out["optim"] and kind != "cuda":
        plain = unpaged(out["optim"])
        print(f"optimizer: {out['optim']} pages to host memory and needs CUDA; on {kind} it is {plain}", flush=True)
        out["optim"] = plain
    else:
        print(f"optimizer: {out['optim']}", flush=True)
    if kind == "mps" and out["optim"] in EIGHT_BITS:
        raise UserError(f"optim: {out['optim']} does not run on mps: bitsandbytes has no kernel for it; take 32 bits")
    if "early_stopping_patience" in given:
        out.setdefault("metric_for_best_model", "loss")
    if not validated:
        out |= {"eval_strategy": "no", "load_best_model_at_end": False}
    return (
        out
        | {
            "output_dir": str(folder),
            "seed": seed,
            "data_seed": seed,
            "use_cpu": kind == "cpu",
            "dataloader_pin_memory": kind == "cuda",
            "save_only_model": False,
            "logging_nan_inf_filter": False,  # it would put the mean of the losses before in the place of one that is no number
        }
    )


def precision() -> dict[str, bool]:
    """What a trainer multiplies in, unless it is told otherwise: as `models.compute_dtype`."""
    dtype = models.compute_dtype()
    return {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16 and models.device().type == "cuda"}


def config(kind: Callable[..., Config], section: str, given: dict[str, Any]) -> Config:
    """`kind(**given)`, for one GPU of a process: a value that the library itself refuses is the user's mistake.

    Raises:
        UserError: naming the section, in the library's words.
    """
    try:
        made = kind(**given)
    except ValueError as error:
        raise UserError(f"params.yaml: {section}: {' '.join(str(error).split())[:300]}") from None
    if getattr(made, "n_gpu", 0) > 1:  # that many are visible: transformers would take DataParallel, which trl refuses
        vars(made)["_n_gpu"] = 1
    return made


def checkpoint_folder(name: str, inputs: Iterable[Path], settings: dict[str, Any]) -> Path:
    """A git-ignored folder keyed by everything the run depends on: a changed input never resumes an old run.

    That is the bytes of `inputs`, the settings, this code, and the versions of the libraries that train.
    """
    versions = {library: importlib.metadata.version(library) for library in LIBRARIES}
    digest = hashlib.sha256(json.dumps([settings, versions], sort_keys=True, default=str).encode())
    code = {str(m.__file__) for n, m in sys.modules.items() if n.startswith("tasks.") and m.__file__}
    code.add(str(Path(__file__).with_name(f"{name}.py")))  # as a program it is `__main__`
    for path in (*inputs, *map(Path, sorted(code))):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(f"{file.relative_to(path).as_posix()} {_sha256(file)}\n".encode())
    return CHECKPOINTS / f"{name}-{digest.hexdigest()[:16]}"


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole, its best one too; what a kill or a power loss left half-written is removed."""
    whole: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[-1])):
        seal = _seal_of(path)
        if seal is None:
            shutil.rmtree(path)
        else:
            whole[str(path)] = seal
    return next((path for path, seal in reversed(whole.items()) if seal["best"] in (None, *whole)), None)


def _seal_of(checkpoint: Path) -> dict[str, Any] | None:
    """What `Checkpoints` wrote of a checkpoint, if every file is still what it was then."""
    try:
        seal: dict[str, Any] = json.loads((checkpoint / SEAL).read_text())
        same = all(_sha256(checkpoint / name) == digest for name, digest in seal["files"].items())
    except (OSError, ValueError):
        return None
    return seal if same else None


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def train(trainer: Any, folder: Path, given: dict[str, Any]) -> None:
    """Train, from the last checkpoint if there is one.

    The adapter is trained in float32, and on a CPU by the paths of `tasks.fast`, unless `given` turns them off.

    Raises:
        UserError: the optimizer is one of a package that is not installed.
    """
    try:
        trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    except (ImportError, ValueError) as error:
        raise UserError(f"optim: {trainer.args.optim.value}: {' '.join(str(error).split())}") from None
    models.adapter_float32(trainer.model)
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float32
    reason = _unpacked(given, dtype)
    if reason:
        print(f"note: pack_weights has no effect: {reason}", flush=True)
    if given.get("fast", True) and models.device().type == "cpu":
        own = [path for path in re.split("[ :]", os.environ.get("LD_PRELOAD", "")) if "malloc" in path]
        kept = f"left to {Path(own[0]).name}" if own else "kept (glibc)" if fast.keep_pages() else "given back"
        products = os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]
        pack = given.get("pack_weights")
        if pack is None:
            pack = fast.worth_packing(trainer.model, dtype)
        pack = pack and not reason
        print(
            f"cpu: {torch.get_num_threads()} threads (OMP_NUM_THREADS), freed memory is {kept}, "
            f"{products} compiled products (ONEDNN_PRIMITIVE_CACHE_CAPACITY), "
            f"frozen weights are {'packed' if pack else 'as they are'} (pack_weights)",
            flush=True,
        )
        for note in fast.install(trainer.model, pack=pack):
            print(f"note: {note}", flush=True)
    resume = last_checkpoint(folder)
    if resume:
        print(f"resuming from {resume}", flush=True)
        trainer.args.eval_on_start = False  # it was done, is in the history, and would use up patience once more
    seal = _seal_of(Path(resume)) if resume else None
    trainer.add_callback(Checkpoints(trainer, seal))
    trainer.add_callback(Steady())
    try:
        trainer.train(resume_from_checkpoint=resume)
    except AlreadyTrained:
        assert seal is not None
        trainer.model.train(seal["training"])
        trainer._finalize_training(None, 0, time.time())
    runtime = next((e["train_runtime"] for e in reversed(trainer.state.log_history) if "train_runtime" in e), 0.0)
    tokens = max((e.get("num_tokens", 0.0) for e in trainer.state.log_history), default=0.0)
    stage.EVENT |= {
        "model_bytes": trainer.model.get_memory_footprint(),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "tokens": tokens,
        "tokens_per_second": None if resume or not runtime else round(tokens / runtime, 1),
        "resumed_from": resume,
    }


def _unpacked(given: dict[str, Any], dtype: torch.dtype) -> str | None:
    """Why `pack_weights` has no effect where products are in `dtype`; None if it has one, or is not asked for."""
    if not given.get("pack_weights"):
        return None
    if (kind := models.device().type) != "cpu":
        return f"it is for a CPU, and the device is {kind}"
    if not given.get("fast", True):
        return "`fast` is off"
    return None if fast.packs(dtype) else f"oneDNN multiplies by no packed weights in {dtype} here"


def clear(folder: Path) -> None:
    """Remove the checkpoints of a run whose results are written."""
    shutil.rmtree(folder, ignore_errors=True)
    if CHECKPOINTS.is_dir() and not os.listdir(CHECKPOINTS):
        CHECKPOINTS.rmdir()


def early_stopping(given: dict[str, Any], validated: bool) -> list[TrainerCallback]:
    if "early_stopping_patience" not in given or not validated:
        return []
    return [EarlyStoppingCallback(given["early_stopping_patience"], given.get("early_stopping_threshold", 0.0))]


class Steady(TrainerCallback):
    """Spares each step the walks over all modules of the model, whose answers stay the same while it trains.

    transformers 5.23 asks for `train()`, `parameters()` (to clip and to zero gradients) and `num_parameters()` (to count operations):
    25 ms of a step for the 2,500 modules of 30 layers with adapters, on 2 slow cores.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        parameters, base = list(model.parameters()), model.get_base_model()
        own, last = model.train, None  # a model may say that it trains while the base in it, as loaded, does not

        def train(mode: bool = True) -> Any:
            nonlocal last
            if mode != last:
                own(mode)
                last = mode
            return model

        self.steadied = model, base
        vars(model).update({"parameters": lambda recurse=True: iter(parameters), "train": train})
        vars(base)["num_parameters"] = functools.cache(base.num_parameters)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        model, base = self.steadied
        for owner, name in ((model, "parameters"), (model, "train"), (base, "num_parameters")):
            vars(owner).pop(name)


class AlreadyTrained(Exception):
    """The checkpoint resumed from was the last one: only the end of the training is left to do."""


class Checkpoints(TrainerCallback):
    """Makes a resumed training the same as an uninterrupted one, on a CPU to the byte, and a half-written checkpoint no checkpoint.

    transformers 5.23 writes trainer_state.json last, but neither at once nor to disk, and does not keep what these need: the
    order of the rows (drawn from the random state at the epoch's start), the mean of what was not logged yet, the patience
    of early stopping, and that the training was over. These go, with a hash of each file, to a file that is renamed into
    place when all else is on disk. `tests/test_training.py` has a case for each.
    """

    def __init__(self, trainer: Any, seal: dict[str, Any] | None) -> None:
        self.trainer = trainer
        self.resumed = seal
        self.epoch_began: dict[str, Any] = {}
        self.stopping = [c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        self.epoch_ended = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.resumed:
            self.trainer._tr_loss += self.resumed["loss"]
            self.trainer._globalstep_last_logged = self.resumed["logged"]
            self.trainer._metrics["train"].update(self.resumed["metrics"])
            self.trainer._total_train_tokens = self.resumed["tokens"]
            for callback in self.stopping:
                callback.early_stopping_patience_counter = self.resumed["patience"]

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.resumed:
            if self.resumed["over"]:
                raise AlreadyTrained
            if self.resumed["random"]:
                _set_random_state(self.resumed["random"])
            self.resumed = None
        self.epoch_began = _random_state()
        self.epoch_ended = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.epoch_ended = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        whole_epochs = float(state.epoch or 0).is_integer()
        over = control.should_training_stop or state.global_step >= state.max_steps
        if (whole_epochs or over) and not self.epoch_ended and "epoch" in (args.eval_strategy, args.logging_strategy):
            return  # resumed from here, the trainer would skip what it does at the end of this epoch
        trainer = self.trainer
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        seal = {
            "files": {path.relative_to(folder).as_posix(): _sha256(path) for path in files},
            "best": state.best_model_checkpoint,
            "random": None if whole_epochs else self.epoch_began,
            "loss": trainer._tr_loss.item(),
            "logged": trainer._globalstep_last_logged,
            "metrics": trainer._metrics["train"],
            "tokens": trainer._total_train_tokens,
            "patience": max((c.early_stopping_patience_counter for c in self.stopping), default=0),
            "over": over,
            "training": trainer.model.training,  # after a validation it is not, and trl's last log depends on it
        }
        temporary = folder / f"{SEAL}.tmp"
        temporary.write_text(json.dumps(seal))
        for path in (*files, temporary, folder):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        temporary.rename(folder / SEAL)


def _random_state() -> dict[str, Any]:
    """Of Python, NumPy and torch, as JSON holds it."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []  # of the one that trains
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, [int(key) for key in keys], *rest],
        "torch": [bytes(state.tolist()).hex() for state in (torch.get_rng_state(), *cuda)],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))
    cpu, *cuda = (torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8) for text in state["torch"])
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state(cuda[0])


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

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After a resume, see again what was logged before it."""
        for entry in state.log_history:
            self.on_log(args, dataclasses.replace(state, global_step=entry["step"]), control, entry)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A training shorter than `logging_steps` says its loss at its end."""
        if state.global_step == state.max_steps < state.logging_steps:
            control.should_log = True

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
                raise UserError(f"the loss is {loss} at step {step}; {NO_NUMBER}")
            if len(self.losses) >= 5 and loss > 3 * statistics.median(self.losses[-10:]):
                self.say(
                    f"loss spike at step {step}: {loss:.3f} after a median of {statistics.median(self.losses[-10:]):.3f}; usual causes: learning_rate too high, too little warm-up, an odd batch"
                )
            self.losses.append(loss)
        if "eval_loss" in logs:
            if not math.isfinite(logs["eval_loss"]):
                raise UserError(f"the validation loss is {logs['eval_loss']} at step {step}; {NO_NUMBER}")
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
