"""A run that dies by SIGKILL at any step, and is started again, ends with the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from restless import STEPS, loader, net

from secateur import Data, FineTune, Recipe, Target, prune
from secateur.drive.training.recorder import Checkpoints
from secateur.drive.training.resume import latest
from secateur.schedule import Polynomial
from secateur.score import Movement, Smoothed, Wanda

TARGET = Target("sparsity", 0.75)
CASES: dict[str, tuple[Recipe, str]] = {
    "gradual": (
        Recipe(
            target=TARGET,
            schedule=Polynomial(1, 9, 2),
            recovery=(FineTune(3, 0.05, weight_decay=0.01),),
        ),
        "global",
    ),
    "movement": (
        Recipe(
            Smoothed(Movement()),
            target=TARGET,
            schedule=Polynomial(0, 2, 0.3, unit="epochs"),
            recovery=(FineTune(3, 0.01, "adamw", distill=0.5),),
        ),
        "own",
    ),
    "wanda": (
        Recipe(Wanda(), target=TARGET, schedule=Polynomial(2, 11, 3), recovery=(FineTune(3, 0.1),)),
        "derived",
    ),
    "one shot, then two stages": (
        Recipe(target=TARGET, recovery=(FineTune(2, 0.05), FineTune(1, 0.01, "adamw"))),
        "global",
    ),
}


def run(case: str, checkpoint: Checkpoints | None, kill: int = 0) -> dict[str, Any]:
    """One whole run; killed after ``kill`` steps (or in the middle of a write if negative)."""
    recipe, kind = CASES[case]
    random.seed(1)
    import numpy as np

    np.random.seed(1)
    count = [0]

    def progress(stage: str, done: float, total: float) -> None:
        count[0] += stage == "fine-tuning"
        if 0 < kill == count[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    if kill < 0:
        real = os.fsync

        syncs = [0]

        def fsync(handle: int) -> None:
            syncs[0] += 1
            if syncs[0] == -kill:
                os.kill(os.getpid(), signal.SIGKILL)
            real(handle)

        os.fsync = fsync  # type: ignore[assignment]
    data = Data(train=loader(kind), calibration=16)
    pruned = prune(net(), recipe, data, progress=progress, checkpoint=checkpoint)
    digest = hashlib.sha256()
    for name, tensor in sorted(pruned.model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return {
        "weights": digest.hexdigest(),
        "masks": pruned.masks.fingerprint(),
        "history": pruned.facts.history,
        "sparsity": pruned.facts.sparsity,
        "numbers": [random.random(), float(np.random.rand())],
    }


def nursery(folder: Path) -> None:
    """Fork a fresh process for every run: killed ones die for real, and torch is imported once."""
    torch.set_num_threads(1)
    torch.optim.SGD(net().parameters(), 0.1)  # imports much, once for all children
    chance = random.Random(18)
    found: dict[str, Any] = {}
    kills = [(case, chance.randint(1, STEPS)) for case in list(CASES) * 3][:10]
    kills += [("gradual", -n) for n in (1, 2, 5)]  # before and after the file appears, and later

    def born(label: str, case: str, checkpoint: Checkpoints | None, kill: int = 0) -> int:
        child = os.fork()
        if child == 0:
            try:
                result = run(case, checkpoint, kill)
                (folder / f"{label}.json").write_text(json.dumps(result))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        return os.waitpid(child, 0)[1]

    for case in CASES:
        assert born(case, case, None) == 0
    for index, (case, kill) in enumerate(kills):
        place = Checkpoints(folder / f"run {index}", every=chance.randint(1, 3))
        died = born("", case, place, kill)
        assert os.WIFSIGNALED(died), (case, kill)
        assert os.WTERMSIG(died) == signal.SIGKILL
        assert born(f"again {index}", case, place) == 0
        assert born(f"done {index}", case, place) == 0  # called once more when it is finished
        found[str(index)] = {
            "case": case,
            "kill": kill,
            "left": sorted(f.name for f in Path(place.folder).iterdir()),
        }
    (folder / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("nursery")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(folder)], check=True, env=environment)
    return folder, json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("index", range(13))
def test_a_killed_run_ends_with_the_same_bits(
    killed: tuple[Path, dict[str, Any]], index: int
) -> None:
    folder, found = killed
    case = found[str(index)]["case"]
    whole = json.loads((folder / f"{case}.json").read_text())
    assert json.loads((folder / f"again {index}.json").read_text()) == whole
    done = json.loads((folder / f"done {index}.json").read_text())
    assert (done["weights"], done["masks"]) == (whole["weights"], whole["masks"])
    assert done["history"] == whole["history"]
    left = [name for name in found[str(index)]["left"] if name != "stage-2"]
    assert 1 <= len(left) <= 2, left
    assert all(name.startswith("step-") for name in left), left  # nothing half written stays


def test_the_cases_differ_and_prune(killed: tuple[Path, dict[str, Any]]) -> None:
    folder, found = killed
    ends = [json.loads((folder / f"{case}.json").read_text()) for case in CASES]
    assert len({end["weights"] for end in ends}) == len(CASES)
    assert all(end["sparsity"] == pytest.approx(0.75, abs=0.02) for end in ends)
    assert {entry["case"] for entry in found.values()} == set(CASES)


# -- the command line -------------------------------------------------------------------------------

PROGRAM = """
import os, signal, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 8), nn.Linear(8, 3))

class Deadly(DataLoader):
    def __iter__(self):
        for count, batch in enumerate(super().__iter__()):
            if count == 4 and os.environ.pop("DIE", ""):
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

def load():
    x = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, x[:, :3].argmax(1))
    return {"train": Deadly(data, 8, shuffle=True), "test": DataLoader(data, 48)}
"""


def test_the_command_continues_a_run_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from secateur.cli.main import app

    (tmp_path / "net.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    base = ["prune", "net.py:build", "--data", "net.py:load", "--epochs", "2", "--sparsity", "75%"]
    saved = ["--checkpoint", "saved", "--checkpoint-every", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DIE": "1"}
    killed = subprocess.run(
        [sys.executable, "-m", "secateur", *base, "-o", "again", *saved],
        env=environment, capture_output=True, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not Path("again").exists()
    assert latest("saved") == Path("saved/step-000000004.safetensors")
    for output, more in (("whole", []), ("again", saved)):
        done = CliRunner().invoke(app, [*base, "-o", output, *more])
        assert done.exit_code == 0, done.output
    assert (
        Path("again/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    )
    for flags, words in (
        (["--sparsity", "50%", *saved], "its recipe is"),
        (["--checkpoint-every", "2"], "no --checkpoint"),
    ):
        refused = CliRunner().invoke(app, [*base, "-o", "other", *flags])
        assert refused.exit_code == 2, refused.output
        assert words in " ".join(refused.output.split())
    untrained = CliRunner().invoke(app, ["prune", "net.py:build", "-o", "other", *saved])
    assert "does not train" in " ".join(untrained.output.split())


if __name__ == "__main__":
    nursery(Path(sys.argv[1]))
