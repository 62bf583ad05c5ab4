"""A checkpoint: the whole state of a training run in one file, without pickle.

The file is a tensor file like that of a bundle (hash included), in which one tensor holds JSON.
It is described in ``docs/formats/checkpoint.md``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.core.errors import FormatError, UsageError, kind_of
from secateur.core.masks import Masks
from secateur.formats.container import read_tensors, write_tensors
from secateur.formats.table import read_json

#: Version of the checkpoint format that this package writes and reads.
CHECKPOINT_VERSION = 1

#: The tensor that holds the JSON.
TEXT = "checkpoint.json"

_AGAIN = "continue from an earlier checkpoint, or start the run anew"
_DEPTH = 64


@dataclass(frozen=True)
class Stamp:
    """What a checkpoint belongs to.

    Args:
        model: Hash of the names, shapes and types of the model (:func:`names_hash`).
        recipe: Fingerprint of the recipe; ``""`` if there is none.
        step: Optimizer steps that were done.
        rank: The process that wrote it.
        world: How many processes trained.
        library: Version of secateur that wrote it.
        start: Hash of the weights that the run started from (:func:`values_hash`); ``""`` for a loop
            whose start is not known.

    Example:
        >>> Stamp("ab", "cd", step=3).world
        1
    """

    model: str
    recipe: str
    step: int
    rank: int = 0
    world: int = 1
    library: str = ""
    start: str = ""


def names_hash(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and types, stable across processes and devices.

    Example:
        >>> names_hash({"w": torch.zeros(2)}) == names_hash({"w": torch.ones(2)})
        True
        >>> names_hash({"w": torch.zeros(2)}) == names_hash({"w": torch.zeros(3)})
        False
    """
    lines = sorted(f"{n} {tuple(t.shape)} {t.dtype}" for n, t in tensors.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def values_hash(tensors: Mapping[str, Any]) -> str:
    """A hash of the bits of all tensors, in their order; what is no tensor is passed over.

    Example:
        >>> values_hash({"w": torch.zeros(2)}) == values_hash({"w": torch.zeros(2)})
        True
        >>> values_hash({"w": torch.zeros(2)}) == values_hash({"w": torch.ones(2)})
        False
    """
    digest = hashlib.sha256()
    for tensor in tensors.values():
        if isinstance(tensor, Tensor):
            flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(flat.numpy().data)
    return digest.hexdigest()[:16]


def write_checkpoint(path: str | Path, state: Mapping[str, Any], stamp: Stamp) -> None:
    """Write a nested state of tensors and plain values; the file appears whole or not at all.

    Args:
        path: The file; one that is there is replaced.
        state: Mappings, lists, tuples, tensors, numbers, flags, text, bytes and ``None``.
        stamp: What it belongs to.

    Raises:
        UsageError: Something else is in the state; the message says where. Nothing is written.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "step-1.safetensors"
        >>> write_checkpoint(file, {"w": torch.ones(2), "rate": (0.1, None)}, Stamp("ab", "", 1))
        >>> state, stamp = read_checkpoint(file)
        >>> state["w"].tolist(), state["rate"], stamp.step
        ([1.0, 1.0], (0.1, None), 1)
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode(dict(state), "", tensors)
    head = {"version": CHECKPOINT_VERSION, "stamp": asdict(stamp), "state": tree}
    text = json.dumps(head, separators=(",", ":"), allow_nan=False)
    tensors[TEXT] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    write_tensors(path, tensors, Masks({}))


def read_checkpoint(path: str | Path) -> tuple[dict[str, Any], Stamp]:
    """Read what :func:`write_checkpoint` wrote, believing nothing in it. Tensors are on the CPU.

    Raises:
        FormatError: The file is missing, truncated, altered, newer, or no checkpoint.

    Example:
        >>> read_checkpoint("no-such-file")
        Traceback (most recent call last):
            ...
        secateur.core.errors.FormatError: reading 'no-such-file': there is no such file. ...
    """
    tensors, masks = read_tensors(path)
    try:
        text = tensors.pop(TEXT, None)
        if text is None or text.dtype != torch.uint8 or len(masks):
            raise _bad(f"it has no text tensor {TEXT!r}", "it is no checkpoint")
        head = read_json(bytes(text.numpy()).decode(), f"its {TEXT!r}")
        _require_version(head)
        stamp = _stamp(head["stamp"])
        used: set[str] = set()
        state = _decode(head["state"], tensors, used, 0)
        if used != set(tensors) or not isinstance(state, dict):
            raise _bad(f"{len(set(tensors) - used)} tensors belong to nothing", "it was altered")
    except FormatError as error:
        asked = f"reading the checkpoint {str(path)!r}"
        raise FormatError(asked, error.found, error.why, error.do) from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        found = f"its JSON does not have the right form ({str(error)[:120]})"
        asked = f"reading the checkpoint {str(path)!r}"
        raise FormatError(asked, found, "its parts are fixed", _AGAIN) from error
    return state, stamp


def require_stamp(path: str | Path, found: Stamp, wanted: Stamp) -> None:
    """Refuse a checkpoint of another model, start, recipe or number of processes.

    Args:
        path: The file, for the message.
        found: Its stamp.
        wanted: That of the run that wants to go on; step and library may differ.

    Raises:
        UsageError: They do not belong together.

    Example:
        >>> require_stamp("a", Stamp("ab", "cd", 3), Stamp("ab", "cd", 0))
        >>> require_stamp("a", Stamp("ab", "cd", 3), Stamp("ab", "ef", 0))
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: continuing from the checkpoint 'a': its recipe is 'cd', \
that of this run is 'ef'. Another recipe ...
    """
    reasons = {
        "model": (
            "names, shapes or types of its tensors differ",
            "build the model that the run started with, or choose another folder",
        ),
        "start": (
            "the run in this place started from other weights, and would end with its own network",
            "choose another folder, or start from the weights of that run",
        ),
        "recipe": (
            "another recipe would prune differently from here on",
            "continue with the recipe of the run, or choose another folder",
        ),
        "world": (
            "with another number of processes each would see other data, and other random numbers",
            "start as many processes as before, or begin a new run from the weights",
        ),
        "rank": ("each process continues its own part of the data", "do not rename the files"),
    }
    for name, (why, do) in reasons.items():
        theirs, ours = getattr(found, name), getattr(wanted, name)
        if theirs != ours:
            raise UsageError(
                f"continuing from the checkpoint {str(path)!r}",
                f"its {name} is {theirs!r}, that of this run is {ours!r}",
                why,
                do,
            )


# -- a nested state as JSON beside tensors ----------------------------------------------------------


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for ``value``; its tensors go into ``tensors`` under readable names."""
    if isinstance(value, Tensor):
        name, count = where or "value", 2
        while name in tensors or name == TEXT:
            name, count = f"{where}~{count}", count + 1
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, float):  # numpy's float64 is one too
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if where.count("/") >= _DEPTH:
        raise _foreign(where, f"nested deeper than {_DEPTH}")
    if type(value) in (list, tuple):
        items = [_encode(v, f"{where}/{i}", tensors) for i, v in enumerate(value)]
        return items if type(value) is list else {"tuple": items}
    if isinstance(value, Mapping):
        pairs = []
        for key, item in value.items():
            if type(key) not in (str, int, bool, float) or (
                isinstance(key, float) and not math.isfinite(key)
            ):
                raise _foreign(where, f"a mapping with the key {str(key)[:60]!r}")
            below = f"{where}/{key}" if where else str(key)
            pairs.append([key, _encode(item, below, tensors)])
        if not isinstance(value, Counter) and all(isinstance(key, str) for key, _ in pairs):
            return {"mapping": dict(pairs)}
        return {"counter" if isinstance(value, Counter) else "pairs": pairs}
    raise _foreign(where, kind_of(value))


def _decode(tree: Any, tensors: Mapping[str, Tensor], used: set[str], depth: int) -> Any:
    if depth > 2 * _DEPTH:
        raise _bad("it is nested too deeply", f"at most {_DEPTH} levels are written")
    if isinstance(tree, list):
        return [_decode(item, tensors, used, depth + 1) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, body),) = tree.items()
    if kind == "tensor":
        used.add(body)
        return tensors[body]
    if kind == "float":
        return float(body)
    if kind == "bytes":
        return bytes.fromhex(body)
    if kind == "tuple":
        return tuple(_decode(item, tensors, used, depth + 1) for item in body)
    if kind == "mapping":
        return {key: _decode(item, tensors, used, depth + 1) for key, item in body.items()}
    if kind in ("pairs", "counter"):
        pairs = {key: _decode(item, tensors, used, depth + 1) for key, item in body}
        return Counter(pairs) if kind == "counter" else pairs
    raise _bad(f"a value is of the kind {str(kind)[:40]!r}", "there is no such kind")


def _stamp(data: dict[str, Any]) -> Stamp:
    words = dict.fromkeys(("model", "recipe", "library", "start"), str)
    kinds = {**words, **dict.fromkeys(("step", "rank", "world"), int)}
    assert set(kinds) == {f.name for f in fields(Stamp)}
    if set(data) != set(kinds) or any(type(data[n]) is not kind for n, kind in kinds.items()):
        raise _bad(f"its stamp is {str(data)[:120]}", f"a stamp has {', '.join(kinds)}")
    return Stamp(**data)


def _require_version(head: Mapping[str, Any]) -> None:
    version = head.get("version")
    if type(version) is not int or version != CHECKPOINT_VERSION:
        raise FormatError(
            "the checkpoint",
            f"its version is {str(version)[:40]}",
            f"this secateur reads version {CHECKPOINT_VERSION}",
            "install the secateur version that wrote it, or start the run anew",
        )


def _foreign(where: str, found: str) -> UsageError:
    return UsageError(
        f"writing {where or 'the state'!r} into a checkpoint",
        f"it is {found}",
        "a checkpoint holds tensors and plain values, so that reading one runs no code",
        "leave it out of the state, or give it as numbers, text, lists and mappings",
    )


def _bad(found: str, why: str) -> FormatError:
    return FormatError("the checkpoint", found, why, _AGAIN)
