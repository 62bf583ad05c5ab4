"""``secateur plot``: pictures of what a run said about itself, and the numbers beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from secateur.cli import options
from secateur.cli.places import require_new_file
from secateur.cli.plot_sources import Source, read_source
from secateur.cli.screen import screen
from secateur.core.errors import UsageError
from secateur.report.plots import layers_plot, training_plot, widths_plot
from secateur.report.plots_curves import robustness_plot, similarity_plot, tickets_plot
from secateur.report.plots_style import FORMATS, Plot, style, write_plot

_NAMES = ("training", "layers", "widths", "tickets", "similarity", "robustness")


def plot(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="A bundle, a JSON document of a command, a ticket run, or a folder of them.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="For pictures and CSV files.")
    ],
    kind: Annotated[str, typer.Option("--format", metavar="NAME", help="svg or png.")] = "svg",
    steps_per_epoch: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Puts mask updates and epochs on one axis."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace files.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Draw what the facts of RUN allow: training, layers, widths, tickets, similar masks, robustness.

    Beside each picture lies a CSV with exactly the numbers in it.

        secateur plot pruned -o plots
    """
    with screen("plot", json=json) as out:
        if kind not in FORMATS:
            raise UsageError(
                f"--format {kind}",
                "it is svg or png",
                "no others are written",
                "write one of the two",
            )
        with style():
            pass  # a missing matplotlib is told before anything is read
        source = read_source(run)
        plots = _drawn(source, steps_per_epoch)
        for end in (kind, "csv"):
            for each in plots:
                require_new_file(output / f"{each.name}.{end}", overwrite=overwrite)
        for each in plots:
            write_plot(each, output / f"{each.name}.{kind}")
        left_out = [(each.name, text) for each in plots for text in each.left_out]
        left_out += [item for item in source.left_out.items() if item[0] not in _of(plots)]
        out.text.print(_table(plots, kind))
        if left_out:
            lines = [Padding(Text(f"{name}: {text}"), (0, 0, 0, 2)) for name, text in left_out]
            out.show(Group(Text("Left out", "bold"), *lines))
        out.show(Text(f"Written to {output}."))
        made = [
            {
                "name": p.name,
                "picture": f"{p.name}.{kind}",
                "csv": f"{p.name}.csv",
                "rows": len(p.rows),
            }
            for p in plots
        ]
        missing = [{"plot": name, "why": text} for name, text in left_out]
        out.finish({"output": str(output), "plots": made, "left_out": missing})


def _drawn(source: Source, per_epoch: int | None) -> list[Plot]:
    facts, curves, matrix = source.facts, source.robustness, source.matrix
    ways: dict[str, Callable[[], Plot]] = {}
    if facts.history or source.events:
        ways["training"] = lambda: training_plot(
            facts.history, events=source.events, steps_per_epoch=per_epoch
        )
    if facts.layers:
        ways["layers"] = lambda: layers_plot(facts)
    if facts.widths:
        ways["widths"] = lambda: widths_plot(facts)
    if source.tickets:
        ways["tickets"] = lambda: tickets_plot(source.tickets)
    if matrix is not None:
        ways["similarity"] = lambda: similarity_plot(*matrix)
    if curves is not None:
        ways["robustness"] = lambda: robustness_plot(curves)
    found = []
    for name, draw in ways.items():
        try:
            found.append(draw())
        except UsageError as error:
            source.left_out[name] = error.found
    for name in _NAMES[:3]:
        if name not in ways and not (source.tickets or curves or matrix):
            source.left_out.setdefault(name, _absent(name))
    if not found:
        why = "; ".join(f"{name}: {text}" for name, text in source.left_out.items())
        raise UsageError(
            "secateur plot",
            f"there is nothing to draw ({why})",
            "pictures come from a history, layers, widths, tickets, masks or robustness curves",
            "plot what prune, shrink or ticket wrote",
        )
    return found


def _absent(name: str) -> str:
    return {
        "training": "the facts have no history: nothing was trained or pruned step by step",
        "layers": "the facts have no pruned weights",
        "widths": "the facts have no widths: nothing was cut out",
    }[name]


def _of(plots: list[Plot]) -> set[str]:
    return {each.name for each in plots}


def _table(plots: list[Plot], kind: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    columns: list[tuple[str, Any]] = [("picture", "left"), ("numbers", "left"), ("rows", "right")]
    for name, side in columns:
        table.add_column(name, justify=side, no_wrap=True)
    table.add_column("what", overflow="fold")
    for each in plots:
        rows = f"{len(each.rows):,}"
        table.add_row(f"{each.name}.{kind}", f"{each.name}.csv", rows, Text(each.title))
    return table
