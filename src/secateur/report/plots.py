"""Plots of one run: training, layers and widths. Each is drawn from the rows that its CSV holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from secateur.core.errors import DataError, UsageError
from secateur.core.facts import Facts
from secateur.report.plots_style import (
    COLOURS,
    DASHES,
    INK,
    QUIET,
    Plot,
    finite,
    new_figure,
    per_cent,
    style,
)
from secateur.report.units import percent

_PANELS = ("sparsity", "accuracy", "loss")
_UPDATE = "mask update"
_TIMES = {"step": "optimizer step", "epoch": "epoch"}
#: Rows with a name each; beyond that the names are in the CSV only.
_NAMED = 80


class _Point(NamedTuple):
    quantity: str
    stretch: int
    unit: str
    time: float
    value: float | str


def training_plot(
    history: Sequence[Mapping[str, Any]],
    *,
    events: Iterable[Mapping[str, Any]] = (),
    steps_per_epoch: int | None = None,
) -> Plot:
    """Sparsity, accuracy and loss over training, as far as the history has them.

    Mask updates are short strokes at the foot. Updates count optimizer steps and trainings count
    epochs: without ``steps_per_epoch`` a history with both gets two axes of time, and only the
    sparsities at the updates are drawn.

    Args:
        history: Of the facts. A time that goes back starts a new stretch (a second training).
        events: Rows of an :class:`~secateur.experiments.EventLog`: accuracy before and after each.
        steps_per_epoch: Puts everything on one axis of epochs.

    Raises:
        UsageError: Nothing in it can be drawn.
        DataError: A value is no finite number.

    Example:
        >>> history = [{"step": 4, "sparsity": 0.5, "dropped": 8, "grown": 0},
        ...            {"step": 8, "sparsity": 0.75, "dropped": 4, "grown": 0}]
        >>> for row in training_plot(history).rows:
        ...     print(*row)
        sparsity 1 step 4 0.5
        sparsity 1 step 8 0.75
        mask update 1 step 4
        mask update 1 step 8
    """
    given = [*history, *_readings(events)]
    points, left_out = _points(given, steps_per_epoch)
    present = [name for name in _PANELS if any(p.quantity == name for p in points)]
    if not present:
        raise UsageError(
            "a plot of training",
            f"none of {len(given)} records has a step or epoch with a sparsity, accuracy or loss",
            "a picture over time needs times and values",
            "plot a run that trained or pruned gradually",
        )
    title = " and ".join(filter(None, [", ".join(present[:-1]), present[-1]]))
    title = f"{title.capitalize()} over training"
    units = [next(p.unit for p in points if p.quantity == name) for name in present]
    with style():
        figure = new_figure(title, 6.4, 0.7 + 1.75 * len(present))
        panels = figure.subplots(len(present), 1, squeeze=False)[:, 0]
        for number, (axes, name, unit) in enumerate(zip(panels, present, units, strict=True)):
            shared = next((a for a, u in zip(panels, units, strict=True) if u == unit), axes)
            if shared is not axes:
                axes.sharex(shared)
            _draw_panel(axes, name, [p for p in points if p.unit == unit])
            updates = sum(p.quantity == _UPDATE for p in points if p.unit == unit)
            if updates and shared is axes:
                said = f"strokes: {updates} mask updates"
                axes.set_title(said, loc="right", fontsize=8, color=QUIET)
            last = number + 1 == len(present) or units[number + 1] != unit
            axes.set_xlabel(_TIMES[unit] if last else "")
            axes.tick_params(labelbottom=last)
    return Plot("training", title, figure, _Point._fields, tuple(points), tuple(left_out))


def layers_plot(facts: Facts) -> Plot:
    """The sparsity of each pruned weight, in the order of the network.

    Facts of a cut, which have widths and no pruned weights, give :func:`widths_plot`.

    Raises:
        UsageError: The facts have neither.

    Example:
        >>> from secateur.core.facts import LayerFacts
        >>> layers_plot(Facts(layers=[LayerFacts("fc.weight", (4, 8), 32, 8)])).rows
        (('fc.weight', 32, 8, 0.75),)
    """
    if not facts.layers and facts.widths:
        return widths_plot(facts)
    rows = tuple(
        (x.name, *_counts(x.total, x.kept, f"the sparsity of {x.name!r}"), x.sparsity)
        for x in facts.layers
    )
    title = "Sparsity of each pruned weight"
    bars = [(row[0], row[3], percent(row[3])) for row in rows]
    whole = facts.sparsity
    axis = f"zeros among its weights (line: all together, {percent(whole)})"
    table = (("name", "total", "kept", "sparsity"), rows)
    return _bars("layers", title, bars, table=table, axis=axis, whole=whole)


def widths_plot(facts: Facts) -> Plot:
    """The share of its groups that each width of a cut network has left.

    Raises:
        UsageError: The facts have no widths.

    Example:
        >>> from secateur.core.facts import WidthFacts
        >>> widths_plot(Facts(widths=[WidthFacts("conv1", 16, 12, ())])).rows
        (('conv1', 16, 12, 0.75),)
    """
    rows = tuple(
        (x.name, *_counts(x.groups, x.kept, f"the width of {x.name!r}"), x.kept / x.groups)
        for x in facts.widths
    )
    title = "Groups left in each width"
    bars = [(row[0], row[3], f"{row[2]:,} of {row[1]:,}") for row in rows]
    axis = "groups (channels, heads, neurons) that are left"
    table = (("name", "groups", "kept", "share"), rows)
    return _bars("widths", title, bars, table=table, axis=axis)


# -- training -----------------------------------------------------------------------------------


def _readings(events: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    """Rows of an event log as records: two accuracies at one step."""
    for row in events:
        found = re.fullmatch(r"step (\d+)", str(row.get("event")))
        for key in ("accuracy_before", "accuracy_after"):
            if found and row.get(key) is not None:
                yield {"step": int(found[1]), "accuracy": row[key]}


def _points(
    given: Sequence[Mapping[str, Any]], per_epoch: int | None
) -> tuple[list[_Point], list[str]]:
    found: list[_Point] = []
    stretch, latest = {"step": 1, "epoch": 1}, {"step": 0.0, "epoch": 0.0}
    timeless = 0
    for number, record in enumerate(given):
        kind = next((unit for unit in _TIMES if record.get(unit) is not None), "")
        if not kind:
            timeless += 1
            continue
        time = finite(record[kind], f"record {number + 1} of the history, its {kind}")
        again = "accuracy" in record and "loss" not in record  # a reading is no training
        stretch[kind] += time < latest[kind] and not again
        latest[kind] = max(time, latest[kind]) if again else time
        unit = "epoch" if per_epoch else kind
        if per_epoch and kind == "step":
            time = time / per_epoch
        for name in _PANELS:
            if record.get(name) is not None:
                value = finite(record[name], f"record {number + 1} of the history, its {name}")
                found.append(_Point(name, stretch[kind], unit, time, value))
        if record.get("dropped") or record.get("grown"):
            found.append(_Point(_UPDATE, stretch[kind], unit, time, ""))
    order = (*_PANELS, _UPDATE)
    found.sort(key=lambda p: (order.index(p.quantity), p.stretch, p.time))  # stable
    left_out = [f"{timeless} records of the history without step or epoch"] if timeless else []
    for name in _PANELS:
        units = {p.unit for p in found if p.quantity == name}
        if len(units) > 1:
            found = [p for p in found if (p.quantity, p.unit) != (name, "epoch")]
            left_out.append(
                f"{name} by epoch: it is drawn by step (for both say steps_per_epoch, or --steps-per-epoch)"
            )
    return found, left_out


def _draw_panel(axes: Any, name: str, points: Sequence[_Point]) -> None:
    mine = [p for p in points if p.quantity == name]
    colour, stretches = COLOURS[_PANELS.index(name)], sorted({p.stretch for p in mine})
    stepped = name == "sparsity" and any(p.quantity == _UPDATE for p in points)
    many = len(mine) > 60
    for number, stretch in enumerate(stretches):
        line = [(p.time, p.value) for p in mine if p.stretch == stretch]
        axes.plot(
            *zip(*line, strict=True),
            color=colour,
            linestyle=DASHES[number % len(DASHES)],
            marker="" if many else "o",
            drawstyle="steps-post" if stepped else "default",
            label=f"{name} {stretch}",
        )
        if len(stretches) > 1:
            said = axes.annotate(
                f"part {stretch}",
                xy=line[0],
                xytext=(4, 5),
                textcoords="offset points",
                fontsize=8,
                color=QUIET,
            )
            said.set_in_layout(False)  # it is inside, and limits are not final yet
    updates = sorted({p.time for p in points if p.quantity == _UPDATE})
    if updates:
        strokes = axes.plot(
            updates,
            [0.0] * len(updates),
            transform=axes.get_xaxis_transform(),
            linestyle="",
            marker=2,  # a stroke upwards
            markersize=6,
            markeredgewidth=0.8,
            color=INK,
            clip_on=False,
            label=_UPDATE,
        )
        strokes[0].set_in_layout(False)
    axes.set_ylabel(name)
    values = [float(p.value) for p in mine]
    if name != "loss" and all(0 <= value <= 1 for value in values):
        per_cent(axes.yaxis)
    if name == "sparsity":
        axes.set_ylim(0, 1.04)


# -- layers and widths --------------------------------------------------------------------------


def _counts(whole: Any, kept: Any, what: str) -> tuple[Any, Any]:
    finite(whole, what)
    finite(kept, what)
    if not 0 <= kept <= whole or not whole:
        why = "a share lies between 0 and 1"
        raise DataError(f"drawing {what}", f"it keeps {kept} of {whole}", why, "correct the facts")
    return whole, kept


def _bars(
    name: str,
    title: str,
    bars: Sequence[tuple[str, float, str]],
    *,
    table: tuple[tuple[str, ...], tuple[tuple[Any, ...], ...]],
    axis: str,
    whole: float | None = None,
) -> Plot:
    """Horizontal bars from 0 to 1, the first on top."""
    if not bars:
        raise UsageError(
            f"a plot of {name}",
            f"the facts have no {name}",
            "there is nothing to draw",
            "plot the facts of a run that pruned or cut something",
        )
    named = len(bars) <= _NAMED
    with style():
        height = 1.0 + (0.22 * len(bars) if named else 6.0)
        figure = new_figure(title, 6.4, height)
        axes = figure.subplots()
        places = range(1, len(bars) + 1)
        shares = [share for _, share, _ in bars]
        if named:
            axes.barh(places, shares, height=0.7, color=COLOURS[0])
        else:
            axes.plot(shares, places, linestyle="", marker="o", markersize=3, color=COLOURS[0])
        axes.set_ylim(len(bars) + 0.6, 0.4)
        axes.set_xlim(0, 1)
        axes.set_xlabel(axis)
        axes.grid(visible=False, axis="y")
        per_cent(axes.xaxis)
        if named:
            axes.set_yticks(places, [label for label, _, _ in bars])
            axes.tick_params(axis="y", length=0)
            for place, (_, share, text) in zip(places, bars, strict=True):
                axes.annotate(
                    text,
                    xy=(share, place),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                    color=INK,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
                    annotation_clip=False,
                    zorder=4,
                )
        else:
            axes.set_ylabel("number in the network's order (names: in the CSV)")
        if whole is not None:
            axes.axvline(whole, color=INK, linewidth=0.8, zorder=3)
    return Plot(name, title, figure, *table)
