"""What ``secateur plot`` can read: a bundle, a JSON document, a ticket run or a folder of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.core.errors import FileError, FormatError, SecateurError, UsageError
from secateur.core.facts import Facts
from secateur.core.masks import Masks
from secateur.evaluate.robustness import Curve, RobustnessFacts
from secateur.experiments import similarity_matrix
from secateur.experiments.stages import RUN, STAGE, Run, Stage, name_of
from secateur.formats.bundle import FACTS
from secateur.formats.table import read_json
from secateur.formats.texts import FACTS_LIMIT, parse_facts, read_limited
from secateur.report.plots_curves import run_names
from secateur.report.units import percent

_FIX = "write the file again, or copy it again from where it came"
_ALONE = "each level is a bundle: plot its folder"


@dataclass
class Source:
    """Everything that was found to draw.

    Args:
        facts: With history, layers and widths, as far as there are any.
        events: Rows of an event log.
        tickets: Facts of ticket searches, as plain data.
        robustness: Curves, or ``None``.
        matrix: Chance-corrected similarities and their names, or ``None``.
        left_out: Plot -> why it is not drawn.
    """

    facts: Facts = field(default_factory=Facts)
    events: list[dict[str, Any]] = field(default_factory=list)
    tickets: list[dict[str, Any]] = field(default_factory=list)
    robustness: RobustnessFacts | None = None
    matrix: tuple[list[list[float]], list[str]] | None = None
    left_out: dict[str, str] = field(default_factory=dict)


def read_source(path: Path) -> Source:
    """Read what ``path`` holds.

    Raises:
        FileError: There is nothing of that name.
        FormatError: It is damaged.
        UsageError: It is something else.

    Example:
        >>> read_source(Path("no-such-run"))
        Traceback (most recent call last):
            ...
        secateur.core.errors.FileError: plotting 'no-such-run': there is no such file or folder. ...
    """
    asked = f"plotting {str(path)!r}"
    if path.is_file():
        return _document(path)
    if not path.is_dir():
        raise FileError(
            asked,
            "there is no such file or folder",
            "a run is a bundle, a JSON document or a folder of ticket runs",
            "check the name",
        )
    if (path / FACTS).is_file():
        facts = parse_facts(read_limited(path / FACTS, FACTS_LIMIT))
        with _readable(path / FACTS):
            _rows({"history": facts.history}, "history")
        return Source(facts)
    folders = [path] if (path / RUN).is_file() else sorted(p.parent for p in path.glob(f"*/{RUN}"))
    if not folders:
        raise UsageError(
            asked,
            f"the folder holds neither {FACTS} nor {RUN}",
            "a bundle has the one, a ticket run (or each run below the folder) the other",
            "name what prune, shrink or ticket wrote",
        )
    return _tickets(folders, asked)


# -- JSON documents -----------------------------------------------------------------------------


def _document(path: Path) -> Source:
    content = _json(path)
    if content.get("ok") is False:
        raise UsageError(
            f"plotting {str(path)!r}",
            f"it is the document of a {content.get('command', 'command')} that failed",
            "it holds an error and no facts",
            "run the command again, and plot what it then writes",
        )
    with _readable(path):
        return _source_of(content)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Errors of Python inside mean that the file has other fields than it should."""
    try:
        yield
    except SecateurError:
        raise
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        asked = f"reading {str(path)!r}"
        found = f"a field is wrong ({type(error).__name__}: {str(error)[:120]})"
        raise FormatError(asked, found, "fields have fixed names and types", _FIX) from error


def _source_of(content: Mapping[str, Any]) -> Source:
    found = Source()
    layers = [
        {key: row[key] for key in ("name", "shape", "total", "kept")}
        for row in content.get("layers", [])
    ]
    widths = [
        {**{key: row[key] for key in ("name", "groups", "kept")}, "parameters": ()}
        for row in content.get("widths", [])
        if "kept" in row  # inspect --structure lists widths that nobody has cut
    ]
    history = _rows(content, "history")
    found.facts = Facts.from_dict({"layers": layers, "widths": widths, "history": history})
    found.events = _rows(content, "events")
    if "dense" in content and "levels" in content:
        for stage in (content["dense"], *content["levels"]):
            _ = stage["asked"], stage["sparsity"], stage["accuracy"]
        found.tickets = [dict(content)]
        run_names(found.tickets)  # reads recipe and plan
        found.left_out["similarity"] = "the document has no masks; plot the run's folder"
    curves = content.get("robustness", content)
    if "curves" in curves:
        rows = [Curve(**{**row, **_tuples(row)}) for row in curves["curves"]]
        found.robustness = RobustnessFacts(tuple(rows), int(curves["units"]))
    matrix = content.get("similarity", content)
    if "corrected" in matrix:
        found.matrix = ([list(row) for row in matrix["corrected"]], [*map(str, matrix["names"])])
    return found


def _rows(content: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    rows = content.get(key, [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TypeError(f"{key!r} is no list of objects")
    return rows


def _tuples(row: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    sizes, right = tuple(row["sizes"]), tuple(row["accuracy"])
    if len(sizes) != len(right):
        raise ValueError(f"{len(sizes)} sizes and {len(right)} accuracies")
    return {"sizes": sizes, "accuracy": right}


# -- ticket runs --------------------------------------------------------------------------------


def _tickets(folders: list[Path], asked: str) -> Source:
    identities = {folder: _json(folder / RUN).get("identity") or {} for folder in folders}
    runs = {folder: _stages(folder, name_of(found)) for folder, found in identities.items()}
    parents = {
        stage.digest: stage for found in runs.values() for stage, _ in found if not stage.masks
    }
    source = Source()
    for why in ("training", "layers"):
        source.left_out[why] = _ALONE
    masks: list[list[Masks]] = []
    for folder, stages in runs.items():
        levels = [(stage, parent) for stage, parent in stages if stage.masks]
        if not levels:
            continue
        dense = _dense_of(folder, levels, parents)
        plan = dict(identities[folder].get("plan") or {})
        for chain, words in _chains(levels):
            masks.append([stage.masks for stage in chain])
            measures = chain[0].facts.measures
            first = (
                {"asked": 0.0, "sparsity": 0.0, "accuracy": None} if dense is None else _row(dense)
            )
            source.tickets.append(
                {
                    "rewind": str(plan.get("rewind", "weights")),
                    "recipe": identities[folder].get("recipe") or {},
                    "plan": {**{k: v for k, v in plan.items() if k != "rewind"}, **words},
                    "metric": str(measures.get("metric", "accuracy")),
                    "split": str(measures.get("split", "test")),
                    "dense": first,
                    "levels": [_row(stage) for stage in chain],
                }
            )
    if not source.tickets:
        raise UsageError(
            asked,
            f"none of its {len(folders)} runs has a finished level",
            "a curve of tickets goes from level to level",
            "let the search go on",
        )
    _compare(source, masks)
    return source


def _compare(source: Source, masks: list[list[Masks]]) -> None:
    """The levels of one run, or the sparsest levels of several."""
    named: dict[str, Masks] = {}
    runs = [""] if len(masks) == 1 else run_names(source.tickets)
    for run, levels in zip(runs, masks, strict=True):
        for mask in levels if len(masks) == 1 else levels[-1:]:
            name = ", ".join(filter(None, [run, percent(mask.sparsity)]))
            while name in named:
                name += "'"
            named[name] = mask
    if len(named) < 2:
        source.left_out["similarity"] = "there is only one mask"
        return
    try:
        found = similarity_matrix(named)
    except UsageError as error:
        source.left_out["similarity"] = error.found
        return
    source.matrix = ([list(row) for row in found.corrected], list(found.names))


def _stages(folder: Path, name: str) -> list[tuple[Stage, str]]:
    """Finished stages, all files checked against their hashes, and the digests of their parents."""
    found = []
    run = Run(folder, name)
    for path in sorted(folder.glob(f"*/{STAGE}")):
        parent = str(_json(path).get("parent", ""))
        stage = run.read(path.parent.name, parent)
        if stage is not None and "asked" in stage.facts.measures:
            found.append((stage, parent))
    return found


def _dense_of(
    folder: Path, levels: list[tuple[Stage, str]], known: Mapping[str, Stage]
) -> Stage | None:
    """The dense training that the first level came from: it is in a run beside this one."""
    wanted = {parent for _, parent in levels} - {stage.digest for stage, _ in levels}
    for digest in sorted(wanted & set(known)):
        return known[digest]
    for run in sorted(folder.parent.glob(f"dense-*/{RUN}")):
        found = _stages(run.parent, name_of(_json(run).get("identity") or {}))
        for stage, _ in found:
            if stage.digest in wanted:
                return stage
    return None


def _chains(levels: list[tuple[Stage, str]]) -> list[tuple[list[Stage], dict[str, Any]]]:
    """Ways from the first level to a last one, and what tells them from the other ways of their run.

    Levels straight from dense are one way together.
    """
    by_digest = {stage.digest: (stage, parent) for stage, parent in levels}
    inner = {parent for _, parent in levels}
    ways: list[list[Stage]] = []
    for stage, parent in levels:
        if stage.digest in inner or parent not in by_digest:
            continue
        way, above = [stage], parent
        while above in by_digest:
            before, above = by_digest[above]
            way.append(before)
        ways.append(way[::-1])
    alone = any(s.digest not in inner and parent not in by_digest for s, parent in levels)
    straight = [stage for stage, parent in levels if alone and parent not in by_digest]
    straight.sort(key=lambda stage: stage.masks.sparsity)
    asked = [[stage.facts.measures["asked"] for stage in way] for way in ways]
    told: list[tuple[list[Stage], dict[str, Any]]] = []
    for way, mine in zip(ways, asked, strict=True):
        own = [level for level in mine if any(level not in other for other in asked)]
        text = f"through {', '.join(map(percent, own))}"
        told.append((way, {"way": text} if own else {}))
    if straight:
        told.append((straight, {"one_shot": True} if ways or len(straight) > 1 else {}))
    return told


def _row(stage: Stage) -> dict[str, Any]:
    measures = stage.facts.measures
    return {
        "name": stage.folder.name,
        "asked": measures.get("asked", 0.0),
        "sparsity": stage.masks.sparsity if stage.masks else 0.0,
        "accuracy": measures.get("accuracy"),
    }


def _json(path: Path) -> dict[str, Any]:
    asked = f"reading {str(path)!r}"
    data = read_limited(path, FACTS_LIMIT)
    if len(data) > FACTS_LIMIT:
        found = f"it has more than {FACTS_LIMIT:,} bytes"
        raise FormatError(asked, found, "larger documents are not read", "name a smaller one")
    try:
        return read_json(data.decode("utf-8"), asked)
    except UnicodeDecodeError as error:
        found = f"it is not UTF-8 ({error})"
        raise FormatError(asked, found, "JSON is UTF-8 text", _FIX) from error
