"""What the data stages cost as rows grow: `ingest`, `validate`, `split`, `template` on generated conversations.

Rows are drawn words, about 100 tokens each, no two alike. Seconds and peak memory are those of the stage's own process, its
start not counted. The slope is that of seconds against rows on logarithmic axes, by least squares: 1 is linear.
"""

import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
STAGES = ("ingest", "validate", "split", "template")


def write_rows(path: Path, count: int) -> None:
    """So many rows of JSONL, `prompt` and `completion`."""
    draw = random.Random(0)
    lines = (ROOT / "data/raw/replay.jsonl").read_text(encoding="utf-8").splitlines()
    said = [turn["content"] for line in lines for turn in json.loads(line)["messages"]]
    words = sorted({*" ".join(said).lower().split()})
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            prompt = f"{' '.join(draw.choices(words, k=20))} {number}?"
            file.write(json.dumps({"prompt": prompt, "completion": " ".join(draw.choices(words, k=50))}) + "\n")


def measure(count: int) -> dict[str, tuple[float, int]]:
    """Stage → (seconds, peak bytes) on so many rows."""
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data/raw").mkdir(parents=True)
        (folder / "data/base").mkdir()
        (folder / "data/base/model").symlink_to(ROOT / "data/base/model")
        write_rows(folder / "data/raw/rows.jsonl", count)
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        params["ingest"]["sources"] = [{"path": "data/raw/rows.jsonl", "license": "none"}]
        params["template"]["replay"] = 0
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
        found = {}
        for stage in STAGES:
            command = graph[stage]["cmd"].replace("python", sys.executable, 1)
            done = subprocess.run(  # noqa: S602
                command, shell=True, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                text=True,
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(f"bench: {stage} of {count} rows:\n{done.stdout}{done.stderr}")
            event = json.loads((folder / "data" / stage / "event.json").read_text())
            found[stage] = float(event["seconds"]), int(event["peak_bytes"])
        return found


def measure_all(counts: list[int]) -> dict[str, dict[str, tuple[float, int]]]:
    """Rows (as text, for JSON) → what `measure` found."""
    found = {}
    for count in counts:
        found[str(count)] = measure(count)
        print(f"data: {count} rows: {found[str(count)]}", file=sys.stderr, flush=True)
    return found


def _together(stages: dict[str, tuple[float, int]], names: tuple[str, ...] = STAGES) -> tuple[float, int]:
    return sum(stages[name][0] for name in names), max(stages[name][1] for name in names)


def _slope(counts: list[str], seconds: list[float]) -> float:
    logarithms = [math.log(int(count)) for count in counts], [math.log(max(s, 0.01)) for s in seconds]
    return statistics.linear_regression(*logarithms).slope


def summary(found: dict[str, dict[str, tuple[float, int]]]) -> tuple[float, int]:
    """Slope over all sizes, and the peak in bytes at the largest, of all stages together."""
    whole = [_together(stages) for stages in found.values()]
    return _slope([*found], [seconds for seconds, _ in whole]), whole[-1][1]


def table(found: dict[str, dict[str, tuple[float, int]]]) -> str:
    """As Markdown: a row a stage, and all four together."""
    lines = [
        f"| stage | {' | '.join(f'{int(n):,} rows' for n in found)} | slope |",
        f"| --- | {' | '.join('---' for _ in found)} | --- |",
    ]
    for label, names in (*((f"`{name}`", (name,)) for name in STAGES), ("all", STAGES)):
        whole = [_together(stages, names) for stages in found.values()]
        cells = " | ".join(f"{seconds:.1f} s, {peak / 2**30:.2f} GiB" for seconds, peak in whole)
        lines.append(f"| {label} | {cells} | {_slope([*found], [seconds for seconds, _ in whole]):.2f} |")
    return "\n".join(lines)
