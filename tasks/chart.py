"""chart: curves and bars as inline SVG, whose colours are variables of the page, so that it follows light and dark."""

import io
import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 3.9, 2.4  # in inches; narrow, so that its letters stay readable on a phone


class Line(NamedTuple):
    """(x, y) in order; of bars (name, length). `colour` is a CSS variable of the page, such as --base."""

    label: str
    points: Sequence[tuple[float | str, float]]
    colour: str


def svg(
    title: str, lines: Sequence[Line], *, x: str, y: str = "", bar: bool = False, legend: bool = False, slug: str = ""
) -> str:
    """A drawing of `lines` over each other; of at most 255 different colours. Same lines, same bytes.

    Args:
        title: what a screen reader says.
        x, y: the axes' labels.
        slug: prefix of the drawing's ids, which are the page's; by default made of the title.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # stand-ins, replaced below: matplotlib knows no CSS variables
    names = {f"#{n:02x}{n:02x}{n:02x}": name for n, name in enumerate(("--soft", "--line", *dict.fromkeys(line.colour for line in lines)), 1)}  # fmt: skip
    stand_in = {name: colour for colour, name in names.items()}
    ink, grid = stand_in["--soft"], stand_in["--line"]
    settings = {"svg.fonttype": "none", "svg.hashsalt": "reforge", "font.size": 10, "text.color": ink, "axes.labelcolor": ink,
                "xtick.color": ink, "ytick.color": ink, "axes.edgecolor": grid, "font.family": "DejaVu Sans",
                "text.parse_math": False}  # fmt: skip
    with mpl.rc_context(settings):
        places = {label: i for i, label in enumerate(dict.fromkeys(at for line in lines for at, _ in line.points))}
        figure = Figure(figsize=(WIDTH, 0.8 + 0.3 * len(places) if bar else HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        for index, line in enumerate(lines):
            colour = stand_in[line.colour]
            if bar:
                thick = 0.76 / len(lines)
                shift = (index - (len(lines) - 1) / 2) * thick
                where = [places[at] + shift for at, _ in line.points]
                axes.barh(where, [length for _, length in line.points], thick, color=colour, label=line.label)
            else:
                style = "o-" if len(line.points) < 16 else "-"
                axes.plot(*zip(*line.points, strict=True), style, color=colour, lw=1.6, ms=4, label=line.label)
        every = [value for line in lines for _, value in line.points]
        if bar:
            axes.set_yticks(range(len(places)), [str(label) for label in places])
            axes.invert_yaxis()
        elif min(every) >= 0:
            axes.set_ylim(0, 1.08 * max(every) or 1)  # a curve that starts elsewhere looks steeper than it is
        axes.set_xlabel(x)
        if y:
            axes.set_ylabel(y)
        axes.grid(axis="x" if bar else "y", color=grid, linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        if legend:
            figure.legend(loc="outside upper left", ncols=2, frameon=False, handlelength=1.2)
        written = io.StringIO()
        dateless = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(written, format="svg", transparent=True, metadata=dateless)
    drawn = written.getvalue()
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", (slug or title).lower())
    drawn = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", drawn)
    drawn = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", drawn)
    for colour, name in names.items():
        drawn = drawn.replace(colour, f"var({name})")
    drawn = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawn, count=1)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', lambda m: f'{m[1]} role="img" aria-label="{escape(title)}"', drawn, count=1)  # fmt: skip
