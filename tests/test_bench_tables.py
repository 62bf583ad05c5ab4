"""The page of results follows the results: for each study a small file, and one number changed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bench import coverage, markdown, overhead, record, structural, tables

GAP = {"arm": "iplt", "than": "dense", "mean": -0.61, "seeds": [-0.5, -0.72]}
GAP |= {"standard_error_of_images": 0.17}
IMAGES = {"train_images": 40_000, "test_images": 11_000}
TRACED: dict[str, Any] = {
    "network": "ResNet basic",
    "traced": True,
    "parameters": 10_565,
    "widths": 6,
    "groups": 76,
    "removable": 0.9781,
    "error": 9e-08,
    "seconds": 0.03,
}
ROW: dict[str, Any] = {
    "network": "resnet50",
    "target": "macs=50%",
    "allocation": "uniform",
    "align": 16,
    "asked_align": 0,
    "batch": 8,
    "proof": 8e-08,
    "parameters": [1_000, 414],
    "speedup": 1.83,
    "speedup_range": [1.79, 1.86],
    "milliseconds": {"dense": {"median": 40.25}, "cut": {"median": 22.04}},
}
RECIPE = {
    "recipe": "Taylor, per cost",
    "accuracy": 89.7,
    "loss": 0.4321,
    "points_lost": 2.9,
    "standard_error": 0.55,
    "macs": 0.4987,
    "parameters": [853_018, 479_682],
    "seconds": 31.4,
}
STEP = {"percent": 1.234, "interval": [0.9, 1.52], "plain_ms": 300.1, "pruned_ms": 303.6}
RESULTS: dict[str, dict[str, Any]] = {
    "coverage": {
        "rows": [
            {**TRACED, "their": "works", "their_removed": 0.4321, "their_seconds": 0.25},
            {**TRACED, "network": "DeiT", "their": "KeyError: '/home/x' | y"},
            {"network": "odd", "traced": False, "why": "x", "their": "/lib/a.py:3: Warning"},
        ],
        "couple_resnet50": {"ours": 0.34, "theirs": 0.68, "ratio": 2.01, "repeats": 7},
        "torch_pruning": "1.6.0",
        "choices": 20,
    },
    "compensation-resnet20": {
        "rows": [RECIPE],
        "dense": {"accuracy": 91.5, "loss": 0.31},
        "images": 1_000,
        "calibration": 2_048,
    },
    "structural": {
        "rows": [ROW, {**ROW, "target": "latency=2x", "align": 4, "refused": "too\nmuch"}],
        "ort_threads": 2,
    },
    "overhead": {
        "plan": {"depth": 20, "batch": 128},
        "sparsity": 0.9,
        "rows": {
            "between updates": {**STEP, "pairs": 60},
            "on update steps": {**STEP, "percent": 21.0, "pairs": 60},
            "rigl, averaged": {"percent": 2.5, "frequency": 100},
        },
    },
    "sparse_training": {
        "plan": {**IMAGES, "depth": 8, "recipe": {"epochs": 10}, "every": 100},
        "arms": [
            {
                "arm": "rigl",
                "mean": 85.25,
                "least": 85.1,
                "most": 85.4,
                "sparsity_of_pruned_weights": 0.9,
                "sparsity_of_whole_model": 0.881,
                "seconds": 512.3,
            }
        ],
        "differences": [GAP],
    },
    "recovered-resnet56": {
        "plan": {**IMAGES, "depth": 56, "recipe": {"epochs": 15, "rate": 0.02}},
        "macs": [1_000.0, 499.0],
        "parameters": [1_000, 512],
        **{
            stage: {kind: {"test": {"accuracy": accuracy}} for kind in kinds}
            for stage, accuracy, kinds in (
                ("before", 92.25, ("dense", "pruned")),
                ("networks", 93.5, ("dense", "pruned", "distilled")),
            )
        },
        "differences": {kind: {**GAP} for kind in ("before", "pruned", "distilled")},
    },
    "filters": {
        "plan": {**IMAGES, "depth": 20, "recipe": {"epochs": 8}, "align": 8},
        "networks": [
            {
                "network": kind,
                "accuracy": [88.25, 88.5],
                "percent_fewer_seconds": [26.1, 27.3],
                "percent_fewer_processor_seconds": [28.2, 29.4],
                "training_macs_share": [0.605, 0.605],
                "macs": [[1_000, 493], [1_000, 487]],
                "points_above_dense": GAP,
            }
            for kind in ("dense", "iplt")
        ],
    },
    "dsp": {
        "plan": {
            **IMAGES,
            "first": {"epochs": 6},
            "second": {"epochs": 4},
            "groups": 2,
            "target": 0.6,
        },
        "networks": [{"network": "groups", "accuracy": [86.25], "macs_share": [0.405]}],
        "differences": [GAP],
        "milliseconds_of_100_images": [{"groups": 115.7, "branches": 204.8}],
        "branches": [{"error": 8e-08, "parameters": [1_000, 407]}],
    },
    "tickets": {
        "plan": {**IMAGES, "depth": 8, "training": {"epochs": 5}, "rewind_to": 0.5},
        "dense": [83.75, 84.25],
        "standard_error": 0.35,
        "levels": [{"sparsity": s, "accuracy": {"rate": a}} for s, a in ((0.79, 81.5), (0.89, 79))],
        "arms": [
            {
                "method": "rate",
                "seed": seed,
                "levels": [{"accuracy": 81.5}, {"accuracy": 78.5 + seed}],
            }
            for seed in (0, 1)
        ],
    },
    "leap": {
        "plan": {
            "pruning": {"epochs": 2},
            "sentences": 9_600,
            "arm_sentences": 2_400,
            "test": 872,
        },
        "teacher_accuracy": 90.25,
        "arms": [
            {"kind": k, "grain": g, "target": 0.8, "sparsity": 0.7981, "accuracy": a}
            for k, g, a in (("leap", "element", 87.5), ("one-shot", "row", 51.25))
        ],
    },
    "adversarial": {
        "plan": {"trunk": 4, "arm": 4, "images": 10_000, "test": 1_000, "sizes": [0.05, 0.15]},
        "eps": 0.1,
        "arms": [
            {
                "way": "blind",
                "target": 0.9,
                "sparsity": 0.9001,
                "natural": 0.853,
                "curves": {
                    name: {"accuracy": [0.7, last], "area": area}
                    for name, last, area in (("fgsm", 0.412, 0.655), ("pgd", 0.371, 0.604))
                },
            }
        ],
    },
}
# Study, where a number is planted, the number, and the cell that has to show it.
PLANTED = [
    ("coverage", ("rows", 0, "removable"), 0.1234, "| 12.3% |"),
    ("coverage", ("rows", 0, "error"), 0.25, "| 2e-01 |"),
    ("coverage", ("rows", 0, "their_removed"), 0.6789, "| 67.9% |"),
    ("coverage", ("rows", 1, "their"), "works", "works for 2 of 3;"),
    ("coverage", ("couple_resnet50", "ratio"), 9.75, "(9.75x)"),
    ("compensation-resnet20", ("rows", 0, "points_lost"), 7.77, "| 7.77 ± 0.55 |"),
    ("compensation-resnet20", ("dense", "accuracy"), 12.3, "| uncut | 12.3 % |"),
    ("compensation-resnet20", ("rows", 0, "parameters", 1), 85_302, "| 10.0% |"),
    ("recovered-resnet56", ("macs", 1), 777.0, "| pruned | 77.7% | 92.25 % | 93.50 % | -0.61"),
    ("recovered-resnet56", ("before", "dense", "test", "accuracy"), 12.34, "| 12.34 % | 93.50 % |"),
    (
        "recovered-resnet56",
        ("differences", "distilled", "mean"),
        -0.25,
        "| distilled | 49.9% | 92.25 % | 93.50 % | -0.25 ± 0.17 |",
    ),
    ("structural", ("rows", 0, "speedup"), 1.23, "| 1.23x |"),
    ("structural", ("rows", 0, "milliseconds", "cut", "median"), 77.25, "| 77.25 |"),
    ("structural", ("rows", 0, "parameters", 1), 901, "| 90.1% |"),
    ("overhead", ("rows", "between updates", "percent"), 7.654, "| +7.65 % |"),
    ("overhead", ("rows", "rigl, averaged", "percent"), 8.5, "steps | +8.50 % |"),
    ("overhead", ("rows", "on update steps", "interval", 1), 33.25, "| +0.90 to +33.25 |"),
    ("sparse_training", ("arms", 0, "mean"), 12.34, "| rigl | 12.34 % |"),
    ("sparse_training", ("arms", 0, "sparsity_of_whole_model"), 0.777, "| 77.7% |"),
    ("sparse_training", ("differences", 0, "mean"), 4.5, "| 4.50 ± 0.17 |"),
    ("filters", ("networks", 1, "accuracy", 1), 12.34, "| iplt | 88.25, 12.34 |"),
    ("filters", ("networks", 1, "percent_fewer_seconds", 0), -3.0, "| -3.0, 27.3 |"),
    ("filters", ("networks", 1, "percent_fewer_processor_seconds", 1), -3.0, "| 28.2, -3.0 |"),
    ("filters", ("networks", 1, "macs", 0, 1), 777, "| 77.7, 48.7 |"),
    ("filters", ("networks", 1, "points_above_dense", "mean"), 1.5, "| -1.50 ± 0.17 |"),
    ("dsp", ("networks", 0, "macs_share", 0), 0.777, "| 77.7 |"),
    ("dsp", ("milliseconds_of_100_images", 0, "branches"), 77.7, "branches |  |  | 77.7 |"),
    ("dsp", ("differences", 0, "seeds", 1), 4.56, "| -0.50, 4.56 |"),
    ("tickets", ("levels", 1, "accuracy", "rate"), 12.34, "| rate | 81.50 | 12.34 |"),
    ("tickets", ("arms", 1, "levels", 1, "accuracy"), 12.34, "| 78.50, 12.34 |"),
    ("tickets", ("dense", 0), 12.34, "Dense: 12.34, 84.25."),
    ("leap", ("arms", 0, "sparsity"), 0.1234, "| leap | 12.34% |"),
    ("leap", ("arms", 1, "accuracy"), 12.34, "| rows | magnitude at once | 79.81% | 12.34 % |"),
    ("leap", ("teacher_accuracy",), 12.34, "Teacher: 12.34 %."),
    ("adversarial", ("arms", 0, "natural"), 0.123, "| 90.01% | 12.3 |"),
    ("adversarial", ("arms", 0, "curves", "fgsm", "area"), 0.321, "| 85.3 | 32.1 | 60.4 |"),
    ("adversarial", ("arms", 0, "curves", "pgd", "accuracy", 1), 0.222, "| 41.2 | 22.2 |"),
]


def page(folder: Path, study: str, result: dict[str, Any], **more: Any) -> str:
    """The page with this study alone; whether lines break in a sentence does not count."""
    watch = record.Stopwatch()
    record.write(study, result, seeds=[0, 1], watch=watch, folder=folder, **more)
    return tables.page(folder).replace("\n", " ")


@pytest.mark.parametrize(("study", "place", "value", "cell"), PLANTED)
def test_a_changed_number_is_in_the_table(
    tmp_path: Path, study: str, place: tuple[Any, ...], value: Any, cell: str
) -> None:
    changed = copy.deepcopy(RESULTS[study])
    at: Any = changed
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    assert cell not in page(tmp_path, study, RESULTS[study])
    assert cell in page(tmp_path, study, changed)


@pytest.mark.parametrize("study", RESULTS)
def test_a_section_is_there_with_its_file_only(tmp_path: Path, study: str) -> None:
    assert "##" not in tables.page(tmp_path)
    goals = [record.goal("one", 2.5, "at most", 3.0), record.goal("two", 0.9876, "more than", 1.0)]
    found = page(tmp_path, study, RESULTS[study], goals=goals)
    assert found.count("##") == 1
    assert record.machine()["processor"] in found
    assert "| one | 2.5 | at most 3 | yes | | two | 0.988 | more than 1 | no |" in found
    assert "| goal |" not in page(tmp_path, study, RESULTS[study])


@pytest.mark.parametrize("study", RESULTS)
def test_rows_are_as_wide_as_their_heads(tmp_path: Path, study: str) -> None:
    page(tmp_path, study, RESULTS[study])
    for block in tables.page(tmp_path).split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count(" |") for line in lines}) <= 1, block


def test_messages_of_others_stay_in_the_file(tmp_path: Path) -> None:
    """Torch-Pruning's may be long, break a table, and name files of the machine."""
    found = page(tmp_path, "coverage", RESULTS["coverage"])
    assert "works for 1 of 3;" in found
    assert "| KeyError |  |  |" in found
    assert "| odd |  |  |  | not traced |  |  | failed |  |  |" in found
    assert "/home" not in found
    assert "/lib" not in found
    without = {**RESULTS["coverage"], "torch_pruning": None}
    assert "it removed" not in page(tmp_path, "coverage", without)


def test_what_was_refused_has_no_figures(tmp_path: Path) -> None:
    found = page(tmp_path, "structural", RESULTS["structural"])
    assert "| latency=2x | uniform | 4 | 8 |  |  | refused |  |  |  |" in found
    goals = structural.goals(RESULTS["structural"]["rows"])
    assert [(g["found"], g["met"]) for g in goals] == [(1.83, True)]


def test_other_depths_join_their_study_and_single_arms_do_not(tmp_path: Path) -> None:
    study = RESULTS["sparse_training"]
    page(tmp_path, "sparse_training", study)
    page(tmp_path, "sparse_training-rigl-seed0", {})
    deeper = {**study, "plan": {**study["plan"], "depth": 20}}
    found = page(tmp_path, "sparse_training-resnet20-30epochs", deeper)
    assert found.count("##") == 1
    assert ("| ResNet-8 |" in found, "| ResNet-20 |" in found) == (True, True)
    assert len(markdown.variants(tmp_path, "sparse_training")) == 2


def test_other_protocols_and_rates_are_studies_of_their_own(tmp_path: Path) -> None:
    names = [
        "",
        "-resnet56",
        "-resnet56-held-out",
        "-resnet56-rate0.1",
        "-resnet56-held-out-rate0.1",
        "-resnet56-rate0.1-50000images",
    ]
    for name in (*names, "-resnet56-held-out-seed0", "-resnet56-dense"):
        record.write(
            f"recovered{name}", {"name": name}, seeds=[0], watch=record.Stopwatch(), folder=tmp_path
        )
    found = [study["result"]["name"] for study in markdown.variants(tmp_path, "recovered")]
    assert sorted(found) == sorted(names)


def test_both_networks_share_a_section(tmp_path: Path) -> None:
    page(tmp_path, "compensation-resnet56", RESULTS["compensation-resnet20"])
    found = page(tmp_path, "compensation-resnet20", RESULTS["compensation-resnet20"])
    assert found.count("##") == 1
    assert found.index("| ResNet-20 |") < found.index("| ResNet-56 |")


def test_smoke_tests_of_studies_make_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files above have the shape that studies write: shown for two that need no data."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(coverage, "_version", lambda: None)
    coverage.run(quick=True, seed=0, folder=tmp_path)
    overhead.run(quick=True, folder=tmp_path)
    found = tables.page(tmp_path)
    for row in json.loads((tmp_path / "coverage.json").read_text("utf-8"))["result"]["rows"]:
        cells = f"{row['parameters']:,} | {row['widths']} | {row['groups']}"
        assert f"| {row['network']} | {cells} |" in found
    rows = json.loads((tmp_path / "overhead.json").read_text("utf-8"))["result"]["rows"]
    assert all(f"| {row['percent']:+.2f} % |" in found for row in rows.values())
