"""Measure reforge beside its peers, and write docs/benchmarks.md.

    python -m bench                      # everything, on a machine that does nothing else; some hours on two cores
    python -m bench sft dpo              # these parts again; the others as they were measured last
    python -m bench data --rows 10000 100000

Parts are kept in tmp/bench, with what they were measured on; the page is made of all that are there.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # of dvc

from bench import data, growth, memory, noop, peers, training

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "tmp/bench"
PAGE = training.PAGE
ABOUT = {
    True: (
        "This is a CPU with products in bf16 (AVX512-BF16); one without them is on [a page of its own](benchmarks-float32.md).",
    ),
    False: (
        "This is a CPU without products in bf16 (AVX2), on which reforge computes in float32, and everything beside it too, since",
        "torch takes up to a hundred times longer for them in bf16. A CPU that has them is on [a page of its own](benchmarks.md).",
    ),
}
LIMITS = ROOT / "bench" / PAGE.name.replace("benchmarks", "limits")  # what stands in the way of bars, by hand
ONCE = ("growth", "memory", "stages", "data", *training.SLOW)  # long, so one process of each
BUSY = "; beside other work"  # of the machine, when a part began
AFTER_DPO = ("dpo", "merge", "evaluate@dpo", "report")
LARGEST = """\
Start is imports and params, load is models, tokenizers and tables. The largest, and what was done about them: `sft` and `dpo`
train by `tasks/fast.py` (rows without padding, shared beginnings once, one function for each LoRA layer and norm, a head
that keeps no logits; the reference comes from `reference`); `evaluate` answers in batches of like length by
`tasks/decode.py` (rows leave when they end, keys and values have place for the next token, weights as oneDNN reads them, no
copies of the head), scores the options of a question together, and each of its three instances reruns only for its own model."""


def main(arguments: list[str] | None = None) -> int:
    """Measure the parts asked for, and write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each system in turn (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="of a training, that are counted (default: %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="of the data part")
    parser.add_argument("--home", type=Path, default=ROOT / "tmp/peers", help="for the peers' environments")
    parser.add_argument("parts", nargs="*", metavar="PART")
    given = parser.parse_args(arguments)
    rounds, steps = given.rounds, given.steps
    parts: dict[str, Callable[[], Any]] = {
        **{what: partial(training.measure, what, 1 if what in ONCE else rounds, steps) for what in training.SYSTEMS},
        "peers": lambda: peers.measure(given.home.resolve(), rounds, steps),
        "peers-dpo": lambda: peers.measure_dpo(given.home.resolve(), rounds, steps),
        "repro": lambda: noop.repro(2 * rounds + 1),
        "flow": lambda: noop.flow(2 * rounds + 1),
        "start": lambda: noop.start(2 * rounds + 1),
        "growth": growth.measure,
        "memory": memory.measure,
        "stages": stages,
        "data": lambda: data.measure_all(sorted(set(given.rows))),
    }
    if unknown := [part for part in given.parts if part not in parts]:
        parser.error(f"no part {unknown[0]}; there are {', '.join(parts)}")
    if len(set(given.rows)) < 2:
        parser.error("--rows: expected two sizes or more, found one: there is no slope")
    KEPT.mkdir(parents=True, exist_ok=True)
    for part in given.parts or parts:
        repeated = "once" if part in ONCE else f"rounds {rounds}, steps {steps}"
        busy = BUSY if psutil.cpu_percent(1.0) > 20 else ""
        kept = {"found": parts[part](), "machine": f"{machine()}{busy}; {repeated}"}
        (KEPT / f"{part}.json").write_text(json.dumps(kept, indent=2) + "\n")
    found = {
        part: json.loads((KEPT / f"{part}.json").read_text()) for part in parts if (KEPT / f"{part}.json").is_file()
    }
    measured: dict[str, list[str]] = {}
    for part, kept in found.items():
        measured.setdefault(kept["machine"], []).append(part)
    PAGE.write_text(page({part: kept["found"] for part, kept in found.items()}, measured))
    print(f"bench: {PAGE.relative_to(ROOT)}")
    return 0


def machine() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    libraries = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "dvc")
    )
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {threads} threads; {libraries}"


def stages() -> dict[str, dict[str, float]]:
    """Stage → seconds by part, of a `dvc repro` in a clone with nothing but the raw data; `dvc` is what no stage took.

    Raises:
        SystemExit: the run fails.
    """
    with tempfile.TemporaryDirectory() as name:
        clone, kept = Path(name, "clone"), Path(name, "profile")
        kept.mkdir()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)  # noqa: S603, S607
        environment = os.environ | {"PYTHONPATH": str(ROOT / "bench/profile"), "REFORGE_PROFILE": str(kept)}
        started = time.perf_counter()
        done = subprocess.run(noop.DVC, cwd=clone, env=environment, capture_output=True, text=True)  # noqa: S603
        whole = time.perf_counter() - started
        if done.returncode:
            raise SystemExit(f"bench: dvc repro of a clone:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        differ = subprocess.run(["git", "status", "--short"], cwd=clone, capture_output=True, text=True, check=True)  # noqa: S607
        print(f"stages: outputs that differ from the committed ones: {differ.stdout or 'none'}", file=sys.stderr)
        found: dict[str, dict[str, float]] = {p.stem: json.loads(p.read_text()) for p in sorted(kept.glob("*.json"))}
    found["dvc"] = {"work": whole - sum(sum(parts.values()) for parts in found.values())}
    return found


def page(found: dict[str, Any], machines: dict[str, list[str]]) -> str:
    """All that was measured, as Markdown: first the bars, then each part. `machines`: what which parts were measured on."""
    disturbed = any(BUSY in name and {"stages", "data"} & set(parts) for name, parts in machines.items())
    lines = [
        "# Benchmarks", "",
        "Made by `make bench`, whose parts can be measured one by one. `bench/` says what each does; each system runs in a",
        "process of its own, in turn with the others, and the median of the rounds is given (one round is one figure). Where",
        "a bar compares two parts, both are scaled to the same speed of reforge, which was measured in turn with either.",
        "First losses are comparable within one precision and one order of rows: grouping by length begins with other rows.",
        "What has tcmalloc keeps 128 compiled products of oneDNN, as reforge always does (`tasks/__init__.py`).", "",
        *ABOUT[training.BF16], "",
        *(f"- {', '.join(parts)}: {name}" for name, parts in machines.items()), "",
        "| work | bar | found | verdict | products alone | with operations |", "| --- | --- | --- | --- | --- | --- |", *bars(found, disturbed), "",
        "The products alone are the matrix products of a step as reforge makes them and nothing else, of the tokens that are left",
        "where what rows begin with is computed once (`products` below). With operations: what stands between these products in",
        "any decoder too, by torch's own functions: without autograd, optimizer or trainer.", "", *LIMITS.read_text().splitlines(), "",
    ]  # fmt: skip
    for part in training.SYSTEMS:
        if part in found:
            lines += [f"## {part}", "", training.table(part, found[part]), ""]
    for part, what, unit in (("peers", "sft", "tokens/s"), ("peers-dpo", "dpo", "pairs/s")):
        if part in found:
            lines += [f"## {what} of other programs", "", f"| program | {unit} |", "| --- | --- |"]
            lines += [
                f"| {name} | {f'{rate:.3g}' if isinstance(rate, float) else rate} |"
                for name, rate in found[part].items()
            ]
            lines += [""]
    for part, what in (
        ("repro", "`dvc repro` with nothing to do | ten stages of `true` | ratio | this graph of `true`"),
        ("start", "`validate --help` | `import polars` | ratio"),
    ):
        if part in found:
            ours, theirs, *alike = found[part]
            cells = [f"{ours:.2f} s", f"{theirs:.2f} s", f"{ours / theirs:.2f}", *(f"{other:.2f} s" for other in alike)]
            shown = what if alike or part == "start" else what.rpartition(" | ")[0]
            lines += [f"| {shown} |", f"|{' --- |' * len(cells)}", f"| {' | '.join(cells)} |", ""]
    if "flow" in found:
        ours, theirs, count = found["flow"]
        lines += [
            f"| flow, {count} stages Cached | {count} empty tasks | added |", "| --- | --- | --- |",
            f"| {ours:.2f} s | {theirs:.2f} s | {ours - theirs:+.2f} s |", "",
        ]  # fmt: skip
    if found.get("stages"):
        lines += ["## Where the default run's time goes", "", *profile(found["stages"]), "", LARGEST, ""]
    if "growth" in found:
        lines += [growth.section(found["growth"])]
    if "memory" in found:
        lines += ["## Memory as `make plan` estimates it", "", memory.__doc__ or "", memory.table(found["memory"]), ""]
    if "data" in found:
        lines += ["## Data stages", "", data.table(found["data"]), ""]
    return "\n".join(lines)


def profile(stages: dict[str, dict[str, float]]) -> list[str]:
    """A line of a table for each stage, the longest first."""
    parts = ("start", "load", "work", "save")
    lines = [f"| stage | seconds | share | {' | '.join(parts)} |", f"| --- |{' --- |' * (len(parts) + 2)}"]
    total = sum(sum(seconds.values()) for seconds in stages.values())
    for name, seconds in sorted(stages.items(), key=lambda item: -sum(item[1].values())):
        own = sum(seconds.values())
        cells = " | ".join(f"{seconds.get(part, 0):.1f}" for part in parts)
        lines.append(f"| `{name}` | {own:.1f} | {own / total:.0%} | {cells} |")
    return [*lines, f"| all | {total:.0f} | | {' | '.join('' for _ in parts)} |"]


def scaled(of: dict[str, Any], to: dict[str, float]) -> dict[str, Any]:
    """Rates of another part, as they would be at the speed that the machine had when `to` was measured, by what is in both."""
    same = to[training.BESIDE] / of[training.BESIDE] if training.BESIDE in of else 1.0
    return {name: same * rate if isinstance(rate, float) else rate for name, rate in of.items()}


def bars(found: dict[str, Any], disturbed: bool) -> list[str]:
    """A line of the table for each bar whose parts were measured; `disturbed`: profile and data stages were not on an idle machine."""
    out: list[str] = []
    bits = training.BITS

    def bar(what: str, asked: str, value: float, met: bool, *limits: float) -> None:
        most = [f"{limit:.2f}" for limit in limits] + [""] * (2 - len(limits))
        out.append(f"| {what} | {asked} | {value:.2f} | {'met' if met else 'missed'} | {' | '.join(most)} |")

    for what, products, over_peer, over_trl in (("sft", "products", 2.5, 4.0), ("dpo", "products-dpo", 3.5, 5.0)):
        if what not in found:
            continue
        rates = {name: figures["rate"] for name, figures in found[what].items()}
        others = [rate for name, rate in rates.items() if not name.startswith("reforge")]
        peer = found.get("peers" if what == "sft" else "peers-dpo", {})
        others += [r for n, r in scaled(peer, rates).items() if n != training.BESIDE and isinstance(r, float)]
        alone = scaled({name: figures["rate"] for name, figures in found.get(products, {}).items()}, rates)
        most = [alone[name] for name in (training.ONCE, training.REST) if name in alone]
        fastest = "the fastest peer"
        against = [
            (fastest, max(others), over_peer),
            (f"TRL's{training.DEFAULTS[8:]}", rates[training.DEFAULTS], over_trl),
        ]
        for name, figures in found.get(f"{what}-bf16", {}).items():
            against.append((f"TRL's{name[8:]}", figures["rate"], over_trl))
        ours = [name for name in rates if name.startswith("reforge")]
        best = [name for name in ours if "tcmalloc" in name] or ours  # as peers at their best have it
        for name in ours:
            for other, figure, asked in against:
                if name in best or other != fastest:
                    ratio = rates[name] / figure
                    limits = [limit / figure for limit in most]
                    bar(f"{what}, {name[9:]}, × {other}", f"≥ {asked}", ratio, ratio >= asked, *limits)
        if most and what == "sft":
            every = alone["every token"]
            share = rates[f"reforge, {bits}"] / every
            limits = [limit / every for limit in most]
            bar(f"sft, {bits}, share of the products of every token", "≥ 0.6", share, share >= 0.6, *limits)
        lean = ", not packed" if f"reforge, {bits}, not packed" in found[what] else ""  # what saves memory, if measured
        peaks = [found[what][f"reforge, {kind}{lean}"]["peak"] for kind in ("NF4", bits)]
        ratio = peaks[0] / peaks[1]
        bar(
            f"{what}{lean}, peak memory of NF4 × that of {bits}, 0.13 billion parameters",
            "≤ 0.75",
            ratio,
            ratio <= 0.75,
        )
    for what, ratio in growth.ratios(found["growth"]).items() if "growth" in found else ():
        bar(f"{what}, the same, 0.9 billion parameters", "≤ 0.75", ratio, ratio <= 0.75)
    for what, asked in (("reference", 2.0), ("answers", 3.0), ("options", 3.0)):
        if what in found:
            rates = {name: figures["rate"] for name, figures in found[what].items()}
            last = [*found[what]][-1]
            ratio = rates["reforge"] / rates[last]
            bar(f"{what}, × {last}", f"≥ {asked:g}", ratio, ratio >= asked)
    for what, name, asked in (
        ("repro", "`dvc repro` with nothing to do", 1.2),
        ("start", "start of a data stage", 1.5),
    ):
        if what in found:
            ours, other, *_ = found[what]
            bar(name, f"≤ {asked:g}", ours / other, ours / other <= asked)
    if found.get("stages"):
        seconds = found["stages"]
        whole = {name: sum(parts.values()) for name, parts in seconds.items()}
        share = sum(whole[stage] for stage in (*AFTER_DPO, "dvc")) / sum(whole.values())
        met = "not on an idle machine" if disturbed else "met" if share <= 0.35 else "missed"
        out.append(f"| from an edit of `dpo.beta` to the report, × all | ≤ 0.35 | {share:.2f} | {met} | | |")
    if "data" in found:
        slope, peak = data.summary(found["data"])
        met = "not on an idle machine" if disturbed else "met" if slope <= 1.1 else "missed"
        out.append(f"| data stages, slope of seconds against rows | ≤ 1.1 | {slope:.2f} | {met} | | |")
        largest = max(map(int, found["data"]))  # the bar is for a million
        met = "not measured" if largest < 1_000_000 else "met" if peak <= 1.5 * 2**30 else "missed"
        out.append(
            f"| data stages, peak GiB at {largest:,} rows | ≤ 1.5 at 1,000,000 | {peak / 2**30:.2f} | {met} | | |"
        )
    return out


if __name__ == "__main__":
    sys.exit(main())
