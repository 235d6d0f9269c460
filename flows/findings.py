"""What an experiment shows: recorded runs to a page and its drawings. Same runs, same bytes; nothing is run or read here.

Arms are compared with the first one, in two ways that must both say so before a difference is called one:

- over seeds: the 95 % t interval of the mean difference within each seed excludes 0 (Student 1908). It needs two seeds;
- over items, where both arms answered the same ones: the paired tests of `tasks.compare`, items of all seeds together.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from tasks import chart, compare
from tasks.compare import Difference, Item, Measure

# light, dark; the palette of Okabe and Ito (2008), which people who see few colours can tell apart
COLOURS = (("#0072b2", "#56b4e9"), ("#d55e00", "#f0945a"), ("#009e73", "#4fd0a5"), ("#cc79a7", "#e3a6c7"), ("#8a6d00", "#f0e442"), ("#555555", "#bbbbbb"))  # fmt: skip
INK = {"--soft": ("#5c636d", "#a2a8b1"), "--line": ("#d8d4cc", "#31353c")}
LOWER = re.compile(r"loss|perplexity|entropy|(^|[._])kl\b|peak memory")  # less is better
GIB = 2**30
SHOWN = 3  # figures that the verdict names in each direction


class Cost(NamedTuple):
    """What a stage took when it really ran on this machine; None where it never did since records are kept.

    `seconds` is None too where an interrupted training went on from a checkpoint: the rest is not the whole.
    """

    inputs: str  # a key of all that it ran with: the same key is the same run
    seconds: float | None
    peak: int | None  # bytes
    trains: bool


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    figures: dict[str, float]  # FILE:KEY → figure
    curves: dict[str, list[tuple[float, float]]]  # path → (step, value)
    items: dict[str, list[dict[str, Any]]] = field(
        default_factory=dict
    )  # FILE of a figure → its items, where it has some
    costs: dict[str, Cost] = field(default_factory=dict)  # stage → cost


Runs = Mapping[str, Mapping[int, Run]]  # label → seed → run


@dataclass(frozen=True)
class Finding:
    """One figure of an arm against the same figure of the first arm.

    Attributes:
        differences: of each seed that both have.
        low, high: the 95 % interval of their mean; None with one seed.
        paired: the test on items; None where there are none.
        call: better, worse, changed, no different; unknown: one seed, and no items.
    """

    metric: str
    before: float
    after: float
    differences: tuple[float, ...]
    low: float | None
    high: float | None
    paired: Difference | None
    call: str


def page(
    name: str, question: str, arms: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], given: Runs
) -> dict[str, str]:
    """File → content: NAME.md and its drawings, NAME--CURVE.svg."""
    runs = with_memory({label: given[label] for label in arms if given.get(label)})
    found = {label: judge(runs, label) for label in list(runs)[1:]}
    missing = [f"{label} with seed {seed}" for label in arms for seed in seeds if seed not in given.get(label, {})]
    drawings = draw(name, runs)
    parts = [
        f"# {name}",
        "<!-- made by `python -m flows.experiments`; edit experiments.yaml instead -->",
        question,
        f"**{verdict(runs, found)}**",
        *([f"Not run yet, and not in any figure here: {', '.join(missing)}."] if missing else []),
        "## Arms",
        _table(
            ["arm", "params.yaml", "seeds"],
            [[label, _settings(arms[label]), ", ".join(map(str, sorted(runs[label])))] for label in runs],
        ),
        "## Figures",
        "Mean over seeds [lowest, highest].",
        _table(["", *runs], [[title(m), *(_spread(m, runs[label]) for label in runs)] for m in _metrics(runs)]),
        *_differences(runs, found),
        "## Curves" if drawings else "",
        *(f"![{_curve(path)}]({file})" for path, (file, _) in drawings.items()),
        "## What it cost",
        *_cost(runs),
        "## Again",
        f"    python -m flows.experiments {name}",
        "runs what is not in the cache and writes this page. To take an arm, write its values into `params.yaml`: `dvc repro` "
        "then restores it. Each point is in `dvc exp show --only-changed` as "
        f"`{name}-ARM-SEED`, or under the first name of those that share it.",
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    return {f"{name}.md": text} | dict(drawings.values())


# --- judging ---------------------------------------------------------------------------------------------------------


def with_memory(runs: Runs) -> dict[str, dict[int, Run]]:
    """`runs` with the peak memory of each training that differs between arms among its figures, in GiB."""
    stages = [
        stage for stage in own(runs) if any(r.costs[stage].trains for every in runs.values() for r in every.values() if stage in r.costs)
    ]  # fmt: skip
    return {
        label: {
            seed: replace(run, figures=run.figures | {f"{stage}: peak memory, GiB": peak / GIB for stage in stages if stage in run.costs and (peak := run.costs[stage].peak)})
            for seed, run in every.items()
        }
        for label, every in runs.items()
    }  # fmt: skip


def own(runs: Runs) -> list[str]:
    """Stages that arms of one seed don't share, in the order of the graph."""
    keys: dict[str, dict[int, set[str]]] = {}
    for every in runs.values():
        for seed, run in every.items():
            for stage, cost in run.costs.items():
                keys.setdefault(stage, {}).setdefault(seed, set()).add(cost.inputs)
    return [stage for stage, seeds in keys.items() if any(len(inputs) > 1 for inputs in seeds.values())]


def judge(runs: Runs, label: str) -> list[Finding]:
    """Every figure of arm `label` against the first arm, over the seeds that both have."""
    first = next(iter(runs.values()))
    other = runs[label]
    seeds = sorted(first.keys() & other.keys())
    paired: dict[str, Difference] = {}
    for file in dict.fromkeys(metric.partition(":")[0] for metric in _metrics(runs)):
        measures = [m for m in map(measure, _metrics(runs)) if m and f"{file}:{m.key}" in _metrics(runs)]
        sides = [_pool(every, seeds, file) for every in (first, other)]
        if measures and {i["id"] for i in sides[0]} & {i["id"] for i in sides[1]}:
            paired |= {f"{file}:{d.measure.key}": d for d in compare.compare(sides[0], sides[1], measures)}
    found = []
    for metric in _metrics(runs):
        both = [seed for seed in seeds if metric in first[seed].figures and metric in other[seed].figures]
        if both:
            before, after = ([every[seed].figures[metric] for seed in both] for every in (first, other))
            found.append(_finding(metric, before, after, paired.get(metric)))
    return found


def _pool(every: Mapping[int, Run], seeds: Iterable[int], file: str) -> list[Item]:
    return [item | {"id": f"{seed} {item['id']}"} for seed in seeds for item in every[seed].items.get(file, [])]


def _finding(metric: str, before: Sequence[float], after: Sequence[float], paired: Difference | None) -> Finding:
    differences = tuple(round(b - a, 12) for a, b in zip(before, after, strict=True))
    middle = math.fsum(differences) / len(differences)
    low = high = None
    differs: bool | None = None if paired is None else paired.call != "no different"
    if len(differences) > 1:
        half = _half(differences, middle)
        low, high = middle - half, middle + half
        differs = not low <= 0 <= high and differs is not False
    known = measure(metric)
    better = known.better if known else -1 if LOWER.search(metric) else 0
    call = "unknown" if differs is None else compare.direction(better, middle, differs)
    return Finding(metric, _mean(before), _mean(after), differences, low, high, paired, call)


def _half(differences: Sequence[float], middle: float) -> float:
    """Half of the 95 % interval of the mean."""
    from scipy import stats

    n = len(differences)
    deviation = math.sqrt(math.fsum((d - middle) ** 2 for d in differences) / (n - 1))
    return float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)


def measure(metric: str) -> Measure | None:
    """What `tasks.compare` knows of a figure of an evaluation."""
    file, _, key = metric.partition(":")
    return next((m for m in compare.MEASURES if m.key == key), None) if "evaluate/" in file else None


# --- in words --------------------------------------------------------------------------------------------------------


def verdict(runs: Runs, found: Mapping[str, Sequence[Finding]]) -> str:
    """Two sentences: what is better at what and by how much, and how far the noise is known."""
    reference = next(iter(runs))
    if not found:
        return f"There is nothing to compare {reference} with yet. The figures below are of this arm alone."
    counts = sorted({len(f.differences) for every in found.values() for f in every})
    if not counts:
        return f"No arm has a seed in common with {reference}. So nothing can be said about differences."
    most = counts[-1]
    noise = f"the noise of {most} seeds" if most > 1 else "chance on the items asked"
    said, equal = [], []
    for label, every in found.items():
        calls = [f"{word} {_list(_named(every, call))}" for call, word in (("better", "better at"), ("worse", "worse at")) if any(f.call == call for f in every)]  # fmt: skip
        text = "is " + " and ".join(calls) if calls else ""
        if changed := _named(every, "changed"):
            text += f"{', and ' if text else ''}differs in {_list(changed)}"
        if text:
            said.append(f"{label} {text}")
        else:
            equal.append(label)
    sentences = []
    if equal and not said:
        sentences = [f"No difference beyond {noise} between {reference} and {_list(equal)}."]
    else:
        rest = f"; {_list(equal)} {'show' if len(equal) > 1 else 'shows'} no difference from it beyond {noise}" if equal else ""  # fmt: skip
        sentences = [f"Against {reference}, {'; '.join(said)}{rest}."]
    if most == 1:
        sentences.append("With one seed only, how far another seed would move these figures is unknown.")
    else:
        same = [m for m in _metrics(runs) if all(f.call == "no different" for e in found.values() for f in e if f.metric == m)]  # fmt: skip
        rest = f"; no arm goes beyond it in {len(same)} of {len(_metrics(runs))} figures" if said and same else ""
        sentences.append(
            f"A difference is called one only where {most} seeds agree on it (95 % interval) and, where the same items were "
            f"answered, a paired test does too{rest}."
        )
    return " ".join(sentences)


def _named(found: Sequence[Finding], call: str) -> list[str]:
    """The figures of this call, the most certain first, with what they moved by."""
    every = sorted((f for f in found if f.call == call), key=lambda f: -abs(_certainty(f)))
    named = [f"{title(f.metric)} ({_value(f.metric, f.before)} → {_value(f.metric, f.after)})" for f in every[:SHOWN]]
    return named + ([f"{len(every) - SHOWN} more"] if len(every) > SHOWN else [])


def _certainty(found: Finding) -> float:
    """How many halves of its interval a difference is away from 0; with one seed, of that over items."""
    low, high = (found.paired.low, found.paired.high) if found.paired and found.low is None else (found.low or 0, found.high or 0)  # fmt: skip
    return (low + high) / max(high - low, 1e-12)


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def title(metric: str) -> str:
    """A figure's name: that of `tasks.compare`, or its stage and key."""
    known = measure(metric)
    if known:
        return known.label[0].lower() + known.label[1:] if known.label[1:2].islower() else known.label
    file, _, key = metric.partition(":")
    if not file.endswith(".json"):
        return metric
    where = Path(file).stem if Path(file).stem != "metrics" else Path(file).parent.name
    return f"{where}: {re.sub('[._]', ' ', key)}"


def _value(metric: str, found: float) -> str:
    known = measure(metric)
    if known:
        return compare.value(known, found, raw=True)
    return compare.number(int(found) if found.is_integer() and abs(found) >= 10 else found)


def _delta(metric: str, found: float, *, unit: bool = False) -> str:
    """A signed difference between means; of perplexities too, which are not on the scale of their items here."""
    known = measure(metric)
    if known and not known.key.endswith("perplexity"):
        return compare.delta(known, found, unit=unit)
    return "0" if not found else f"{'+' if found > 0 else '−'}{compare.number(abs(found))}"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _metrics(runs: Runs) -> list[str]:
    return list(dict.fromkeys(metric for every in runs.values() for run in every.values() for metric in run.figures))


def _spread(metric: str, every: Mapping[int, Run]) -> str:
    values = [run.figures[metric] for run in every.values() if metric in run.figures]
    if not values:
        return "–"
    text = _value(metric, _mean(values))
    few = f" ({len(values)} of {len(every)} seeds)" if len(values) < len(every) else ""
    if len(values) > 1:
        text += f" [{_value(metric, min(values))}, {_value(metric, max(values))}]"
    return text + few


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"


def _settings(values: Mapping[str, Any]) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{key}: {shown(inner)}" for key, inner in value.items()) + "}"
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    return "<br>".join(f"`{key}: {shown(value)}`" for key, value in values.items()) or "as it is"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _differences(runs: Runs, found: Mapping[str, Sequence[Finding]]) -> list[str]:
    if not found:
        return []
    rows = []
    for label, every in found.items():
        for f in every:
            interval = (
                "–" if f.low is None or f.high is None else f"[{_delta(f.metric, f.low)}, {_delta(f.metric, f.high)}]"
            )
            tested = f"n {f.paired.n}, p {compare.chance(f.paired.p_holm)}" if f.paired else "–"
            rows.append([label, title(f.metric), _delta(f.metric, _mean(f.differences), unit=True), interval, str(len(f.differences)), tested, f.call])  # fmt: skip
    return [
        f"### Against {next(iter(runs))}",
        "Difference of the means; its 95 % interval over seeds (t, on the differences within each seed, not corrected for the "
        "number of figures); the paired test on the items that both arms answered (McNemar or Wilcoxon, Holm over the "
        "figures of one arm). Both must say so; with one seed there are the items alone.",
        _table(["arm", "figure", "difference", "over seeds", "seeds", "over items", ""], rows),
    ]


def _cost(runs: Runs) -> list[str]:
    stages = own(runs)
    rows = []
    for stage in stages:
        for what in ("seconds", "peak memory, GiB"):
            cells = []
            for every in runs.values():
                costs = [run.costs[stage] for run in every.values() if stage in run.costs]
                taken = [cost.seconds if what == "seconds" else cost.peak and cost.peak / GIB for cost in costs]
                known = [value for value in taken if value is not None]
                cells.append(f"{compare.number(_mean(known))} (n {len(known)})" if known else "–")
            rows.append([f"{stage}: {what}", *cells])
    once = {(stage, cost.inputs): cost for every in runs.values() for run in every.values() for stage, cost in run.costs.items()}  # fmt: skip
    seconds = [cost.seconds for cost in once.values() if cost.seconds is not None]
    text = f"{len(once)} different stage runs are behind these figures; shared ones count once. "
    text += f"{len(seconds)} of them were timed on this machine: {_duration(math.fsum(seconds))} in all. " if seconds else "None of them was timed on this machine. "  # fmt: skip
    if len(seconds) < len(once):
        text += "The others came from the cache or went on from a checkpoint."
    table = [_table(["stages that differ", *runs], rows)] if rows else []
    return [text.strip(), *table]


# --- drawings --------------------------------------------------------------------------------------------------------


def draw(name: str, runs: Runs) -> dict[str, tuple[str, str]]:
    """Curve → its file and SVG; one colour an arm, one line a seed."""
    paths = dict.fromkeys(path for every in runs.values() for run in every.values() for path in run.curves)
    out = {}
    for path in paths:
        lines, colours = [], dict(INK)
        for index, (label, every) in enumerate(runs.items()):
            variable = f"--arm-{index}"
            colours[variable] = COLOURS[index % len(COLOURS)]
            drawn = [run.curves[path] for _, run in sorted(every.items()) if run.curves.get(path)]
            # matplotlib leaves a label with an underscore in front out of the legend
            lines += [chart.Line(label if n == 0 else f"_{label}", points, variable) for n, points in enumerate(drawn)]
        if lines:
            svg = chart.svg(f"{name}: {_curve(path)}", lines, x="step", y=_curve(path), legend=True)
            out[path] = (f"{name}--{slug(_curve(path))}.svg", _alone(svg, colours))
    return out


def _alone(svg: str, colours: Mapping[str, tuple[str, str]]) -> str:
    """A drawing of `chart.svg` as a file: the variables that a page would give it, in light and dark."""
    light, dark = ("".join(f"{name}:{pair[n]};" for name, pair in colours.items()) for n in (0, 1))
    style = f"<style>svg{{{light}font-family:sans-serif}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    end = svg.index(">", svg.index("<svg")) + 1
    return svg[:end].replace("<svg", '<svg width="560"', 1) + style + svg[end:]


def _curve(path: str) -> str:
    """data/sft/plots/metrics/eval/loss.tsv → sft eval loss."""
    parts = Path(path).with_suffix("").parts
    return escape(" ".join(part for part in parts if part not in ("data", "plots", "metrics")).replace("_", " "))


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "arm"
