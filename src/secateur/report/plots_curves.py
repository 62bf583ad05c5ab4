"""Plots of several runs: tickets, similar masks, robustness."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.core.errors import DataError, UsageError
from secateur.evaluate.robustness import RobustnessFacts
from secateur.report.plots_style import (
    INK,
    QUIET,
    End,
    Plot,
    finite,
    label_ends,
    look,
    new_figure,
    per_cent,
    style,
)

_REWINDS = {
    "weights": "weights rewound",
    "rate": "rate rewound",
    "finetune": "fine-tuned",
    "reinit": "re-initialised",
}
_NO_METHOD = ("target", "seed", "version", "levels", "rewind", "metric")
#: Rows of a matrix whose numbers still fit into its cells.
_NUMBERED = 16


def tickets_plot(runs: Sequence[Mapping[str, Any]]) -> Plot:
    """Accuracy against the share of weights left: one line a method, from dense to sparse.

    Runs that differ only in their seed are one method: the line is their mean, and the band reaches
    from the lowest to the highest.

    Args:
        runs: Facts of ticket searches as plain data, as they stand in the JSON document.

    Raises:
        UsageError: No level has an accuracy.
        DataError: A value is no finite number.

    Example:
        >>> dense = {"asked": 0.0, "sparsity": 0.0, "accuracy": 0.9}
        >>> level = {"asked": 0.8, "sparsity": 0.8, "accuracy": 0.88}
        >>> run = {"rewind": "rate", "metric": "accuracy", "dense": dense, "levels": [level]}
        >>> for row in tickets_plot([run]).rows:
        ...     print(*row)
        rate rewound 0.0 1.0 0.9 0.9 0.9 1
        rate rewound 0.8 0.2 0.88 0.88 0.88 1
    """
    rows: list[tuple[Any, ...]] = []
    silent = 0
    for method, members in _methods(runs).items():
        levels: dict[float, list[tuple[float, float]]] = {}
        for run in members:
            for stage in (run["dense"], *run["levels"]):
                if stage.get("accuracy") is None:
                    silent += 1
                    continue
                what = f"level {stage.get('name', '')!r} of {method!r}"
                asked = finite(stage["asked"], f"{what}, the sparsity asked for")
                left = 1 - finite(stage["sparsity"], f"{what}, its sparsity")
                if left <= 0:
                    said, why = f"it keeps {left:g} of the weights", "the axis is logarithmic"
                    raise DataError(f"drawing {what}", said, why, "leave that level out")
                point = (round(left, 12), finite(stage["accuracy"], f"{what}, its accuracy"))
                levels.setdefault(asked, []).append(point)
        for asked, found in sorted(levels.items()):
            lefts, values = zip(*found, strict=True)
            ends = (_mean(values), min(values), max(values))
            rows.append((method, asked, _mean(lefts), *ends, len(found)))
    if not any(row[1] > 0 for row in rows):
        raise UsageError(
            "a plot of tickets",
            f"none of {len(runs)} runs has a level with an accuracy",
            "accuracy is drawn against the share of weights left",
            "search with test batches that have targets, and at least one level",
        )
    metric = str(runs[0].get("metric", "accuracy"))
    left_out = (f"{silent} stages without an accuracy",) if silent else ()
    said = f"{metric}{_where(runs)}"
    title = f"Tickets: {said} against weights left"
    columns = ("method", "asked", "left", metric, "lowest", "highest", "runs")
    with style():
        longest = max(len(row[0]) for row in rows)
        figure = new_figure(title, 5.4 + 0.07 * longest, 3.9)
        axes = figure.subplots()
        _draw_tickets(axes, rows, metric)
        axes.set_ylabel(said)
    return Plot("tickets", title, figure, columns, tuple(rows), left_out)


def _where(runs: Sequence[Mapping[str, Any]]) -> str:
    """What was measured on, where it was not the test data alone."""
    splits = {str(run.get("split", "test")) for run in runs}
    if "train" not in splits:
        return ""
    return " (training)" if len(splits) == 1 else " (some runs: training)"


def similarity_plot(matrix: Sequence[Sequence[float]], names: Sequence[str]) -> Plot:
    """A matrix of similar masks: 0 is what chance gives, 1 is the same mask.

    Args:
        matrix: Chance-corrected, e.g. ``similarity_matrix(...).corrected``.
        names: Of its rows and columns.

    Raises:
        UsageError: The matrix is not square, or has not that many names.

    Example:
        >>> similarity_plot([[1.0, 0.25], [0.25, 1.0]], ["seed 0", "seed 1"]).rows
        (('seed 0', 'seed 0', 1.0), ('seed 0', 'seed 1', 0.25), ('seed 1', 'seed 0', 0.25),
         ('seed 1', 'seed 1', 1.0))
    """
    size = len(names)
    if not size or len(matrix) != size or any(len(row) != size for row in matrix):
        raise UsageError(
            "a plot of similar masks",
            f"{size} names for a matrix of {len(matrix)} rows of {sorted({len(r) for r in matrix})}",
            "every mask is compared with every other",
            "pass a square matrix, and one name a row",
        )
    rows = tuple(
        (a, b, finite(matrix[i][j], f"the similarity of {a!r} and {b!r}"))
        for i, a in enumerate(names)
        for j, b in enumerate(names)
    )
    title = "Similar masks: Jaccard index, 0 = chance, 1 = equal"
    with style():
        cell = 0.5 if size <= _NUMBERED else 0.2
        across = max(2.6, cell * size)
        margin = 0.3 + 0.07 * min(40, max(map(len, names)))
        figure = new_figure(title, max(4.6, across + margin + 0.7), across + 0.75 * margin + 0.7)
        _draw_matrix(
            figure,
            figure.subplots(),
            [[row[2] for row in rows[i * size :][:size]] for i in range(size)],
            names,
        )
    return Plot("similarity", title, figure, ("row", "column", "corrected"), rows)


def robustness_plot(facts: RobustnessFacts) -> Plot:
    """Accuracy against the size of perturbations, one line a network, one panel an attack.

    The open marker at size 0 is the natural accuracy.

    Raises:
        UsageError: There are no curves.
        DataError: A value is no finite number.

    Example:
        >>> from secateur.evaluate.robustness import Curve
        >>> curve = Curve("dense", "Fgsm", (0.1,), (0.5,), 0.9)
        >>> robustness_plot(RobustnessFacts((curve,), units=10)).rows
        (('dense', 'Fgsm', 0.0, 0.9), ('dense', 'Fgsm', 0.1, 0.5))
    """
    rows = tuple(
        (
            model,
            attack,
            finite(size, f"{model!r}, a size"),
            finite(right, f"{model!r}, an accuracy"),
        )
        for model, attack, size, right in facts.rows()
    )
    if not rows:
        raise UsageError(
            "a plot of robustness", "there are no curves", "nothing was measured", "measure some"
        )
    attacks, models = (list(dict.fromkeys(str(row[i]) for row in rows)) for i in (1, 0))
    title = f"Accuracy under attack ({facts.units:,} answers a point)"
    with style():
        figure = new_figure(title, 0.6 + 4.6 * len(attacks), 3.7)
        panels = figure.subplots(1, len(attacks), squeeze=False, sharey=True)[0]
        for axes, attack in zip(panels, attacks, strict=True):
            _draw_attack(axes, attack, [row for row in rows if row[1] == attack], models)
        panels[0].set_ylabel("accuracy")
        panels[0].set_ylim(0, 1.02)
        per_cent(panels[0].yaxis)
        for axes, attack in zip(panels, attacks, strict=True):
            ends = {str(row[0]): row for row in rows if row[1] == attack}
            label_ends(
                axes,
                [End(r[2], r[3], m, look(models.index(m))["color"]) for m, r in ends.items()],
            )
    return Plot("robustness", title, figure, ("model", "attack", "size", "accuracy"), rows)


def _draw_tickets(axes: Any, rows: Sequence[tuple[Any, ...]], metric: str) -> None:
    from matplotlib.ticker import NullLocator

    ends, methods = [], list(dict.fromkeys(row[0] for row in rows))
    for number, method in enumerate(methods):
        mine = [row for row in rows if row[0] == method]
        lefts, means, lows, highs = (tuple(row[i] for row in mine) for i in (2, 3, 4, 5))
        axes.plot(lefts, means, label=method, **look(number))
        if lows != highs:
            axes.fill_between(
                lefts, lows, highs, color=look(number)["color"], alpha=0.15, linewidth=0
            )
        count = max(row[6] for row in mine)
        text = f"{method} ({count} runs)" if count > 1 else method
        ends.append(End(lefts[-1], means[-1], text, look(number)["color"]))
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(*_ticks({row[2] for row in rows}))
    axes.set_xlabel("weights left (logarithmic; band: lowest to highest run)")
    if metric == "accuracy":
        per_cent(axes.yaxis)
    dense = sorted({row[3] for row in rows if row[1] == 0})
    if len(dense) == 1:
        axes.axhline(dense[0], color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        right = axes.get_xlim()[1]
        ends.append(End(right, dense[0], "dense", QUIET))
    label_ends(axes, ends)


def _ticks(lefts: set[float]) -> tuple[list[float], list[str]]:
    """The levels themselves, as far apart as their labels need."""
    found: list[float] = []
    whole = max(lefts) / min(lefts)
    for left in sorted(lefts, reverse=True):
        # A label needs about an eighth of the axis.
        if not found or found[-1] / left > whole ** (1 / 8):
            found.append(left)
    return found, [f"{100 * left:.3g} %" for left in found]


def _draw_matrix(
    figure: Any, axes: Any, values: Sequence[Sequence[float]], names: Sequence[str]
) -> None:
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=1)
    axes.grid(visible=False)
    places = range(len(names))
    short = [name if len(name) <= 40 else f"{name[:39]}…" for name in names]
    steep = 40 if len(names) <= _NUMBERED else 90
    upright = {"ha": "right", "va": "top" if steep < 90 else "center"}
    axes.set_xticks(places, short, rotation=steep, rotation_mode="anchor", **upright)
    axes.set_yticks(places, short)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if len(names) > _NUMBERED:
        figure.colorbar(image, ax=axes, shrink=0.6).outline.set_visible(False)
        return
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            ink = "white" if value > 0.55 else INK
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)


def _draw_attack(
    axes: Any, attack: str, rows: Sequence[tuple[Any, ...]], models: Sequence[str]
) -> None:
    for number, model in enumerate(models):
        mine = [(row[2], row[3]) for row in rows if row[0] == model]
        if not mine:
            continue
        sizes, right = zip(*mine, strict=True)
        line = axes.plot(sizes, right, label=model, markevery=slice(1, None), **look(number))[0]
        axes.plot(
            sizes[:1],
            right[:1],
            linestyle="",
            marker=line.get_marker(),
            color=line.get_color(),
            markerfacecolor="white",
            markersize=6,
            clip_on=False,
            zorder=3,
            label=f"{model}, natural",
        )
    axes.set_xlim(left=0)
    axes.set_title(attack, loc="left", fontsize=9)
    axes.set_xlabel("size of the perturbation, units of the attack (0: natural)")


def run_names(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to call each run: its rewinding, what else differs from runs that rewind alike, its seed.

    Example:
        >>> run_names([{"rewind": "rate"}, {"rewind": "rate", "plan": {"training": {"seed": 1}}}])
        ['rate rewound, seed 0', 'rate rewound, seed 1']
    """
    return [f"{name}, seed {_seed(run)}" for name, run in zip(_names(runs), runs, strict=True)]


def _methods(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run, name in zip(runs, _names(runs), strict=True):
        found.setdefault(name, []).append(run)
    return found


def _names(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of the methods, with what differs between runs that rewind alike."""
    rewinds, words = [str(run.get("rewind")) for run in runs], [_words(run) for run in runs]
    names = []
    for rewind, mine in zip(rewinds, words, strict=True):
        alike = [other for other, way in zip(words, rewinds, strict=True) if way == rewind]
        keys = dict.fromkeys(key for other in alike for key in other)
        telling = [key for key in keys if len({other.get(key) for other in alike}) > 1]
        parts = [_told(key, mine[key]) for key in telling if key in mine]
        names.append(", ".join([_REWINDS.get(rewind, rewind), *parts]))
    return names


def _told(key: str, word: str) -> str:
    return f"{key} {word}" if word[:1].isdigit() else word


def _seed(run: Mapping[str, Any]) -> int:
    training = dict((run.get("plan") or {}).get("training") or {})
    return int(training.get("Training", training).get("seed", 0))


def _words(run: Mapping[str, Any]) -> dict[str, str]:
    """What makes a method, apart from the rewinding: recipe and plan, flat."""
    plan = dict(run.get("plan") or {})
    training = dict(plan.pop("training", None) or {})
    recipe = dict(run.get("recipe") or {})
    whole = {**recipe, **plan, **training.get("Training", training)}
    return {key: _short(key, value) for key, value in whole.items() if key not in _NO_METHOD}


def _short(key: str, value: Any) -> str:
    if isinstance(value, Mapping) and len(value) == 1:
        name, arguments = next(iter(value.items()))
        if isinstance(arguments, Mapping):
            return " ".join([str(name).lower(), *(f"{k}={v}" for k, v in arguments.items())])
    if value is True:
        return key.replace("_", " ")
    return value if isinstance(value, str) else json.dumps(value)


def _mean(values: Sequence[float]) -> float:
    return values[0] if len(set(values)) == 1 else sum(values) / len(values)
