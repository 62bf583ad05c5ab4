"""A bundle: one folder with a pruned model, the recipe that made it and the facts of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.core.atomic import new_folder
from secateur.core.errors import FormatError
from secateur.core.facts import Facts
from secateur.core.masks import Masks
from secateur.formats.container import read_tensors, write_tensors
from secateur.formats.surgery import Surgery
from secateur.formats.surgery_file import SURGERY_LIMIT, parse_surgery, surgery_text
from secateur.formats.texts import (
    FACTS_LIMIT,
    RECIPE_LIMIT,
    facts_text,
    parse_facts,
    parse_recipe,
    read_limited,
    recipe_text,
)

MODEL, RECIPE, FACTS = "model.safetensors", "recipe.yaml", "facts.json"
#: Only in the bundle of a network that was cut.
SURGERY = "surgery.json"


@dataclass(frozen=True)
class Bundle:
    """A pruned model as it was read from a folder.

    Args:
        tensors: The full ``state_dict``, dense; tied names hold the same tensor.
        masks: Which entries are kept, for the weights that were pruned.
        recipe: The recipe as plain values.
        facts: What the run said about itself.
        surgery: What was cut, if anything was.

    Example:
        >>> Bundle({}, Masks({}), {"seed": 1}, Facts()).recipe
        {'seed': 1}
    """

    tensors: Mapping[str, Tensor]
    masks: Masks
    recipe: Mapping[str, Any]
    facts: Facts
    surgery: Surgery | None = None


def write_bundle(  # noqa: PLR0913  a folder, and one argument for each of its files
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    masks: Masks,
    *,
    recipe: Mapping[str, Any],
    facts: Facts,
    surgery: Surgery | None = None,
    overwrite: bool = False,
) -> None:
    """Write a bundle. An interrupted run leaves the old folder or the new one, never a mixture.

    Args:
        folder: The folder to make.
        tensors: A full ``state_dict``, buffers included.
        masks: Masks of some of its weights.
        recipe: Plain values: text, numbers, flags, lists and mappings.
        facts: What the run said about itself.
        surgery: What was cut, if anything was. Such a folder is not replaced by one without.
        overwrite: Replace a folder that is already there.

    Raises:
        OutputExists: The folder is there and ``overwrite`` is false.
        UsageError: Something cannot be stored; nothing is written then.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp()) / "pruned"
        >>> layer = torch.nn.Linear(4, 2)
        >>> masks = Masks({"weight": torch.eye(2, 4, dtype=torch.bool)})
        >>> write_bundle(folder, layer.state_dict(), masks, recipe={"seed": 1}, facts=Facts())
        >>> read_bundle(folder).masks
        Masks(1 weights, 2 of 8 kept)
    """
    recipe_yaml, facts_json = recipe_text(recipe), facts_text(facts)
    cuts_json = None if surgery is None else surgery_text(surgery)
    with new_folder(folder, overwrite=overwrite) as temporary:
        write_tensors(temporary / MODEL, tensors, masks)
        (temporary / RECIPE).write_text(recipe_yaml, encoding="utf-8")
        (temporary / FACTS).write_text(facts_json, encoding="utf-8")
        if cuts_json is not None:
            (temporary / SURGERY).write_text(cuts_json, encoding="utf-8")


def read_bundle(folder: str | Path) -> Bundle:
    """Read a bundle, believing nothing in it.

    Raises:
        FormatError: A file is missing, truncated, altered, oversized or of another version; the
            message names it.

    Example:
        >>> read_bundle("no-such-folder")
        Traceback (most recent call last):
            ...
        secateur.core.errors.FormatError: reading the bundle 'no-such-folder': there is no \
model.safetensors, recipe.yaml, facts.json. A bundle is a folder with model.safetensors, \
recipe.yaml, facts.json. Check the path.
    """
    folder = Path(folder)
    missing = [name for name in (MODEL, RECIPE, FACTS) if not (folder / name).is_file()]
    if missing:
        raise FormatError(
            f"reading the bundle {str(folder)!r}",
            f"there is no {', '.join(missing)}",
            f"a bundle is a folder with {MODEL}, {RECIPE}, {FACTS}",
            "check the path",
        )
    with _reading(folder / RECIPE):
        recipe = parse_recipe(read_limited(folder / RECIPE, RECIPE_LIMIT))
    with _reading(folder / FACTS):
        facts = parse_facts(read_limited(folder / FACTS, FACTS_LIMIT))
    surgery = read_surgery(folder) if (folder / SURGERY).exists() else None
    if surgery is None and any(width.kept < width.groups for width in facts.widths):
        raise FormatError(
            f"reading the bundle {str(folder)!r}",
            f"{SURGERY} is missing",
            f"{FACTS} says that the network was cut, and without it the cut cannot be repeated",
            "copy the whole folder again from where it came",
        )
    tensors, masks = read_tensors(folder / MODEL)
    return Bundle(tensors, masks, recipe, facts, surgery)


def read_surgery(folder: str | Path) -> Surgery:
    """What was cut, out of the ``surgery.json`` of a folder.

    Raises:
        FormatError: It is missing, damaged, oversized or of another version.

    Example:
        >>> read_surgery("no-such-folder")
        Traceback (most recent call last):
            ...
        secateur.core.errors.FormatError: reading 'no-such-folder/surgery.json': ...
    """
    path = Path(folder) / SURGERY
    with _reading(path):
        return parse_surgery(read_limited(path, SURGERY_LIMIT))


def is_bundle(folder: str | Path) -> bool:
    """Whether a folder has the three files of a bundle. Says nothing about what is in them.

    Example:
        >>> is_bundle("no-such-folder")
        False
    """
    return all((Path(folder) / name).is_file() for name in (MODEL, RECIPE, FACTS))


def is_meant(folder: str | Path) -> bool:
    """Whether a folder is a bundle, or one that has lost files; :func:`read_bundle` names them.

    Example:
        >>> is_meant("no-such-folder")
        False
    """
    if (Path(folder) / "config.json").is_file():  # of Transformers, with a surgery of its own
        return is_bundle(folder)
    return any((Path(folder) / name).is_file() for name in (RECIPE, FACTS, SURGERY))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FormatError as error:
        found = f"{error.asked}: {error.found}"
        raise FormatError(f"reading {str(path)!r}", found, error.why, error.do) from error
