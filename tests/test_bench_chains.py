"""The study of chains: what it compares, and what it tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from onnx_cases import native

from bench import chains, record, tables
from secateur.runtime.compiler.whole import Plan
from secateur.runtime.race import Raced


class Pretend:
    """A clock for which a plan takes as long as its name says."""

    def runner(self, model: Any) -> float:
        return float(model)

    def race(self, runners: list[float], share: float, drop: bool = True) -> Raced:
        return Raced(tuple((time,) * 5 for time in runners))


def test_the_fastest_of_each_kind_is_taken() -> None:
    kinds = [[Plan(str(t), (), t) for t in times] for times in ((3.0, 2.0, 5.0), (4.0, 9.0))]
    assert [plan.name for plan in chains._fastest(Pretend(), *kinds)] == ["2.0", "4.0"]


@native
def test_the_study_runs_and_is_told(tmp_path: Path) -> None:
    chains.run(quick=True, folder=tmp_path)
    (row,) = record.read("chains", folder=tmp_path)["result"]["rows"]
    assert row["chains"] > 0
    assert row["error"] < 1e-5
    assert row["ratio"] == pytest.approx(row["speedups"]["chained"] / row["speedups"]["alone"])
    page = tables.page(tmp_path)
    assert "## Chains" in page
    assert "small-mobilenet" in page


def test_committed_figures_follow_from_their_parts() -> None:
    if not (record.RESULTS / "chains.json").exists():
        pytest.skip("bench/results/chains.json is not there")
    rows = record.read("chains")["result"]["rows"]
    assert len(rows) == len(chains.CASES)
    for row in rows:
        times = {name: each["median"] for name, each in row["milliseconds"].items()}
        for name, speedup in row["speedups"].items():
            assert speedup == pytest.approx(times["dense"] / times[name], rel=0.15)
        assert row["ratio"] == pytest.approx(times["alone"] / times["chained"], rel=0.15)
        assert row["error"] < 1e-4
        assert row["chains"] > 0
