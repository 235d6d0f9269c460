"""What a run would do, and what it would take, before anything runs.

    python -m flows.plan [STAGE …] [--remote] [--json]

For every stage: unchanged, restored, or run, and why; how long it took last time on this machine; and for those that load
a model the memory that they need against what is here. What does not fit is said with the params that would make it fit,
the least harmful first. Nothing is run and nothing is written.

Exit code: 0; 1 for a mistake in params or names; 3 if a stage that would run does not fit into memory.
"""

import argparse
import ast
import copy
import csv
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import polars as pl
import psutil  # type: ignore[import-untyped]  # of dvc

from flows import memory, stages
from flows.memory import GIB, Batch, Device, Need, Part
from flows.stages import Planned, Reason
from tasks import params
from tasks.params import UserError

NO_FIT = 3  # exit code
State = Literal["unchanged", "restored", "remote", "run", "follows"]
SAID: dict[State, str] = {
    "unchanged": "unchanged",
    "restored": "restored (local)",
    "remote": "restored (remote)",
    "run": "will run",
    "follows": "will follow",
}
# of trl.SFTConfig and trl.DPOConfig, and of `training.arguments`; tests/test_plan.py holds them against the classes
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "optim": "paged_adamw_32bit",
}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
TRAINING = ("sft", "dpo")
CGROUP = Path("/sys/fs/cgroup")
DRIVERS = {
    "11": 450,
    "12": 525,
    "13": 580,
}  # the first driver for a CUDA, by NVIDIA's table of minor version compatibility
# of the stages, which load torch; tests/test_plan.py holds them against the modules
PAIR_BATCH, PAIR_TOKENS = 32, 64  # answers in tasks/pair.py at once, and their tokens
DPO_BATCH = 8  # pairs whose answers `dpo` compares at once over the whole vocabulary
KL_ROWS, KL_TOKENS, KL_BATCH = (
    64,
    4096,
    8,
)  # that `evaluate` compares with other models: rows, their tokens, rows at once
MERGE_BATCH, MERGE_TOKENS = 8, 4096  # rows that `merge` compares at once, and the tokens of all of them


@dataclass(frozen=True)
class Remedy:
    """Params that would save memory: `saves` bytes if they alone were changed."""

    change: dict[str, Any]
    saves: int


@dataclass(frozen=True)
class Line:
    """A stage of the plan.

    Attributes:
        state: what `dvc repro` would do with it; `follows`: it runs if what it reads comes out different.
        why: in words; empty if it is unchanged.
        seconds: of its last run here, None if there is none; `when` says what that run was different in.
        need: None if it loads no model, or nothing is known yet.
        measured, estimated: peak bytes of its last run, and the estimate for that run's settings; of a training.
        fits: None if there is no `need`.
        remedies: in order of harm, those of the first combination that fits; all of them if `hopeless`.
    """

    name: str
    state: State
    why: tuple[str, ...]
    seconds: float | None
    when: str
    need: Need | None = None
    measured: int | None = None
    estimated: int | None = None
    fits: bool | None = None
    remedies: tuple[Remedy, ...] = ()
    hopeless: bool = False


@dataclass(frozen=True)
class Plan:
    lines: tuple[Line, ...]
    device: Device
    note: str = ""

    @property
    def running(self) -> list[Line]:
        return [line for line in self.lines if line.state in ("run", "follows")]

    @property
    def seconds(self) -> float:
        """What the stages that run took last time."""
        return sum(line.seconds or 0.0 for line in self.running)

    @property
    def fits(self) -> bool:
        return all(line.fits is not False for line in self.running)


def make(
    root: Path, targets: Sequence[str] | None = None, *, remote: bool = False, device: Device | None = None
) -> Plan:
    """The plan of `dvc repro TARGETS` in the repository at `root`.

    Args:
        remote: ask the DVC remote for the runs that the local cache lacks.
        device: plan for this one instead of the one that is here.

    Raises:
        UserError: a mistake in params.yaml or dvc.yaml, no such target, or no remote to ask.
    """
    every = params.load(root / "params.yaml")
    planned = stages.plan(root, targets, remote=remote)
    device = device or this_device()
    states = _states(planned)
    made = {out: each.name for each in planned for out in each.outputs}
    facts, note = _facts(root, states)
    lines = []
    for each in planned:
        event = _event(root, each)
        state = states[each.name]
        line = Line(
            each.name,
            state,
            tuple(_why(root, each, made, states)),
            event.get("seconds") if event and not event.get("resumed_from") else None,
            _when(each, state, event),
        )
        if facts is not None and each.gpu:
            line = _with_memory(line, each, event, root, every, facts, device)
        lines.append(line)
    return Plan(tuple(lines), device, note)


def _states(planned: Sequence[Planned]) -> dict[str, State]:
    out: dict[str, State] = {}
    for each in planned:
        if each.restorable:
            out[each.name] = "restored"
        elif each.remote:
            out[each.name] = "remote"
        elif each.settled:
            out[each.name] = "unchanged"
        elif not each.changed and any(out[up] in ("run", "follows") for up in each.upstream):
            out[each.name] = "follows"
        else:  # also: upstreams would be restored to what it was not made of
            out[each.name] = "run"
    return out


# --- why ------------------------------------------------------------------------------------------------------------


def _why(root: Path, each: Planned, made: Mapping[str, str], states: Mapping[str, State]) -> list[str]:
    """`made`: output → the stage that makes it. What an upstream brings about is said as `after …` alone."""
    out = []
    moving = {name for name in each.upstream if states[name] != "unchanged"}
    if any(reason.kind == "command" and reason.before is None for reason in each.reasons):
        out.append("never run: dvc.lock does not know it")
    else:
        gone = []
        for reason in each.reasons:
            if reason.kind == "output" and reason.status in ("deleted", "not in cache"):
                gone.append(reason.name)
            elif not (reason.kind == "dependency" and _maker(reason.name, made) in moving):
                out += _words(root, reason)
        if gone:
            out.append("its outputs are not here" if len(gone) > 2 else f"{', '.join(gone)} not here")
    if each.missing and not each.restorable and not each.remote:
        out.append("nor in the local cache: `dvc pull` may have it")
    for verb, among in (("", ("run", "follows")), (", restored", ("restored", "remote"))):
        names = [up for up in each.upstream if states[up] in among]
        if names and states[each.name] != "unchanged":
            out.append(f"after {', '.join(names)}{verb}")
    return list(dict.fromkeys(out))


def _maker(path: str, made: Mapping[str, str]) -> str | None:
    return next((stage for out, stage in made.items() if f"{path}/".startswith(f"{out}/")), None)


def _words(root: Path, reason: Reason) -> Iterator[str]:
    """`dpo.beta 0.1 → 0.3`, `tasks/dpo.py modified`, `data/raw modified (data/raw/terms.csv)`."""
    if reason.kind == "parameter":
        for key, old, new in _leaves(reason.name, reason.before, reason.after):
            yield f"{key} {_value(old)} → {_value(new)}"
    elif reason.kind == "command":
        old, new = (str(text).split() for text in (reason.before, reason.after))
        gone, come = [w for w in old if w not in new], [w for w in new if w not in old]
        yield f"its command: {' '.join(gone) or '(nothing)'} → {' '.join(come) or '(nothing)'}"
    elif reason.kind == "dependency" and reason.status == "modified" and (root / reason.name).is_dir():
        files = _edited(root, reason.name)
        yield f"{reason.name} modified" + (f" ({', '.join(files)})" if files else "")
    elif reason.kind == "always":
        yield "it always runs"
    elif not reason.name:
        yield "it is being run by another dvc at this moment"
    else:
        yield f"{reason.name} {reason.status}"


class _Absent:
    def __repr__(self) -> str:
        return "(not set)"


ABSENT = _Absent()


def _leaves(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """The values that differ, by dotted key."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(n for n in new if n not in old)]:
            if old.get(name, ABSENT) != new.get(name, ABSENT):
                yield from _leaves(f"{key}.{name}", old.get(name, ABSENT), new.get(name, ABSENT))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and old and isinstance(old[0], dict):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            if a != b:
                yield from _leaves(f"{key}.{index}", a, b)
    else:
        yield key, old, new


def _value(value: Any) -> str:
    text = repr(value) if isinstance(value, _Absent) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _edited(root: Path, folder: str, most: int = 3) -> list[str]:
    """Files below `folder` that git sees changed since dvc.lock was committed; DVC keeps one hash of a folder."""

    def git(*arguments: str) -> list[str]:
        words = ["git", "-c", "core.quotePath=false", *arguments]
        done = subprocess.run(words, cwd=root, capture_output=True, text=True)  # noqa: S603
        return done.stdout.splitlines() if done.returncode == 0 else []

    since = git("log", "-1", "--format=%H", "--", "dvc.lock")
    found = git("diff", "--name-only", since[0], "--", folder) if since else []
    found += git("ls-files", "--others", "--exclude-standard", "--", folder)
    return found[:most] + ([f"and {len(found) - most} more"] if len(found) > most else [])


# --- last time ------------------------------------------------------------------------------------------------------


def _event(root: Path, each: Planned) -> dict[str, Any] | None:
    """What the stage's last run here left, `data/<stage>/event*.json`; of another instance if it left none itself."""
    name = each.name.partition("@")[0]
    found = []
    for path in (root / "data" / name).glob("event*.json"):
        try:
            event = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # being written at this moment
            continue
        if isinstance(event, dict) and event.get("stage") == name:
            made = set(map(str, event.get("arguments", {}).values()))
            found.append((bool(made & set(each.outputs)), path.stat().st_mtime, event))
    if not found:
        return None
    own, _, event = max(found, key=lambda item: item[:2])
    return event | {"own": own}


def _when(each: Planned, state: State, event: Mapping[str, Any] | None) -> str:
    if event is None:
        return "not run here yet"
    if not event["own"]:
        return "of another instance"
    if event.get("resumed_from"):
        return "its last run was resumed"
    if state in ("run", "follows"):
        if any(reason.kind == "parameter" for reason in each.reasons):
            return "with other settings"
        if each.reasons or state == "follows":
            return "with other inputs"
    return ""


# --- memory ---------------------------------------------------------------------------------------------------------


def this_device() -> Device:
    """What torch would take, found without it: a GPU that its build and the driver know, else this machine's memory."""
    cuda, why = _torch_cuda(), ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if cuda and visible not in ("", "-1") and shutil.which("nvidia-smi"):
        asked = [
            "nvidia-smi",
            "--query-gpu=name,memory.total,memory.free,driver_version,uuid",
            "--format=csv,noheader,nounits",
        ]
        done = subprocess.run(asked, capture_output=True, text=True)  # noqa: S603
        rows = [[cell.strip() for cell in row] for row in csv.reader(done.stdout.splitlines())]
        if done.returncode == 0 and rows and len(rows[0]) == 5:
            row, note = _card(rows, visible, os.environ.get("CUDA_DEVICE_ORDER"))
            driver = row[3].partition(".")[0] if row else ""
            if row and (not driver.isdigit() or int(driver) >= DRIVERS.get(cuda.partition(".")[0], 0)):
                return Device("cuda", row[0] + note, int(row[1]) * memory.MIB, int(row[2]) * memory.MIB, ram=_ram()[1])
            why = f"; the driver {row[3]} of {row[0]} is too old for torch's CUDA {cuda}" if row else note
    if sys.platform == "darwin":
        return Device("mps", "Apple GPU, unified memory", *_ram())
    return _cpu(why)


def _card(rows: Sequence[list[str]], visible: str | None, order: str | None) -> tuple[list[str] | None, str]:
    """The line of nvidia-smi that CUDA's first device is (None: CUDA sees none), and what there is to say of it.

    nvidia-smi counts along the PCI bus. CUDA does so only if told to: else the fastest card is its first.
    """
    first = (visible or "0").partition(",")[0].strip()
    if first.startswith("MIG"):
        return rows[0], f", as if it were whole: nvidia-smi does not list {first}, give its memory with --memory"
    if not first.isdigit():  # CUDA takes a UUID's beginning too
        found = next((row for row in rows if first and row[4].startswith(first)), None)
        return found, "" if found else f"; CUDA_VISIBLE_DEVICES={visible} names no GPU here"
    if int(first) >= len(rows):
        return None, f"; CUDA_VISIBLE_DEVICES={visible} names no GPU here"
    mixed = len({row[0] for row in rows}) > 1 and order != "PCI_BUS_ID"
    note = f", card {first} of nvidia-smi: CUDA may mean another one without CUDA_DEVICE_ORDER=PCI_BUS_ID"
    return rows[int(first)], note if mixed else ""


def _cpu(why: str = "") -> Device:
    flags = Path("/proc/cpuinfo")
    bf16 = flags.is_file() and "avx512_bf16" in flags.read_text()
    return Device("cpu", f"CPU, {os.cpu_count()} cores{why}", *_ram(), bf16)


def _torch_cuda() -> str | None:
    """The CUDA that the installed torch was built for: `cuda` in torch/version.py."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    tree = ast.parse((Path(spec.origin).parent / "version.py").read_text())
    return next(
        (str(node.value.value) for node in tree.body
         if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "cuda" and isinstance(node.value, ast.Constant)
         and node.value.value is not None),
        None,
    )  # fmt: skip


def _ram() -> tuple[int, int]:
    """Total and available bytes of memory, of the machine or of the container's limit (cgroup 2, then 1)."""
    machine = psutil.virtual_memory()
    total, free = int(machine.total), int(machine.available)
    for folder, limit, used, prefix in (
        ("", "memory.max", "memory.current", ""),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        most, now, parts = (CGROUP / folder / name for name in (limit, used, "memory.stat"))
        if most.is_file() and (text := most.read_text().strip()).isdigit() and int(text) < total:
            total = int(text)
            taken = int(now.read_text()) if now.is_file() else 0
            # files that were read count as used, and give way
            stat = dict(line.split()[:2] for line in parts.read_text().splitlines()) if parts.is_file() else {}
            taken -= sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
            free = min(free, total - max(0, taken))
    return total, free


def _facts(root: Path, states: Mapping[str, State]) -> tuple[dict[str, Any] | None, str]:
    """data/base/facts.json, and a note on what it can't say."""
    path = root / "data/base/facts.json"
    if "base" not in states and not path.is_file():
        return None, ""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None, "memory can't be told before `base` has run: `dvc repro base`"
    if "linear_shapes" not in facts:
        return None, "memory can't be told: data/base/facts.json is of another version; `dvc repro base`"
    if states.get("base", "unchanged") != "unchanged":
        return facts, "memory is that of the model that `base` made last; it will be made again"
    return facts, ""


def _with_memory(
    line: Line,
    each: Planned,
    event: Mapping[str, Any] | None,
    root: Path,
    every: dict[str, Any],
    facts: dict[str, Any],
    device: Device,
) -> Line:
    name = each.name.partition("@")[0]
    rows = Rows(root, facts["context_length"])

    def need(settings: dict[str, Any]) -> Need | None:
        return estimate(each.name, settings, facts, device, rows)

    found = need(every)
    if found is None:
        return line
    changes: dict[str, Any] = {"need": found, "fits": found.least <= device.free}
    if name in TRAINING and event is not None and event.get("peak_bytes") and device.kind == "cpu":
        before = every | {r.name: r.before for r in each.reasons if r.kind == "parameter" and r.name in params.LIBRARY}
        last = need(before)
        changes |= {"measured": event["peak_bytes"], "estimated": last.total if last else None}
    changes["fits"] = changes["fits"] and not _crowded(found, device)
    if found.least > device.free:
        remedies, hopeless = propose(name, every, need, device.free, rows)
        changes |= {"remedies": remedies, "hopeless": hopeless}
    return replace(line, **changes)


def _crowded(need: Need, device: Device) -> bool:
    """What waits beside the GPU finds no place in the machine's own memory."""
    return device.ram is not None and _bytes(need.aside) > device.ram


class Rows:
    """How long the rows are that trainings read, from what the last run left; without it, as long as the settings allow."""

    def __init__(self, root: Path, context: int | None = None) -> None:
        self.root, self.context = root, context
        self.cache: dict[str, pl.DataFrame | None] = {}

    def table(self, path: str, columns: Sequence[str]) -> pl.DataFrame | None:
        if path not in self.cache:
            try:
                self.cache[path] = pl.read_parquet(self.root / path, columns=list(columns))
            except (OSError, pl.exceptions.PolarsError):
                self.cache[path] = None
        return self.cache[path]

    def sft(self, part: str, size: int, limit: int, steps: Mapping[str, Any]) -> tuple[Batch, str]:
        """The batch of the `size` longest rows of `part`."""
        table = self.table(f"data/template/rows/{part}.parquet", ["input_ids"])
        if table is None or table.is_empty():
            return Batch(size * limit, size * limit, limit), "rows as long as template.max_length"
        lengths = table["input_ids"].list.len()
        order = lengths.arg_sort(descending=True)[:size]
        top = [row[:limit] for row in table["input_ids"][order].to_list()]
        longest = max(map(len, top))
        shapes = 1 if lengths.n_unique() == 1 else _steps(table.height, size, steps)
        return Batch(memory.distinct(top), len(top) * longest, longest, shapes), f"rows of up to {longest} tokens"

    def dpo(self, part: str, size: int, limit: int, steps: Mapping[str, Any]) -> tuple[Batch, str, int]:
        """The batch of the `size` longest pairs of `part`, and the longest chosen answer."""
        columns = ["part", "prompt_ids", "chosen_ids", "rejected_ids"]
        table = self.table("data/reference/pairs.parquet", columns)
        if table is not None:
            table = table.filter(pl.col("part") == part)
        if table is None or table.is_empty():
            return Batch(2 * size * limit, 2 * size * limit, limit), "pairs as long as template.max_length", limit
        sizes = table.select(
            total=pl.col("prompt_ids").list.len() + pl.col("chosen_ids").list.len() + pl.col("rejected_ids").list.len()
        )["total"]
        top = table[sizes.arg_sort(descending=True)[:size]]
        rows = [
            [*prompt, *answer][:limit]
            for prompt, *answers in top.select(columns[1:]).iter_rows()
            for answer in answers
        ]  # fmt: skip
        longest = max(map(len, rows))
        shapes = 1 if sizes.n_unique() == 1 else _steps(table.height, size, steps)
        answer = min(limit, int(table["chosen_ids"].list.len().max() or 0))  # type: ignore[arg-type]
        note = f"pairs of up to {longest} tokens a side"
        return Batch(memory.distinct(rows), len(rows) * longest, longest, shapes), note, answer


def _steps(rows: int, size: int, given: Mapping[str, Any]) -> int:
    """Batches of a training."""
    once = math.ceil(rows / size)
    most = int(given["max_steps"]) * int(given["gradient_accumulation_steps"])
    return most if most > 0 else math.ceil(once * float(given["num_train_epochs"]))


def _section(every: Mapping[str, Any], name: str, device: Device) -> dict[str, Any]:
    """A training's section with the defaults that memory depends on, and the optimizer that `training.arguments` takes."""
    given: dict[str, Any] = DEFAULTS | every[name]
    if given.get("activation_checkpointing") is not None:
        given["gradient_checkpointing"] = given["activation_checkpointing"]
    if device.kind != "cuda":
        given["optim"] = params.unpaged(given["optim"])
    return given


def estimate(name: str, every: dict[str, Any], facts: dict[str, Any], device: Device, rows: Rows) -> Need | None:
    """What a stage needs with these params; None for one that loads no model."""
    name, _, instance = name.partition("@")
    lora, quantization, limit = every["lora"], every["quantization"], every["template"].max_length
    if name in ("reference", "dpo") and every["pair"].mode == "none":
        return None
    if name in TRAINING:
        given = _section(every, name, device)
        size, validated = int(given["per_device_train_batch_size"]), int(given["per_device_eval_batch_size"])
        validates = given.get("eval_strategy", "no") != "no"
        if name == "sft":
            batch, note = rows.sft("train", size, limit, given)
            evaluated = rows.sft("validation", validated, limit, given)[0] if validates else None
            need = memory.training(facts, given, lora, quantization, device, batch, evaluated)
        else:
            batch, note, _ = rows.dpo("train", size, limit, given)
            evaluated, _, answer = rows.dpo("validation", validated, limit, given)
            kl = min(DPO_BATCH, validated) * answer if validates else 0
            evaluated = evaluated if validates else None
            need = memory.training(facts, given, lora, quantization, device, batch, evaluated, copies=1, kl=kl)
        return Need(need.parts, f"batches of {size} {note}")
    adapter = Part("adapter, float32", 4 * memory.adapter_parameters(facts, lora))
    longest = rows.sft("train", 1, limit, DEFAULTS)[0].longest
    if name == "reference":
        size = every["reference"].batch_size
        batch = rows.dpo("train", math.ceil(size / 2), limit, DEFAULTS)[0]
        scores = memory.scoring(facts, lora, device, batch, batch.longest // 2, size)
        return Need((*memory.loaded(facts, quantization, device), adapter, *scores))
    merging = [adapter, *memory.merging(facts, quantization, device)]
    merged = memory.merged(facts, device)
    if name == "pair":
        if every["pair"].mode != "compose":
            return None
        return _largest(device, merging, [merged, *memory.generating(facts, device, PAIR_BATCH, longest, PAIR_TOKENS)])
    if name == "merge":
        tokens = min(every["merge"].prompts * longest // 2, MERGE_TOKENS)
        aside = [Part("log-probabilities of the held-out rows", 4 * tokens * facts["vocabulary"])]
        logits = Part("logits of a batch of them", 10 * min(MERGE_BATCH * longest, tokens) * facts["vocabulary"])
        if device.kind == "cuda":  # these wait in the machine's own memory
            kept = [Part("the closer merged model, 16 bits", 2 * facts["parameters"])]
            return _largest(device, merging, [merged, logits], aside=[*kept, *aside])
        kept = [Part("the other merged model, 16 bits", 2 * facts["parameters"])] if quantization else []
        return _largest(device, [*merging, *kept, *aside], [merged, *kept, *aside, logits])
    if name == "evaluate":
        size, new = every["evaluate"].batch_size, every["evaluate"].max_new_tokens
        answers = memory.generating(facts, device, size, longest, new)
        options = rows.sft("train", size, limit, DEFAULTS)[0]
        scores = memory.scoring(facts, memory.NO_LORA, device, options, options.longest, size)
        if instance == "base":
            own = max(answers, scores, key=_bytes)
            return Need((*memory.loaded(facts, None, device), *own))
        # what this model says of general text and of its own answers waits for what others would say
        tokens = [min(KL_ROWS * each, KL_TOKENS) for each in (longest, new + 1)]
        ours = Part("log-probabilities of texts and answers", 4 * sum(tokens) * facts["vocabulary"])
        at_once = min(min(size, KL_BATCH) * max(longest, new + 1), KL_TOKENS) * facts["vocabulary"]
        theirs = Part("logits of a batch of them", 10 * at_once)
        apart = device.kind == "cuda"  # in the machine's own memory
        held = [] if apart else [ours]
        adapted = [*merging, *held] if instance == "dpo" else merging  # there the reference is an adapter
        aside = [ours, Part("those of another model, a batch", 4 * at_once)] if apart else []
        phases = [merged, *answers], [merged, *scores], [merged, *held, theirs]
        return _largest(device, adapted, *phases, aside=aside)
    return None


def _largest(device: Device, *phases: list[Part], aside: Sequence[Part] = ()) -> Need:
    """What follows on each other within a stage: the largest."""
    return Need((*memory.process(device), *max(phases, key=_bytes)), aside=tuple(aside))


def _bytes(parts: Sequence[Part]) -> int:
    return sum(part.bytes for part in parts)


def propose(
    name: str, every: dict[str, Any], need: Callable[[dict[str, Any]], Need | None], limit: int, rows: Rows
) -> tuple[tuple[Remedy, ...], bool]:
    """The params of the first combination that fits into `limit` bytes, in order of harm; all of them if none does.

    A kind of change is taken in its mildest value that is enough, else in its strongest, and the next kind is added.
    """

    def least(settings: dict[str, Any]) -> int:
        found = need(settings)
        return found.least if found else 0

    now = least(every)
    chosen: list[dict[str, Any]] = []
    changed = every
    for values in _options(name, every, rows):
        values = [v for v in values if least(_changed(every, v)) < now]
        if not values:
            continue
        enough = next((v for v in values if least(_changed(changed, v)) <= limit), None)
        chosen.append(enough or values[-1])
        changed = _changed(changed, chosen[-1])
        if enough:
            break
    remedies = tuple(Remedy(change, now - least(_changed(every, change))) for change in chosen)
    return remedies, least(changed) > limit


def _options(name: str, every: dict[str, Any], rows: Rows) -> Iterator[list[dict[str, Any]]]:
    """Kinds of change in order of harm, each from mild to strong."""
    if name not in TRAINING:
        own = {"evaluate": "batch_size", "reference": "batch_size", "merge": "prompts"}.get(name)
        if own:
            yield [{f"{name}.{own}": value} for value in _halves(getattr(every[name], own), 1)]
        return
    given = DEFAULTS | every[name]
    # the same products, slower
    yield [{f"{name}.pack_weights": False}]
    # the same gradients, computed twice
    yield [{f"{name}.gradient_checkpointing": True}]
    # the same batch in pieces
    size, validated = given["per_device_train_batch_size"], given["per_device_eval_batch_size"]
    pieces = []
    for value in _halves(size, 1):
        piece = {
            f"{name}.per_device_train_batch_size": value,
            f"{name}.gradient_accumulation_steps": given["gradient_accumulation_steps"] * size // value,
        }
        if given.get("eval_strategy", "no") != "no" and validated > value:
            piece[f"{name}.per_device_eval_batch_size"] = value
        pieces.append(piece)
    yield pieces
    # longer rows are refused, and above template.max_refused of them the template stage stops
    limit = every["template"].max_length
    longest = min(limit, rows.sft("train", 1, limit, DEFAULTS)[0].longest)
    yield [{"template.max_length": value} for value in _halves(longest, 32)]
    # a little quality
    if not (every["quantization"] or {}).get("load_in_4bit"):
        yield [{"quantization": NF4}]
    elif not every["quantization"].get("bnb_4bit_use_double_quant"):
        yield [{"quantization.bnb_4bit_use_double_quant": True}]
    # what it can learn
    yield [{"lora.r": value} for value in _halves(int(every["lora"].get("r", 8)), 4)]


def _halves(value: int, least: int) -> list[int]:
    out = []
    while value // 2 >= least:
        value //= 2
        out.append(value)
    return out


def _changed(every: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Params with some dotted keys set."""
    out = dict(every)
    for path, value in change.items():
        section, _, key = path.partition(".")
        if not key:
            out[section] = value
        elif isinstance(out[section], params.Section):
            out[section] = out[section].model_copy(update={key: value})
        else:
            out[section] = copy.copy(out[section]) | {key: value}
    return out


# --- on a terminal --------------------------------------------------------------------------------------------------


def text(plan: Plan, width: int = 100, colour: bool = False) -> str:
    """A table of all stages and what is to be said of memory, in lines of at most `width` columns where that can be."""
    out = [_summary(plan), ""]
    names = max(len("stage"), *(len(line.name) for line in plan.lines)) if plan.lines else 5
    indent = names + 2 + 17 + 2 + 10 + 2 + 9 + 2
    out.append(f"{'stage':<{names}}  {'what':<17}  {'last time':>10}  {'memory':>9}  why")
    for line in plan.lines:
        took = "—" if line.seconds is None else duration(line.seconds)
        need = "" if line.need is None else size(line.need.total) + ("" if line.fits is not False else "!")
        why = "; ".join(
            [
                *line.why,
                *([f"time {line.when}"] if line.when and line.state in ("run", "follows") and line.seconds else []),
            ]
        )
        first, *more = textwrap.wrap(why, max(24, width - indent)) or [""]
        state = f"{SAID[line.state]:<17}"
        if colour:
            state = f"\x1b[{_colour(line)}m{state}\x1b[0m"
        out.append(f"{line.name:<{names}}  {state}  {took:>10}  {need:>9}  {first}".rstrip())
        out += [" " * indent + rest for rest in more]
    out.append("")
    if plan.note:
        out.append(plan.note)
    out += _memory_text(plan, width)
    return "\n".join(out).rstrip() + "\n"


def _colour(line: Line) -> int:
    if line.fits is False and line.state in ("run", "follows"):
        return 31
    return {"unchanged": 2, "restored": 32, "remote": 36, "run": 33, "follows": 33}[line.state]


def _summary(plan: Plan) -> str:
    count = {state: sum(line.state == state for line in plan.lines) for state in SAID}
    said = [f"{count['run']} to run"] if count["run"] else []
    said += [f"{count['follows']} to follow"] if count["follows"] else []
    said += [f"{count['restored'] + count['remote']} to restore"] if count["restored"] + count["remote"] else []
    said += [f"{count['unchanged']} unchanged"] if count["unchanged"] else []
    unknown = sum(line.seconds is None for line in plan.running)
    if not plan.running:
        time = "nothing to run"
    elif unknown == len(plan.running):
        time = "how long is not known: none of them was run here yet"
    else:
        time = f"about {duration(plan.seconds)}, as last time"
        time += f", and {unknown} not run here yet" if unknown else ""
    return f"{len(plan.lines)} stages: {', '.join(said)}; {time}"


def _memory_text(plan: Plan, width: int) -> list[str]:
    needy = [line for line in plan.lines if line.need is not None]
    if not needy:
        return []
    device = plan.device
    out = [f"memory: {device.name}, {size(device.free)} free of {size(device.total)}"]
    if device.kind != "cpu":
        out[0] += "; needs are computed, not measured on a GPU"
    largest = max([line for line in needy if line in plan.running] or needy, key=lambda line: line.need.total)  # type: ignore[union-attr]
    assert largest.need is not None
    out.append(
        f"{largest.name} needs {size(largest.need.total)}"
        + (f", {largest.need.note}" if largest.need.note else "")
        + ":"
    )
    out += [f"  {size(part.bytes):>9}  {part.name}" for part in largest.need.parts]
    for line in needy:
        if line.measured and line.estimated:
            off = line.estimated / line.measured - 1
            out.append(
                f"check: the last {line.name} peaked at {size(line.measured)}, its estimate is {size(line.estimated)} ({off:+.0%})"
            )
    for line in needy:
        if line.need is not None and line.need.aside:
            parts = ", ".join(f"{part.name} {size(part.bytes)}" for part in line.need.aside)
            out += textwrap.wrap(f"{line.name}, in the machine's own memory: {parts}", width, subsequent_indent="  ")
    for line in plan.running:
        if line.need is not None and _crowded(line.need, device):
            kept = f"it keeps {size(_bytes(line.need.aside))} in the machine's own memory"
            out += ["", f"{line.name} won't fit: {kept}, where {size(device.ram or 0)} are free"]
        if line.fits is False and line.need is not None and line.need.least > device.free:
            out += ["", f"{line.name} won't fit: it needs {size(line.need.least)}, {size(device.free)} are free"]
            if line.hopeless:
                out.append(
                    "not even all of these would make it fit, the least harmful first:"
                    if line.remedies
                    else "no parameter of its own makes it smaller"
                )
            else:
                out.append("these params make it fit together, the least harmful first:")
            for remedy in line.remedies:
                said = ", ".join(f"{key}: {_value(value)}" for key, value in remedy.change.items())
                out += textwrap.wrap(f"{said} (alone {size(remedy.saves)} less)", width, initial_indent="  ", subsequent_indent="    ")  # fmt: skip
    return out


def size(count: float) -> str:
    return f"{count / GIB:.2f} GiB"


def duration(seconds: float) -> str:
    """`48 s`, `3 m 09 s`, `2 h 05 m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} m"


def as_json(plan: Plan) -> dict[str, Any]:
    """The whole plan for machines; bytes and seconds."""
    lines = []
    for line in plan.lines:
        entry = asdict(line)
        if line.need is not None:
            entry["need"] |= {"total": line.need.total, "least": line.need.least}
        lines.append(entry)
    return {
        "stages": lines,
        "seconds": plan.seconds,
        "fits": plan.fits,
        "device": asdict(plan.device),
        "note": plan.note,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The plan on a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="STAGE", help="stages to bring up to date; default: all")
    parser.add_argument(
        "--remote", action="store_true", help="ask the DVC remote for runs that are not in the local cache"
    )
    parser.add_argument("--json", action="store_true", help="the plan as JSON, in bytes and seconds")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="plan for this kind of device")
    parser.add_argument("--memory", type=float, metavar="GIB", help="plan for a device with so much memory free")
    given = parser.parse_args(arguments)
    if given.memory is not None and given.memory <= 0:
        parser.error(f"--memory: expected GiB above 0, found {given.memory:g}")
    try:
        device = this_device()
        if given.device == "cpu":
            device = _cpu()
        elif given.device == "cuda" and device.kind != "cuda":
            if given.memory is None:
                parser.error("--device cuda: there is no such GPU here: say how much memory it has, --memory GIB")
            device = Device("cuda", "a cuda device", 0, 0)
        if given.memory:
            bytes_ = int(given.memory * GIB)
            device = Device(device.kind, device.name, bytes_, bytes_, device.bf16, device.ram)
        plan = make(Path.cwd(), given.targets or None, remote=given.remote, device=device)
    except UserError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 1
    if given.json:
        print(json.dumps(as_json(plan), indent=2, ensure_ascii=False, default=repr))
    else:
        tty = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(text(plan, min(shutil.get_terminal_size((100, 24)).columns, 140) if tty else 100, tty), end="")
    return 0 if plan.fits else NO_FIT


if __name__ == "__main__":
    sys.exit(main())
