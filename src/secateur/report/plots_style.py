"""How pictures look: one style for all, the same bytes for the same facts, and a CSV beside each."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from secateur.core.atomic import new_file
from secateur.core.errors import DataError, MissingExtra, UsageError

#: Okabe and Ito's colours without the yellow ones, which vanish on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7A5C00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", ":")
INK, QUIET, FAINT = "#222222", "#666666", "#DDDDDD"
FORMATS = ("svg", "png")
_LABEL_GAP = 11.0  # points between two labels beside each other
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": QUIET,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so it is everywhere the same
    "font.size": 9,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "savefig.dpi": 200,
    "svg.fonttype": "path",
    "svg.hashsalt": "secateur",
    "text.parse_math": False,  # a name may hold a dollar sign
    "xtick.color": QUIET,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.color": QUIET,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8,
}


@dataclass(frozen=True)
class Plot:
    """A picture and the numbers in it.

    Args:
        name: What files are called after it.
        title: In words.
        figure: A matplotlib ``Figure``. It belongs to no window.
        columns: Names of the columns of ``rows``.
        rows: Exactly the numbers that are drawn.
        left_out: What the facts hold and the picture does not show.

    Example:
        >>> with style():
        ...     figure = new_figure("Nothing", 3, 2)
        >>> Plot("nothing", "Nothing", figure, ("x",), ((1,),)).rows
        ((1,),)
    """

    name: str
    title: str
    figure: Any
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    left_out: tuple[str, ...] = field(default=())


@contextmanager
def style() -> Iterator[None]:
    """The house style inside; the caller's settings of matplotlib stay as they are.

    Raises:
        MissingExtra: matplotlib is not installed.

    Example:
        >>> import matplotlib
        >>> before = matplotlib.rcParams["font.size"]
        >>> with style():
        ...     matplotlib.rcParams["font.size"]
        9.0
        >>> matplotlib.rcParams["font.size"] == before
        True
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingExtra("matplotlib", "plot", "drawing a plot") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a matplotlibrc must not change what is written
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(title: str, width: float, height: float) -> Any:
    """An empty figure of so many inches, for Agg: it needs no display. Call inside :func:`style`.

    Example:
        >>> with style():
        ...     new_figure("Nothing", 3, 2).get_size_inches().tolist()
        [3.0, 2.0]
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold", color=INK)
    return figure


def write_plot(plot: Plot, path: str | Path) -> tuple[Path, Path]:
    r"""Write a picture, and the numbers in it as CSV beside it.

    Equal facts give equal bytes, with the same version of matplotlib. Each file is whole or is not
    there.

    Args:
        plot: What to write.
        path: Ends in ``.svg`` or ``.png``. The CSV gets the same name with ``.csv``.

    Returns:
        Both paths.

    Raises:
        UsageError: The name ends in something else.
        FileError: The folder cannot be written.

    Example:
        >>> import tempfile
        >>> with style():
        ...     plot = Plot("nothing", "Nothing", new_figure("Nothing", 3, 2), ("x",), ((0.1,),))
        >>> picture, numbers = write_plot(plot, Path(tempfile.mkdtemp()) / "nothing.svg")
        >>> numbers.name, numbers.read_text()
        ('nothing.csv', 'x\n0.1\n')
    """
    path = Path(path)
    kind = path.suffix[1:].lower()
    if kind not in FORMATS:
        raise UsageError(
            f"a plot in {path.name!r}",
            f"its name ends in {path.suffix or 'nothing'!r}",
            "the ending says the format",
            "end it in .svg or .png",
        )
    about: dict[str, str | None]
    about = {"Title": plot.title, "Creator": "secateur", "Date": None}
    if kind == "png":
        about = {"Title": plot.title, "Software": None}
    numbers = path.with_suffix(".csv")
    with style(), new_file(numbers) as text, new_file(path) as picture:
        with text.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(plot.columns)
            writer.writerows(plot.rows)
        plot.figure.savefig(picture, format=kind, metadata=about)
    return path, numbers


class End(NamedTuple):
    """The end of a line, which gets a label."""

    x: float
    y: float
    text: str
    colour: str


def label_ends(axes: Any, ends: Sequence[End]) -> None:
    """Write names beside the ends of lines, at the right edge, without overlap.

    Example:
        >>> with style():
        ...     axes = new_figure("Two lines", 4, 3).subplots()
        ...     _ = axes.plot([0, 1], [0, 1])
        ...     label_ends(axes, [End(1, 1, "rising", COLOURS[0])])
        >>> axes.texts[0].get_text()
        'rising'
    """
    if not ends:
        return
    axes.figure.draw_without_rendering()  # places of data on the page are known from here on
    bottom, top = (axes.transAxes.transform((0, y))[1] for y in (0, 1))
    points = 72 / axes.figure.dpi
    heights = [(axes.transData.transform((e.x, e.y))[1] - bottom) * points for e in ends]
    places = spread(heights, _LABEL_GAP, (top - bottom) * points)
    for end, place in zip(ends, places, strict=True):
        axes.annotate(
            end.text,
            xy=(end.x, end.y),
            xytext=(1.025, place / ((top - bottom) * points)),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=_darker(end.colour),
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": end.colour,
                "linewidth": 0.5,
                "shrinkA": 0,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


def spread(places: Sequence[float], gap: float, top: float) -> list[float]:
    """Move places apart until they are ``gap`` from each other, as little as possible.

    Example:
        >>> spread([5, 5, 50], 10, 100)
        [0.0, 10.0, 50]
        >>> spread([98, 98], 10, 100)
        [90.0, 100.0]
    """
    order = sorted(range(len(places)), key=lambda i: (places[i], i))
    groups: list[list[int]] = []  # neighbours that touch, centred on their mean
    for index in order:
        groups.append([index])
        while len(groups) > 1 and _foot(groups[-1], places, gap, top) < gap + _head(
            groups[-2], places, gap, top
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    found = list(places)
    for group in groups:
        if len(group) > 1:
            foot = _foot(group, places, gap, top)
            for rank, index in enumerate(group):
                found[index] = foot + rank * gap
    return found


def _foot(group: list[int], places: Sequence[float], gap: float, top: float) -> float:
    mean = sum(places[i] for i in group) / len(group)
    height = (len(group) - 1) * gap
    return float(max(0.0, min(mean - height / 2, top - height))) if height else places[group[0]]


def _head(group: list[int], places: Sequence[float], gap: float, top: float) -> float:
    return _foot(group, places, gap, top) + (len(group) - 1) * gap


def look(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of the line of that number: told apart without colour, too.

    Example:
        >>> look(0)["color"], look(6)["linestyle"]
        ('#0072B2', '--')
    """
    count = len(COLOURS)
    return {
        "color": COLOURS[number % count],
        "marker": MARKERS[number % count],
        "linestyle": DASHES[number // count % len(DASHES)],
    }


def per_cent(axis: Any) -> None:
    """Ticks of a share as per cent."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.5g} %"))


def finite(value: Any, what: str) -> float:
    """A number that can be drawn.

    Raises:
        DataError: It is none.

    Example:
        >>> finite(0.5, "the sparsity of 'fc'")
        0.5
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(
            f"drawing {what}",
            f"it is {str(value)[:60]!r}",
            "only finite numbers have a place on an axis",
            "correct or leave out that entry of the facts",
        )
    return value


def _darker(colour: str) -> str:
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{int(part * 0.75):02X}" for part in parts)
