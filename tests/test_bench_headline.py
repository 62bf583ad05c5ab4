"""The figures in README are those of the results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench import headline, record

README = Path(__file__).parents[1] / "README.md"


def rows(result: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    """The rows, or their cases, that have these values."""
    told = [({**row, **row.get("case", {})}, row) for row in result["rows"]]
    return [row for about, row in told if all(about.get(k) == v for k, v in wanted.items())]


def test_they_are_the_measured_ones() -> None:
    text = README.read_text(encoding="utf-8")
    assert headline.text() in text, "put what this prints there: python -m bench.headline"


@pytest.mark.parametrize(
    ("study", "change", "cell"),
    [
        (
            "speed",
            {"network": "resnet50", "sparsity": 0.9, "threads": 2, "batch": 1, "isa": ""},
            "| 9.87x |",
        ),
        (
            "structural",
            {"network": "mobilenetv2", "target": "latency=1.5x", "batch": 1},
            "| 9.87x |",
        ),
        ("speed", {"network": "resnet50", "sparsity": 0.9, "batch": 8}, None),
        ("structural", {"network": "resnet50", "allocation": "uniform"}, None),
        ("structural", {"network": "resnet50", "align": 1}, None),
    ],
)
def test_another_speed_is_another_figure(
    study: str, change: dict[str, Any], cell: str | None, tmp_path: Path
) -> None:
    folder = tmp_path / "results"
    shutil.copytree(record.RESULTS, folder)
    whole = json.loads((folder / f"{study}.json").read_text("utf-8"))
    found = rows(whole["result"], **change)
    assert found
    for row in found:
        row["speedup"] = 9.874
    (folder / f"{study}.json").write_text(json.dumps(whole), "utf-8")
    text = headline.text(folder)
    assert text.count("9.87") == (1 if cell else 0)
    assert cell is None or cell in text


@pytest.mark.parametrize(
    ("study", "path", "cell"),
    [
        ("gradual", ("arms", 2, "accuracy"), "| 12.3% ± 0.3 |"),
        ("gradual", ("arms", 0, "accuracy"), "| 12.3% | 88.4%"),
        (
            "recovered-resnet56-held-out",
            ("networks", "distilled", "test", "accuracy"),
            "| 12.3% ± 0.2 |",
        ),
        ("oneshot-resnet20", ("dense", "accuracy"), "| 12.3% |"),
    ],
)
def test_another_accuracy_is_another_figure(
    study: str, path: tuple[Any, ...], cell: str, tmp_path: Path
) -> None:
    folder = tmp_path / "results"
    shutil.copytree(record.RESULTS, folder)
    whole = json.loads((folder / f"{study}.json").read_text("utf-8"))
    place = whole["result"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = 12.34
    (folder / f"{study}.json").write_text(json.dumps(whole), "utf-8")
    assert headline.text().count("12.3%") == 0
    assert cell in headline.text(folder)


def test_all_of_it_was_measured_with_the_threads_it_names() -> None:
    assert record.read("structural")["result"]["ort_threads"] == headline.THREADS
