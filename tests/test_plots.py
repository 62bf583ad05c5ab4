"""Plots show the facts, all of them and nothing else; the CSV holds what is drawn."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plot_cases import ALL, CURVES, FACTS, HISTORY, MATRIX, RUNS, run_of

from secateur.core.errors import DataError, MissingExtra, UsageError
from secateur.core.facts import Facts, LayerFacts
from secateur.evaluate.robustness import RobustnessFacts
from secateur.report.plots import layers_plot, training_plot, widths_plot
from secateur.report.plots_curves import (
    robustness_plot,
    run_names,
    similarity_plot,
    tickets_plot,
)
from secateur.report.plots_style import Plot, spread, write_plot

pytest.importorskip("matplotlib")


def lines(plot: Plot, panel: int = 0) -> dict[str, list[tuple[float, float]]]:
    """What is drawn in a panel: the label of each line and its points."""
    return {
        str(line.get_label()): list(zip(*(map(float, d) for d in line.get_data()), strict=True))
        for line in plot.figure.axes[panel].lines
    }


# --- what is drawn are the facts ------------------------------------------------------------------


def test_training_by_steps_and_epochs_on_two_axes() -> None:
    plot = training_plot(HISTORY)
    assert lines(plot) == {
        "sparsity 1": [(10, 0.3), (20, 0.5), (30, 0.5)],
        "mask update": [(10, 0), (20, 0)],  # at 30 nothing changed
    }
    assert lines(plot, 1) == {"loss 1": [(1, 2.0), (2, 1.0)]}
    labels = [axes.get_xlabel() for axes in plot.figure.axes]
    assert labels == ["optimizer step", "epoch"]
    assert "sparsity by epoch" in plot.left_out[0]


def test_training_on_one_axis_of_epochs() -> None:
    plot = training_plot(HISTORY, steps_per_epoch=10)
    assert lines(plot)["sparsity 1"] == [(1, 0.3), (1, 0.3), (2, 0.5), (2, 0.5), (3, 0.5)]
    assert lines(plot, 1)["mask update"] == [(1, 0), (2, 0)]
    assert not plot.left_out


def test_a_second_training_is_a_second_line() -> None:
    twice = [{"epoch": e, "loss": 1 / e + part} for part in (1, 0) for e in (1, 2)]
    assert lines(training_plot(twice)) == {
        "loss 1": [(1, 2), (2, 1.5)],
        "loss 2": [(1, 1), (2, 0.5)],
    }


def test_accuracy_before_and_after_events() -> None:
    events = [{"event": "step 20", "accuracy_before": 0.8, "accuracy_after": 0.6}]
    plot = training_plot(HISTORY, events=[*events, {"event": "by hand", "accuracy_before": 0.1}])
    assert lines(plot, 1)["accuracy 1"] == [(20, 0.8), (20, 0.6)]


def test_layers_and_widths() -> None:
    plot = layers_plot(FACTS)
    assert [bar.get_width() for bar in plot.figure.axes[0].patches] == [0.6, 0.0]
    assert plot.figure.axes[0].lines[0].get_xdata()[0] == FACTS.sparsity
    assert [text.get_text() for text in plot.figure.axes[0].get_yticklabels()] == ["a", "b$1"]
    assert widths_plot(FACTS).figure.axes[0].patches[0].get_width() == 12 / 16
    assert layers_plot(Facts(widths=FACTS.widths)).name == "widths"


def test_hundreds_of_layers_become_points() -> None:
    facts = Facts(layers=[LayerFacts(f"w{i}", (10, 10), 100, i % 100) for i in range(200)])
    plot = layers_plot(facts)
    assert plot.figure.axes[0].lines[0].get_xdata().tolist() == [
        layer.sparsity for layer in facts.layers
    ]


def test_tickets_are_means_with_their_range() -> None:
    plot = tickets_plot(RUNS)
    drawn = lines(plot)
    assert drawn["rate rewound"] == [(1, 0.91), (0.5, 0.9), (0.25, pytest.approx(0.83))]
    assert drawn["re-initialised"] == [(1, 0.9), (0.5, 0.85), (0.25, 0.7)]
    band = plot.figure.axes[0].collections[0].get_paths()[0].vertices
    assert {(0.25, 0.8), (0.25, 0.86), (0.5, 0.89), (0.5, 0.91)} <= set(map(tuple, band.tolist()))
    assert len(plot.figure.axes[0].collections) == 1  # one run has no range
    texts = [text.get_text() for text in plot.figure.axes[0].texts]
    assert texts == ["rate rewound (2 runs)", "re-initialised"]


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        (("test", "test"), "accuracy"),
        (("train", "train"), "accuracy (training)"),
        (("test", "train"), "accuracy (some runs: training)"),
    ],
)
def test_tickets_say_what_they_were_measured_on(splits: tuple[str, str], said: str) -> None:
    runs = [{**run, "split": split} for run, split in zip(RUNS[1:], splits, strict=True)]
    plot = tickets_plot(runs)
    assert plot.figure.axes[0].get_ylabel() == said
    assert plot.title == f"Tickets: {said} against weights left"
    assert plot.columns[3] == "accuracy"


def test_methods_are_named_by_what_differs() -> None:
    runs = [run_of("rate", s, 0.9, 0.8, allocation=a) for a in ("global", "erk") for s in (0, 1)]
    names = run_names([*runs, RUNS[2]])
    assert names[0] == "rate rewound, global, seed 0"
    assert names[3:] == ["rate rewound, erk, seed 1", "re-initialised, seed 0"]
    assert len({row[0] for row in tickets_plot(runs).rows}) == 2


def test_matrix() -> None:
    axes = similarity_plot(MATRIX, ["x", "y", "z"]).figure.axes[0]
    assert axes.images[0].get_array().tolist() == MATRIX
    found = [text.get_text() for text in axes.texts]
    assert found == [f"{value:.2f}" for row in MATRIX for value in row]


def test_robustness_starts_at_the_natural_accuracy() -> None:
    plot = robustness_plot(CURVES)
    assert lines(plot)["pruned"] == [(0, 0.88), (0.1, 0.6), (0.2, 0.3)]
    assert lines(plot)["pruned, natural"] == [(0, 0.88)]
    assert lines(plot, 1)["dense"] == [(0, 0.9), (0.1, 0.4), (0.2, 0.05)]


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_csv_holds_what_is_drawn(name: str, tmp_path: Path) -> None:
    plot = ALL[name]()
    assert plot.name == name
    _, numbers = write_plot(plot, tmp_path / f"{name}.svg")
    with numbers.open(encoding="utf-8", newline="") as stream:
        head, *rows = list(csv.reader(stream))
    assert tuple(head) == plot.columns
    assert rows == [[str(value) for value in row] for row in plot.rows]  # floats to the last bit
    drawn = {
        value
        for axes in plot.figure.axes
        for line in axes.lines
        for data in line.get_data()
        for value in map(float, data)
    }
    drawn |= {v for axes in plot.figure.axes for im in axes.images for v in im.get_array().flat}
    drawn |= {bar.get_width() for axes in plot.figure.axes for bar in axes.patches}
    numbers_in_rows = {float(v) for row in plot.rows for v in row if isinstance(v, (int, float))}
    whole = {FACTS.sparsity} if name == "layers" else set()
    assert drawn - {0.0, 1.0} <= numbers_in_rows | whole  # 0 and 1 are ends of helping lines


@pytest.mark.parametrize(("name", "kind"), [*((n, "svg") for n in ALL), ("widths", "png")])
def test_equal_facts_give_equal_bytes(name: str, kind: str, tmp_path: Path) -> None:
    import matplotlib as mpl

    first, _ = write_plot(ALL[name](), tmp_path / f"a.{kind}")
    before = mpl.rcParams["xtick.major.size"]
    mpl.rcParams["xtick.major.size"] = 30  # a matplotlibrc of the user
    try:
        second, _ = write_plot(ALL[name](), tmp_path / f"b.{kind}")
        assert mpl.rcParams["xtick.major.size"] == 30
    finally:
        mpl.rcParams["xtick.major.size"] = before
    assert first.read_bytes() == second.read_bytes()
    assert len(first.read_bytes()) > 1000


def test_a_wrong_number_changes_the_files(tmp_path: Path) -> None:
    planted = dataclasses.replace(CURVES.curves[0], accuracy=(0.5, 0.11))
    wrong = RobustnessFacts((planted, *CURVES.curves[1:]), units=100)
    right = write_plot(robustness_plot(CURVES), tmp_path / "a.svg")
    other = write_plot(robustness_plot(wrong), tmp_path / "b.svg")
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(right, other, strict=True))


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.jpg"):
        write_plot(ALL["layers"](), tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plot = ALL["layers"]()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("full")

    monkeypatch.setattr(plot.figure, "savefig", fail)
    with pytest.raises(RuntimeError):
        write_plot(plot, tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ALL)
def test_without_matplotlib(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"secateur\[plot\]"):
        ALL[name]()


@pytest.mark.parametrize("value", ["high", float("nan"), True, [1]])
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match="record 1"):
        training_plot([{"step": 1, "sparsity": value}])
    with pytest.raises(DataError, match=r"'x' and 'x'"):
        similarity_plot([[value]], ["x"])


@pytest.mark.parametrize(
    "draw",
    [
        lambda: training_plot([{"lr": 0.1}]),
        lambda: layers_plot(Facts()),
        lambda: widths_plot(Facts()),
        lambda: tickets_plot([run_of("rate", 0, 0.9)]),
        lambda: tickets_plot([]),
        lambda: similarity_plot([[1.0, 0.0]], ["x"]),
        lambda: robustness_plot(RobustnessFacts((), 0)),
    ],
)
def test_nothing_to_draw_is_an_error(draw: Callable[[], Plot]) -> None:
    with pytest.raises(UsageError) as caught:
        draw()
    assert caught.value.found


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(DataError, match="12 of 10"):
        layers_plot(Facts(layers=[LayerFacts("a", (10,), 10, 12)]))
    dead = run_of("rate", 0, 0.9, 0.8)
    dead["levels"][0]["sparsity"] = 1.0
    with pytest.raises(DataError, match="logarithmic"):
        tickets_plot([dead])


def test_labels_keep_their_distance() -> None:
    for places in ([1.0, 1.0, 1.0, 1.0], [0, 99, 100, 98], [50, 55, 40, 45, 47], [3.0]):
        found = sorted(spread(places, 10, 100))
        assert all(b - a >= 10 - 1e-9 for a, b in itertools.pairwise(found))
        assert min(found) >= 0
        assert max(found) <= 100
    assert spread([10, 50], 10, 100) == [10, 50]
