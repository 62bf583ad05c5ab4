"""Tables on narrow terminals: every row keeps its label, and no number is broken."""

from __future__ import annotations

import pytest
from rich.console import RenderableType
from test_report import comparison, facts, rendered

from secateur.report import comparison_table, layer_table, measurement_table
from secateur.report.runtime import bench_table
from secateur.report.tickets import structure_table, ticket_table
from secateur.runtime.bench import Bench, Median

DENSE = {"name": "dense", "sparsity": 0.0, "accuracy": 0.9, "accuracy_at_start": 0.1}
DENSE |= {"churn": 0.0, "seconds": 8.0, "done": True}
TICKET = {"metric": "accuracy", "dense": DENSE, "levels": [{**DENSE, "accuracy": 0.91}]}
TIMED = Median(500.0, 94.2, 1234.0)
BENCH = Bench(
    *(TIMED, TIMED, 0.079, (0.07, 0.08), 200, 1e-7, 10**8, 10**7, 1, "avx512", 100.0, {"x": (1,)}),
    layers=(),
    notes=(),
)
CASES: dict[str, tuple[RenderableType, tuple[str, ...]]] = {
    "comparison": (
        comparison_table(comparison(), ("net.py:build", "pruned")),
        ("latency, batch 1", "sparsity, pruned", "-0.31 ± 0.12 points", "8.1x less", "4.30 ± 0.10 ms"),
    ),
    "measurement": (measurement_table(comparison().a), ("latency, batch 1", "4.31 ± 0.10 ms")),
    "layers": (layer_table(facts()), ("blocks.0.con", "461 / 4,608", "90.0 %", "3.1 %")),
    "ticket": (ticket_table(TICKET), ("level 1", "+1.00 points", "done before")),
    "structure": (structure_table({"filters": (0.25, 0.0)}), ("filters", "25.0 %", "random mask")),
    "bench": (bench_table(BENCH), ("largest difference", "94.2 to 1234 ms", "12.7x slower")),
}  # fmt: skip


@pytest.mark.parametrize("width", [40, 60, 80])
@pytest.mark.parametrize("case", CASES)
def test_labels_and_numbers_stay_whole(case: str, width: int) -> None:
    table, pieces = CASES[case]
    text = rendered(table, width)
    assert max(map(len, text.split("\n"))) <= width
    for piece in pieces:
        assert piece in text


def test_each_part_repeats_the_labels() -> None:
    text = rendered(comparison_table(comparison()), 60)
    assert text.count("latency, batch 1") == 2
    assert rendered(comparison_table(comparison()), 80).count("latency, batch 1") == 1


def test_long_names_of_files_wrap_before_the_labels_do() -> None:
    table = comparison_table(comparison(), ("a" * 20, "b" * 20))
    lines = rendered(table, 80).split("\n")
    assert sum(line.startswith("latency, batch 1 ") for line in lines) == 1
    assert len(lines) == 15  # the names take two lines, each row one
