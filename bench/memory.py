"""What `make plan` says a training takes, beside what it takes: the peak of a few steps with rows of one length.

No two rows are alike, and each case is a process of its own. What is compared is resident memory at its highest.
"""

import json
import sys
from typing import Any

from bench import growth, training
from flows import memory, plan

FACTS = training.ROOT / "data/base/facts.json"
ONCE = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
ATTENTION = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
Case = dict[str, Any]


def case(
    what: str, batch: int, length: int, quantization: dict[str, Any] | None = training.NF4, *,
    rank: int = 32, lora: dict[str, Any] | None = None, checkpointing: bool = False, fast: bool = True, pack: bool = False,
) -> Case:  # fmt: skip
    """What `growth.one` is asked for."""
    return {
        "what": what, "batch": batch, "length": length, "quantization": quantization,
        "lora": lora or {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"},
        "reforge": {"gradient_checkpointing": checkpointing}, "train": {"fast": fast, "pack_weights": pack},
    }  # fmt: skip


CASES = (
    case("sft", 4, 64),
    case("sft", 8, 64),
    case("sft", 8, 128),
    case("sft", 16, 128),
    case("sft", 32, 32),
    case("sft", 4, 512),
    case("sft", 8, 128, None),
    case("sft", 8, 128, ONCE),
    case("sft", 8, 128, {"load_in_8bit": True}),
    case("sft", 8, 128, lora=ATTENTION),
    case("sft", 8, 128, rank=128),
    case("sft", 8, 128, checkpointing=True),
    case("sft", 16, 256, checkpointing=True),
    case("sft", 8, 256, None, checkpointing=True),
    case("sft", 8, 128, pack=True),
    case("sft", 8, 128, None, pack=True),
    case("sft", 8, 128, fast=False),
    case("sft", 8, 128, ONCE, checkpointing=True, fast=False),
    case("dpo", 8, 64),
    case("dpo", 4, 128, None),
)


def estimated(asked: Case) -> int:
    """Bytes at the peak, as `make plan` has them."""
    batch, length = asked["batch"], asked["length"]
    tokens, rows = batch * length, batch
    if asked["what"] == "dpo":  # the prompt once, both answers
        prompt, answer = growth.split(length)
        tokens, rows = batch * (prompt + 2 * answer), 2 * batch
    section = {"optim": "adamw_torch_fused"} | asked["reforge"] | asked["train"]
    need = memory.training(
        json.loads(FACTS.read_text()), section, asked["lora"], asked["quantization"], plan.this_device(),
        memory.Batch(tokens, rows * length, length, 1), copies=int(asked["what"] == "dpo"),
    )  # fmt: skip
    return need.total


def measure(rounds: int = 1) -> list[dict[str, Any]]:
    """Every case: what it is, and `estimated` and `measured` bytes."""
    found: list[dict[str, Any]] = []
    for asked in CASES:
        said = growth.median(asked, rounds, f"memory: {named(asked)}")
        found.append({"case": asked, "estimated": estimated(asked), "measured": int(said["peak"])})
        print(f"memory: estimated {found[-1]['estimated'] / growth.GIB:.2f} GiB", file=sys.stderr, flush=True)
    return found


def named(asked: Case) -> str:
    """The cells of a line of the table."""
    lora = asked["lora"]
    layers = "all" if lora["target_modules"] == "all-linear" else "q, v"
    cells = (
        asked["what"], f"{asked['batch']} × {asked['length']}", f"{lora['r']}, {layers}", memory.quantised(asked["quantization"]),
        "yes" if asked["reforge"]["gradient_checkpointing"] else "no",
        "packed" if asked["train"].get("pack_weights") else "yes" if asked["train"]["fast"] else "no",
    )  # fmt: skip
    return " | ".join(cells)


def table(found: list[dict[str, Any]]) -> str:
    """Mebibytes, and how far the estimate is off."""
    lines = [
        "| stage | batch | rank, layers | weights | checkpointing | tasks/fast.py | estimated, MiB | measured, MiB | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in found:
        said, real = each["estimated"], each["measured"]
        lines.append(f"| {named(each['case'])} | {said / 2**20:,.0f} | {real / 2**20:,.0f} | {said / real - 1:+.0%} |")
    return "\n".join(lines)
