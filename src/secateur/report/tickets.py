"""Lottery tickets for the terminal: levels, and structure that emerges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from secateur.report.columns import Columns
from secateur.report.units import percent, points


def ticket_table(facts: Mapping[str, Any]) -> Columns:
    """One row a level, dense first.

    "At start" is right after pruning and rewinding, before training; "churn" is how much the mask
    differs from the one before it. "barrier" is there if lines between levels were measured: how much
    the worst point between a level and the one before it errs beyond the mean of the two.

    Args:
        facts: A ticket's facts as plain data, as they stand in the JSON document.

    Example:
        >>> from rich.console import Console
        >>> dense = {"name": "dense", "sparsity": 0.0, "accuracy": 0.9, "accuracy_at_start": 0.1,
        ...          "churn": 0.0, "seconds": 8.0, "done": True}
        >>> level = {**dense, "name": "level-01-0.36", "sparsity": 0.36, "accuracy": 0.91,
        ...          "churn": 0.36, "done": False}
        >>> facts = {"metric": "accuracy", "dense": dense, "levels": [level]}
        >>> Console(width=80).print(ticket_table(facts))
        stage    sparsity  accuracy  against dense  at start   churn  time
        dense       0.0 %   90.00 %                  10.00 %          done before
        level 1    36.0 %   91.00 %   +1.00 points   10.00 %  36.0 %  8.0 s
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("stage", no_wrap=True)
    where = " (training)" if facts.get("split") == "train" else ""
    for name in ("sparsity", f"{facts['metric']}{where}", "against dense", "at start", "churn"):
        table.add_column(name, justify="right", no_wrap=True)
    lines = facts.get("connectivity", ())
    if lines:
        table.add_column("barrier", justify="right", no_wrap=True)
    table.add_column("time", justify="left", no_wrap=True)
    shares = facts["metric"] == "accuracy"
    dense = facts["dense"]["accuracy"]
    for number, stage in enumerate((facts["dense"], *facts["levels"])):
        found, first = stage["accuracy"], number == 0
        missing = found is None or dense is None or first
        table.add_row(
            "dense" if first else f"level {number}",
            percent(stage["sparsity"]),
            _value(found, shares),
            "" if missing else _change(found - dense, shares),
            _value(stage["accuracy_at_start"], shares),
            "" if first else percent(stage["churn"]),
            *(["" if first else _barrier(lines[number - 1]["barrier"], shares)] if lines else []),
            "done before" if stage["done"] else f"{stage['seconds']:.1f} s",
        )
    return Columns(table)


def structure_table(shares: Mapping[str, tuple[float, float]]) -> Columns:
    """Kinds of groups that are entirely zero, beside what a random mask would give.

    Args:
        shares: Kind -> share found and share expected.

    Example:
        >>> from rich.console import Console
        >>> Console(width=60).print(structure_table({"filters": (0.25, 0.0)}))
        entirely zero   found  random mask
        filters        25.0 %        0.0 %
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("entirely zero", no_wrap=True)
    for name in ("found", "random mask"):
        table.add_column(name, justify="right", no_wrap=True)
    for kind, (found, expected) in shares.items():
        table.add_row(kind, percent(found), percent(expected) if expected > 1e-6 else percent(0))
    return Columns(table)


def _value(value: float | None, shares: bool) -> str:
    if value is None:
        return "-"
    return percent(value, 2) if shares else f"{value:.4g}"


def _barrier(height: float, shares: bool) -> str:
    return points(height, None) if shares else f"{height:.4g}"


def _change(difference: float, shares: bool) -> str:
    return points(difference, None) if shares else f"{difference:+.4g}"
