"""How cost grows with size: tokens, rows, pairs, depth of the model; and what 4 bits save where the model is large.

Each figure is one process of `bench.training.work`, with rows of one length made of any tokens: what they say costs nothing.
Depth is that of a random Llama of the default base's width. The large model is random too, of about 0.9 billion parameters
and SmolLM2's tokenizer, of whose vocabulary its rows need few. Models are written by processes of their own, since what a
process once held counts in its peak. Slopes are least squares on logarithms of both axes: 1 is proportional.
"""

import json
import math
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import training

IMAGES = training.ROOT / "docs/images"
STEPS, WARM = 3, 1  # counted, and before them not
LENGTH = 128  # of a row, where that is not what varies
LARGE = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 18,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip
GIB = 2**30
# what varies → what is asked of `one` for each of its values
SIZES: dict[str, dict[int, dict[str, Any]]] = {
    "tokens": {n: {"length": n, "batch": 2} for n in (64, 128, 256, 512, 1024)},
    "rows": {n: {"length": 64, "batch": n} for n in (2, 4, 8, 16, 32)},
    "pairs": {n: {"what": "dpo", "length": LENGTH, "batch": 4, "pairs": n} for n in (16, 32, 64)},
    "layers": {n: {"length": LENGTH, "batch": 2, "layers": n} for n in (6, 15, 30, 60)},
}
LABELS = {"tokens": "tokens per row", "rows": "rows per batch", "pairs": "pairs", "layers": "layers"}
Found = dict[str, dict[str, dict[str, float]]]  # what varied, or `large` → its value → seconds, peak


# --- one process -----------------------------------------------------------------------------------------------------


def write(folder: Path, shape: dict[str, Any]) -> None:
    """A random Llama of `shape`, beside the tokenizer of the default base."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(training.BASE)
    config.update(shape)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for path in training.BASE.iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, folder)


def one(asked: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step, or of all of a DPO that has its `pairs` once, and the peak of this process in bytes."""
    what, length, batch, pairs = asked.get("what", "sft"), asked["length"], asked["batch"], asked.get("pairs")
    steps = asked.get("steps", STEPS) if pairs is None else pairs // batch - WARM
    draw = random.Random(0)

    def rows() -> list[dict[str, list[int]]]:
        prompt, answer = split(length)
        made = []
        for _ in range(pairs or batch * (steps + WARM)):
            ids = [[draw.randrange(1000, 30000) for _ in range(n)] for n in (prompt, answer, answer)]
            made.append(dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True)))
        return made

    base = Path(asked.get("base", training.BASE))
    lora = asked.get("lora", training.LORA)
    vars(training).update(BASE=base, BATCH=batch, WARM=WARM, LORA=lora, rows=rows)  # of this process alone
    settings: dict[str, Any] = {key: asked[key] for key in ("quantization", "reforge", "train") if key in asked}
    began = time.perf_counter()
    found = training.work(what, settings, steps)
    took = time.perf_counter() - began
    each = batch if what == "dpo" else batch * length
    return {"seconds": took if pairs else each / found["rate"], "peak": found["peak"]}


def split(length: int) -> tuple[int, int]:
    """Tokens of the prompt and of the answer in a row of `length`."""
    answer = round(0.6 * length)
    return length - answer, answer


# --- all of them -----------------------------------------------------------------------------------------------------


def measure(rounds: int = 1) -> Found:
    """Every size once a round, medians of them; several minutes on two cores."""
    found: Found = {}
    with tempfile.TemporaryDirectory() as name:
        for what, sizes in SIZES.items():
            found[what] = {}
            for size, asked in sizes.items():
                base = {}
                if what == "layers":
                    folder = Path(name) / f"{size}-layers"
                    _process({"write": str(folder), "shape": {"num_hidden_layers": size}})
                    base = {"base": str(folder)}
                found[what][str(size)] = median(asked | base, rounds, f"{what} {size}")
        found["large"] = large(Path(name) / "large", rounds)
    return found


def large(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """`sft, NF4` and its like → seconds of a step, and peak, of the large model written to `folder`."""
    _process({"write": str(folder), "shape": LARGE})
    size = next(folder.glob("*.safetensors")).stat().st_size
    found: dict[str, dict[str, float]] = {"weights": {"seconds": 0.0, "peak": size}}
    for what in ("sft", "dpo"):
        for name, quantization in ((training.BITS, None), ("NF4", training.NF4)):
            asked = {"what": what, "length": LENGTH, "batch": 1, "steps": 2, "base": str(folder)}
            found[f"{what}, {name}"] = median(asked | {"quantization": quantization}, rounds, f"large {what} {name}")
    return found


def median(asked: dict[str, Any], rounds: int, said: str) -> dict[str, float]:
    """What `one` finds in a process of its own, the median of so many."""
    runs = [_process(asked) for _ in range(rounds)]
    found = {key: statistics.median(run[key] for run in runs) for key in ("seconds", "peak")}
    print(f"growth: {said}: {found['seconds']:.3g} s, {found['peak'] / GIB:.2f} GiB", file=sys.stderr, flush=True)
    return found


def _process(asked: dict[str, Any]) -> dict[str, float]:
    """What a process of this module says.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, "-m", "bench.growth", json.dumps(asked)]
    done = subprocess.run(command, cwd=training.ROOT, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"bench: growth, {asked}:\n{done.stdout}{done.stderr}")
    said: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return said


# --- what the page shows ---------------------------------------------------------------------------------------------


def slope(points: Iterable[tuple[float, float]]) -> float:
    """Of log y against log x, by least squares."""
    xs, ys = zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)
    return statistics.linear_regression(xs, ys).slope


def ratios(found: Found) -> dict[str, float]:
    """`sft` and `dpo` → peak of NF4 over that without quantisation, of the large model."""
    return {
        what: found["large"][f"{what}, NF4"]["peak"] / found["large"][f"{what}, {training.BITS}"]["peak"]
        for what in ("sft", "dpo")
    }


def section(found: Found) -> str:
    """Markdown of all of it; its plots are written to docs/images."""
    lines = [
        "## Cost against size", "",
        f"SFT of {training.BITS} LoRA, seconds of a step: against tokens per row (2 rows), rows (of 64 tokens), layers (2 rows of {LENGTH}",
        f"tokens). DPO: seconds of all of it, from loading to the last step, against pairs of {LENGTH} tokens a side. Slopes on",
        "logarithms of both axes: 1 is proportional, below it a fixed cost is in it.", "",
    ]  # fmt: skip
    if not found.keys() & SIZES:  # the large model alone
        lines = ["## A large model", ""]
    shown = [(what, "seconds") for what in SIZES if what in found] + [("layers", "peak")] * ("layers" in found)
    for what, key in shown:
        unit = GIB if key == "peak" else 1
        points = [(int(size), figures[key] / unit) for size, figures in found[what].items()]
        name = f"{training.PAGE.stem}-{what}-{key}.svg"
        label = "GiB at the peak" if key == "peak" else "seconds"
        _draw(IMAGES / name, points, LABELS[what], label)
        values = ", ".join(f"{size}: {value:.3g}" for size, value in points)
        lines += [
            f"![{label} against {LABELS[what]}](images/{name})", "",
            f"{label} against {LABELS[what]}, slope {slope(points):.2f} ({values})", "",
        ]  # fmt: skip
    if "large" in found:
        weights = found["large"]["weights"]["peak"] / GIB
        lines += [
            f"A random Llama of {weights / 2 * GIB / 1e9:.2f} billion parameters, whose 16-bit weights are {weights:.2f} GiB; one row",
            f"or pair of {LENGTH} tokens a step:", "",
            f"| large model | seconds a step | peak, GiB | × {training.BITS} |", "| --- | --- | --- | --- |",
        ]  # fmt: skip
        for name, figures in found["large"].items():
            if name != "weights":
                plain = found["large"][f"{name.partition(',')[0]}, {training.BITS}"]["peak"]
                peak = figures["peak"]
                lines += [f"| {name} | {figures['seconds']:.2f} | {peak / GIB:.2f} | {peak / plain:.2f} |"]
        lines += [""]
    return "\n".join(lines)


def _draw(path: Path, points: list[tuple[int, float]], x: str, y: str) -> None:
    """Measured points and the fitted line, both axes in logarithms. Same points, same bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    xs, ys = zip(*points, strict=True)
    fitted = slope(points)
    middle = statistics.fmean(math.log(value) for value in ys) - fitted * statistics.fmean(math.log(n) for n in xs)
    ink = "#767c85"  # readable on light and dark
    settings = {
        "svg.fonttype": "none", "svg.hashsalt": "reforge", "font.size": 10, "font.family": "DejaVu Sans", "text.color": ink,
        "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink, "axes.edgecolor": ink,
    }  # fmt: skip
    with mpl.rc_context(settings):
        figure = Figure(figsize=(4.2, 2.8), layout="constrained")
        axes = figure.add_subplot()
        axes.loglog(xs, [math.exp(middle + fitted * math.log(n)) for n in xs], "-", color=ink, lw=1)
        axes.loglog(xs, ys, "o", color="#0072b2", ms=5)
        axes.set_xticks(xs, [str(n) for n in xs])
        axes.set_xticks([], minor=True)
        low, high = min(ys), max(ys)
        ticks = [low, math.sqrt(low * high), high]
        axes.set_yticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axes.set_yticks([], minor=True)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_title(f"slope {fitted:.2f}", fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        nameless = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(path, format="svg", transparent=True, metadata=nameless)


if __name__ == "__main__":  # one process of `measure`
    asked_for = json.loads(sys.argv[1])
    if "write" in asked_for:
        write(Path(asked_for["write"]), asked_for["shape"])
        print("{}")
    else:
        print(json.dumps(one(asked_for)))
