"""Runs as folders: every stage is written once, whole or not at all, and believed only if intact.

A run's folder holds ``run.json`` (its hyper-parameters and the network it is about) and one folder
for each finished stage. A stage is a bundle, as ``prune`` writes it, with ``stage.json`` beside its
files: which run and stage it is, the network it came from, and the hash of every file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.core.atomic import new_file, new_folder, sweep
from secateur.core.errors import FileError, FormatError, UsageError
from secateur.core.facts import Facts
from secateur.core.masks import Masks
from secateur.formats import Surgery, read_bundle, surgery_text, write_tensors
from secateur.formats.bundle import FACTS, MODEL, RECIPE, SURGERY
from secateur.formats.table import read_json
from secateur.formats.texts import facts_text, read_limited, recipe_text

VERSION = 1
RUN, STAGE = "run.json", "stage.json"
_LIMIT = 1_000_000
_AGAIN = "remove the folder to compute it again, or name another one"


@dataclass(frozen=True)
class Stage:
    """A finished stage as it was read from its folder.

    Args:
        folder: Where it lies; a bundle.
        tensors: The network, a full ``state_dict``.
        masks: Which weights were kept.
        facts: What the stage said about itself.
        digest: Hash of the network's file; the next stage names it as its parent.
        surgery: What had been cut from the network before the run, if anything was.
    """

    folder: Path
    tensors: Mapping[str, Tensor]
    masks: Masks
    facts: Facts
    digest: str
    surgery: Surgery | None = None


@dataclass(frozen=True)
class Run:
    """The folder of one run, checked to be what it is taken for.

    Args:
        folder: Where its stages are.
        name: Hash of its hyper-parameters.
    """

    folder: Path
    name: str

    def read(self, stage: str, parent: str = "") -> Stage | None:
        """A finished stage, or ``None`` if it is not finished.

        Args:
            stage: Its name.
            parent: Digest of the network that it must have come from.

        Raises:
            FormatError: The folder was altered, or belongs to another run.
        """
        folder = self.folder / stage
        if not folder.exists():
            return None
        files = _checked_list(folder, {"run": self.name, "stage": stage, "parent": parent})
        bundle = read_bundle(folder)
        return Stage(
            folder, bundle.tensors, bundle.masks, bundle.facts, files[MODEL], bundle.surgery
        )

    def write(self, stage: str, found: Stage, parent: str = "") -> Stage:
        """Write a stage and read it back, so that a run goes on from what is on the disk."""
        folder = self.folder / stage
        recipe, facts = recipe_text(found.facts.recipe), facts_text(found.facts)
        with new_folder(folder) as temporary:
            write_tensors(temporary / MODEL, found.tensors, found.masks)
            (temporary / RECIPE).write_text(recipe, encoding="utf-8")
            (temporary / FACTS).write_text(facts, encoding="utf-8")
            if found.surgery is not None:
                text = surgery_text(found.surgery)
                (temporary / SURGERY).write_text(text, encoding="utf-8")
            files = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
            content = {"run": self.name, "stage": stage, "parent": parent, "files": files}
            _write_json(temporary / STAGE, content)
        read = self.read(stage, parent)
        assert read is not None
        return read


@contextmanager
def open_run(
    folder: Path, identity: Mapping[str, Any], network: Mapping[str, Any]
) -> Iterator[Run]:
    """The run that ``folder`` holds, made if it is new; one process at a time works in it.

    A second process waits until the first one ends, and then finds the finished stages.

    Args:
        folder: Of the run.
        identity: Its hyper-parameters, as plain data.
        network: What identifies the untrained network.

    Raises:
        UsageError: The folder holds a run of other hyper-parameters, or of another network.
        FormatError: Its ``run.json`` is damaged.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "run"
        >>> with open_run(folder, {"lr": 0.1}, {"weights": "ab"}) as run:
        ...     print(run.read("dense"), sorted(p.name for p in folder.iterdir()))
        None ['run.json']
        >>> with open_run(folder, {"lr": 0.2}, {"weights": "ab"}) as run:
        ...     pass
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: the run in ...: it was started with lr=0.1, and now lr=0.2
        is asked for. Stages of two runs must not mix. Name another folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "every stage is written there"
        raise FileError(
            f"the run in {str(folder)!r}", str(error), why, "name another one"
        ) from error
    content = json.loads(json.dumps({"identity": identity, "network": network}, default=str))
    with _alone(folder):
        sweep(folder)
        path = folder / RUN
        if path.exists():
            _require_same(folder, _read_json(path), content)
        else:
            _require_empty(folder)
            _write_json(path, content)
        yield Run(folder, name_of(identity))


def name_of(identity: Mapping[str, Any]) -> str:
    """A hash of hyper-parameters, defaults left out by whoever made them plain.

    Example:
        >>> name_of({"a": 1, "b": 2}) == name_of({"b": 2, "a": 1}), len(name_of({}))
        (True, 12)
    """
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _checked_list(folder: Path, expected: Mapping[str, str]) -> dict[str, str]:
    """The files of a stage and their hashes, all checked."""
    asked = f"taking up {str(folder)!r}"
    if not (folder / STAGE).is_file():
        raise FormatError(asked, f"there is no {STAGE}", "it is no finished stage", _AGAIN)
    content = _read_json(folder / STAGE)
    for key, value in expected.items():
        if content.get(key) != value:
            found = f"its {key} is {str(content.get(key))[:80]!r}, not {value!r}"
            raise FormatError(asked, found, "it belongs to another run or was moved", _AGAIN)
    files = content.get("files")
    names = {p.name for p in folder.iterdir()} - {STAGE}
    if (
        not isinstance(files, dict)
        or not {MODEL, RECIPE, FACTS} <= set(files)
        or set(files) != names
    ):
        known = sorted(files) if isinstance(files, dict) else files
        found = f"it holds {', '.join(sorted(names))}; {STAGE} names {known}"
        raise FormatError(asked, found, "files were added or removed", _AGAIN)
    altered = [name for name, digest in files.items() if _digest(folder / name) != digest]
    if altered:
        found = f"{', '.join(altered)} is not what was written"
        raise FormatError(asked, found, "its hash has changed", _AGAIN)
    return files


def _require_same(folder: Path, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    if found.get("identity") != asked["identity"]:
        before, now = _differing(found.get("identity"), asked["identity"])
        raise UsageError(
            f"the run in {str(folder)!r}",
            f"it was started with {before}, and now {now} is asked for",
            "stages of two runs must not mix",
            "name another folder",
        )
    if found.get("network") != asked["network"]:
        before, now = _differing(found.get("network"), asked["network"])
        raise UsageError(
            f"going on with the run in {str(folder)!r}",
            f"it began with another network ({before}; this one has {now})",
            "stages of two networks must not mix",
            "seed the first weights (or pass the function that builds the network), "
            "or name another folder",
        )


def _differing(a: Any, b: Any) -> tuple[str, str]:
    if not isinstance(a, dict) or not isinstance(b, dict):
        return str(a)[:120], str(b)[:120]
    keys = [key for key in dict.fromkeys((*a, *b)) if a.get(key) != b.get(key)]
    texts = [", ".join(f"{key}={side.get(key, 'default')}" for key in keys) for side in (a, b)]
    return texts[0][:300], texts[1][:300]


def _require_empty(folder: Path) -> None:
    others = sorted(path.name for path in folder.iterdir())
    if others:
        raise UsageError(
            f"a run in {str(folder)!r}",
            f"it holds {', '.join(others[:4])} and no {RUN}",
            "it is the folder of something else",
            "name another folder",
        )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """JSON that carries its own hash."""
    body = {"version": VERSION, **content}
    seal = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    with new_file(path) as temporary:
        temporary.write_text(json.dumps({**body, "sha256": seal}, indent=1) + "\n", "utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(read_limited(path, _LIMIT).decode("utf-8"), f"reading {str(path)!r}")
    except UnicodeDecodeError as error:
        found = f"it is not UTF-8 ({error})"
        raise FormatError(f"reading {str(path)!r}", found, "JSON is UTF-8 text", _AGAIN) from error
    seal = content.pop("sha256", None)
    if hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest() != seal:
        found = "its own hash does not fit its content"
        raise FormatError(f"reading {str(path)!r}", found, "it was altered", _AGAIN)
    if content.pop("version") != VERSION:
        found = f"this secateur reads version {VERSION}"
        raise FormatError(f"reading {str(path)!r}", found, "it is of another version", _AGAIN)
    return content


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder; the system lets go of it when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # no such lock on this system
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot lock
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
