"""What every test gets: fixed seeds, one thread per test process, and the shared data."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

# Test processes share the cores: more than one thread in each makes all of them slower, and sums
# in another order make results differ between machines.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # for programs that tests start
    torch.set_num_threads(1)

# A slow machine is not a failing test, so neither deadlines nor the check for slow data apply.
settings.register_profile(
    "local", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Start every test from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def short_races(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time networks in few passes: what tests compare is not how fast they are."""
    monkeypatch.setattr("secateur.evaluate.latency._MOST", 11)


@pytest.fixture(scope="session")
def data_path() -> Path:
    """The folder of shared data sets and models; tests that need it are skipped without it."""
    path = Path(os.environ.get("SECATEUR_DATA", ROOT / ".." / "shared" / "data")).resolve()
    if not path.is_dir():
        pytest.skip(
            f"no shared data: {path} is not a folder. "
            "Set SECATEUR_DATA to the folder that holds the data sets to run this test."
        )
    return path
