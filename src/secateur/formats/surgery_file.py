"""The file ``surgery.json``: written with a hash of itself, read without believing anything in it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from secateur.core.errors import FormatError, UsageError, kind_of, with_article
from secateur.formats.surgery import BlockEdit, Selection, Surgery, plain_json
from secateur.formats.table import read_json

#: Version of the format that this package writes and reads.
SURGERY_VERSION = 1
#: Largest file that is read.
SURGERY_LIMIT = 64_000_000

_MARK = b'"sha256":"'
_BLANK = "0" * 64
_AGAIN = "copy the file again from where it came, or write it again"
_HASH = re.compile(r"[0-9a-f]{64}")
_FIELDS = {
    "version": int,
    "sha256": str,
    "library": str,
    "class": str,
    "original": dict,
    "result": dict,
    "selections": list,
    "cuts": list,
    "attributes": list,
    "blocks": list,
}
_LARGEST = 2**48
_DEPTH = 16


def surgery_text(surgery: Surgery) -> str:
    """The JSON file: one line for each field, with a hash of the whole.

    Raises:
        UsageError: The details of a block are no plain values, or it is too large to be read.

    Example:
        >>> cut = Surgery("Net", {"w": {0: Selection(4, ((0, 2),))}}, shapes=_BLANK, result=_BLANK)
        >>> parse_surgery(surgery_text(cut).encode()) == cut
        True
    """
    numbers: dict[Selection, int] = {}
    cuts = [
        {"parameter": name, "axis": axis, "selection": numbers.setdefault(kept, len(numbers))}
        for name, axes in surgery.cuts.items()
        for axis, kept in axes.items()
    ]
    attributes = [
        {"module": path, "name": name, "before": before, "after": after}
        for path, edits in surgery.attributes.items()
        for name, (before, after) in edits.items()
    ]
    fields = {
        "version": SURGERY_VERSION,
        "sha256": _BLANK,
        "library": surgery.library,
        "class": surgery.model,
        "original": {"shapes": surgery.shapes, "weights": surgery.weights},
        "result": {"shapes": surgery.result},
        "selections": [{"size": kept.size, "runs": kept.runs} for kept in numbers],
        "cuts": cuts,
        "attributes": attributes,
        "blocks": [
            {"module": b.module, "kind": b.kind, "details": dict(b.details)} for b in surgery.blocks
        ],
    }
    try:
        text = (
            "{"
            + ",\n".join(f'"{key}":{plain_json(value)}' for key, value in fields.items())
            + "}\n"
        )
        parse_surgery(_sealed(text).encode())
    except (TypeError, ValueError, RecursionError, OSError) as error:
        raise UsageError(
            "writing surgery.json",
            getattr(error, "found", str(error))[:300],
            "it must be readable again by any tool",
            "use plain values only",
        ) from error
    return _sealed(text)


def parse_surgery(data: bytes) -> Surgery:
    """Surgery out of the bytes of a file.

    Sizes are numbers until they are compared with a network: no file makes this use more memory
    than a small multiple of its own size.

    Raises:
        FormatError: It is damaged, oversized, of another version, or does not agree with itself.

    Example:
        >>> parse_surgery(b"{}")
        Traceback (most recent call last):
            ...
        secateur.core.errors.FormatError: the surgery: its version is None. This secateur reads \
version 1. Install ...
    """
    if len(data) > SURGERY_LIMIT:
        raise _lie(f"the file has more than {SURGERY_LIMIT:,} bytes", "larger ones are not read")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _lie(f"it is not UTF-8 ({error})", "JSON is UTF-8 text") from error
    fields = read_json(text, "the surgery")
    version = fields.get("version")
    if type(version) is not int or version != SURGERY_VERSION:
        raise FormatError(
            "the surgery",
            f"its version is {str(version)[:40]}",
            f"this secateur reads version {SURGERY_VERSION}",
            "install the secateur version that wrote the file, or write it again with this one",
        )
    _require_fields(fields, _FIELDS, "the file")
    stored, computed = _digest(data)
    if stored != computed:
        raise _lie(
            "its bytes were altered",
            f"their SHA-256 starts with {computed[:12]}; the file says {stored[:12]!a}",
        )
    _require_fields(fields["original"], {"shapes": str, "weights": str}, "'original'")
    _require_fields(fields["result"], {"shapes": str}, "'result'")
    hashes = [fields["original"]["shapes"], fields["result"]["shapes"]]
    weights = fields["original"]["weights"]
    if not all(_HASH.fullmatch(digits) for digits in [*hashes, *([weights] if weights else [])]):
        raise _lie("a hash is not 64 hex digits", "hashes are SHA-256 in lower-case hex")
    return Surgery(
        model=fields["class"],
        cuts=_cuts(fields["cuts"], [_selection(s) for s in fields["selections"]]),
        attributes=_attributes(fields["attributes"]),
        blocks=_blocks(fields["blocks"]),
        shapes=hashes[0],
        weights=weights,
        result=hashes[1],
        library=fields["library"],
    )


def _sealed(text: str) -> str:
    """``text`` with the hash of the whole in its place."""
    return text.replace(f'"sha256":"{_BLANK}"', f'"sha256":"{_digest(text.encode())[1]}"', 1)


def _digest(data: bytes) -> tuple[str, str]:
    """``(stored, computed)``: SHA-256 with zeros in the place of the 64 digits."""
    place = data.find(_MARK) + len(_MARK)
    if data.count(_MARK) != 1 or place + 64 > len(data):
        return "", "-"
    blank = data[:place] + _BLANK.encode() + data[place + 64 :]
    stored = data[place : place + 64].decode("ascii", "replace")
    return stored, hashlib.sha256(blank).hexdigest()


def _selection(data: Any) -> Selection:
    _require_fields(data, {"size": int, "runs": list}, "a selection")
    size, last, runs = data["size"], -1, []
    for run in data["runs"]:
        if not (isinstance(run, list) and len(run) == 2 and all(type(n) is int for n in run)):
            raise _lie("a run is no pair of integers", "a run is [start, stop]")
        start, stop = run
        if not last < start < stop <= size <= _LARGEST:
            found = f"a run is {str(run)[:60]}, after {last}, in an axis of {str(size)[:20]}"
            raise _lie(found, "runs increase, do not touch, and lie inside the axis")
        runs.append((start, stop))
        last = stop
    if not runs:
        raise _lie("a selection keeps nothing", "a layer of width zero passes nothing on")
    return Selection(size, tuple(runs))


def _cuts(data: list[Any], selections: list[Selection]) -> dict[str, dict[int, Selection]]:
    cuts: dict[str, dict[int, Selection]] = {}
    for entry in data:
        _require_fields(entry, {"parameter": str, "axis": int, "selection": int}, "a cut")
        name, axis, number = entry["parameter"], entry["axis"], entry["selection"]
        if not (0 <= axis < 64 and 0 <= number < len(selections)):
            found = f"axis {str(axis)[:20]} of {name[:80]!r} has selection {str(number)[:20]}"
            raise _lie(found, f"there are {len(selections)} selections, and at most 64 axes")
        if axis in cuts.setdefault(name, {}):
            raise _lie(f"axis {axis} of {name[:80]!r} is cut twice", "each axis is cut once")
        cuts[name][axis] = selections[number]
    return cuts


def _attributes(data: list[Any]) -> dict[str, dict[str, tuple[int, int]]]:
    edits: dict[str, dict[str, tuple[int, int]]] = {}
    for entry in data:
        kinds = {"module": str, "name": str, "before": int, "after": int}
        _require_fields(entry, kinds, "an attribute")
        path, name = entry["module"], entry["name"]
        if name in edits.setdefault(path, {}) or not _plain_name(name):
            found = f"{name[:80]!r} of {path[:80]!r} is set twice, or is no attribute of a size"
            raise _lie(found, "names are like num_heads, config.num_heads or normalized_shape[0]")
        if not all(0 <= entry[key] <= _LARGEST for key in ("before", "after")):
            raise _lie(f"{name[:80]!r} of {path[:80]!r} is out of range", "it is a size")
        edits[path][name] = (entry["before"], entry["after"])
    return edits


def _plain_name(name: str) -> bool:
    return re.fullmatch(r"(config\.)?[A-Za-z]\w*(\[\d{1,6}\])?", name, re.ASCII) is not None


def _blocks(data: list[Any]) -> tuple[BlockEdit, ...]:
    blocks: dict[str, BlockEdit] = {}
    for entry in data:
        _require_fields(entry, {"module": str, "kind": str, "details": dict}, "a block")
        path = entry["module"]
        if not path or path in blocks:
            found = f"{path[:80]!r} is replaced twice, or is the whole model"
            raise _lie(found, "a block is one module inside the model")
        _require_shallow(entry["details"], 0)
        blocks[path] = BlockEdit(path, entry["kind"], entry["details"])
    return tuple(blocks.values())


def _require_shallow(value: Any, depth: int) -> None:
    if depth > _DEPTH:
        raise _lie(f"details are nested deeper than {_DEPTH}", "they are plain values")
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            _require_shallow(item, depth + 1)


def _require_fields(data: Any, kinds: Mapping[str, type], where: str) -> None:
    if not isinstance(data, dict) or set(data) != set(kinds):
        found = str(sorted(data))[:120] if isinstance(data, dict) else type(data).__name__
        raise _lie(f"the fields of {where} are {found}", f"they must be {sorted(kinds)}")
    wrong = [name for name, kind in kinds.items() if type(data[name]) is not kind]
    if wrong:
        found = f"{wrong[0]!r} in {where} is {kind_of(data[wrong[0]])}"
        raise _lie(found, f"it must be {with_article(kinds[wrong[0]].__name__)}")


def _lie(found: str, why: str) -> FormatError:
    return FormatError("the surgery", found, why, _AGAIN)
