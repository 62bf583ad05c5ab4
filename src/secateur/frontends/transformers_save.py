"""Saving a Transformers model that was cut, so that Transformers can load it again if it can at all.

If some configuration builds the cut network, the folder is a plain one. If not, its
``config.json`` records the widths of each layer (Transformers keeps them, and most of its models
cannot build from them), and ``surgery.json`` with the original configuration lets
:func:`load_transformers` rebuild it.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.atomic import new_folder
from secateur.core.batches import evaluating
from secateur.core.errors import MissingExtra, UsageError, first_line, kind_of
from secateur.core.facts import Facts
from secateur.core.masks import Masks
from secateur.formats import Bundle, Surgery, read_surgery, read_tensors, surgery_text
from secateur.formats.container import write_tensors
from secateur.frontends.surgery import load_bundle_
from secateur.frontends.transformers import GENERATION, build, read, take_types_
from secateur.frontends.transformers_config import (
    Key,
    Search,
    Wanted,
    layers_of,
    shapes_of,
    stated_by,
)
from secateur.frontends.transformers_example import example_for
from secateur.structure.masked import call, compare
from secateur.structure.outputs import predictions
from secateur.structure.stated import undeleted_

WEIGHTS, CONFIG, SURGERY, ORIGINAL = (
    "model.safetensors",
    "config.json",
    "surgery.json",
    "original",
)
# The same operators on the same weights: only their order may differ.
_NEAR = {torch.float64: 1e-10, torch.float32: 1e-5}
# What models raise for inputs, or sizes, that do not go together.
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError)


@dataclass(frozen=True)
class SavedModel:
    """How a cut model was saved.

    Args:
        folder: Where.
        uniform: Whether plain ``from_pretrained`` loads it. If not, :func:`load_transformers` does.
        changed: Keys of the configuration that changed, with their new values.
        layers: If not uniform: number of a layer -> keys that differ there.
        unstated: Layers whose widths no configuration states.

    Example:
        >>> SavedModel(Path("out"), uniform=True).layers
        {}
    """

    folder: Path
    uniform: bool
    changed: Mapping[str, int] = field(default_factory=dict)
    layers: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    unstated: tuple[int, ...] = ()


def save_transformers(
    model: nn.Module,
    folder: str | Path,
    surgery: Surgery,
    *,
    example: Any = None,
    overwrite: bool = False,
) -> SavedModel:
    """Write a folder that holds a cut Transformers model.

    Args:
        model: After the cut; every module keeps its mode.
        folder: The folder to make.
        surgery: What was cut.
        example: Inputs on which the rebuilt model must agree; made up for texts and images.
        overwrite: Replace a folder that is already there.

    Raises:
        MissingExtra: Transformers is not installed.
        UsageError: It is no Transformers model, or an example is needed, or the model does not run
            on the one given.

    Example:
        >>> import tempfile, transformers
        >>> from secateur.frontends.surgery import surgery_for
        >>> from secateur.structure import apply_, couple, cuts_for
        >>> config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, vocab_size=9,
        ...                                  num_attention_heads=2, intermediate_size=4)
        >>> bert = transformers.BertModel(config).eval()
        >>> structure = couple(bert, {"input_ids": torch.ones(1, 3, dtype=torch.long)})
        >>> keep = {"encoder.layer.0.intermediate.dense": torch.tensor([1, 1, 0, 1]).bool()}
        >>> cuts = cuts_for(bert, structure, keep)
        >>> surgery = surgery_for(bert, cuts)
        >>> apply_(bert, cuts)
        >>> saved = save_transformers(bert, tempfile.mkdtemp() + "/out", surgery)
        >>> saved.uniform, saved.changed
        (True, {'intermediate_size': 3})
        >>> transformers.BertModel.from_pretrained(saved.folder).config.intermediate_size
        3
    """
    require_transformers(model)
    host: Any = model
    original = _original_config(host, surgery)
    original.dtype = host.dtype  # it may have been converted since it was built
    example = example_for(host, example)
    plain = _plain(model, surgery, example)
    if plain is not None:
        built, changed = plain
        with new_folder(folder, overwrite=overwrite) as temporary:
            built.save_pretrained(temporary)
        return SavedModel(Path(folder), True, changed)
    search = Search(type(model), original)
    config, saved = _per_layer(search, _wanted(model, surgery, None), host, surgery)
    with new_folder(folder, overwrite=overwrite) as temporary:
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for block in surgery.blocks:
            if block.kind == "deleted":
                undeleted_(original, block.details)
        original.architectures = [type(model).__name__]
        original.save_pretrained(temporary / ORIGINAL)
        if getattr(host, "generation_config", None) is not None:
            how = host.generation_config.to_json_string()
            (temporary / GENERATION).write_text(how, encoding="utf-8")
        write_tensors(temporary / WEIGHTS, model.state_dict(), Masks({}))
        (temporary / SURGERY).write_text(surgery_text(surgery), encoding="utf-8")
    return replace(saved, folder=Path(folder))


def load_transformers(folder: str | Path) -> nn.Module:
    """Load what :func:`save_transformers` wrote, uniform or not, in evaluation mode.

    Raises:
        FormatError: A file is missing or damaged.

    Example:
        >>> load_transformers("no-such-folder")
        Traceback (most recent call last):
            ...
        secateur.core.errors.FormatError: the Transformers folder 'no-such-folder': ...
    """
    folder = Path(folder)
    if not (folder / SURGERY).is_file():
        return read(folder)
    surgery = read_surgery(folder)
    tensors, masks = read_tensors(folder / WEIGHTS)
    model = build(folder)
    take_types_(model, tensors)
    load_bundle_(model, Bundle(tensors, masks, {}, Facts(), surgery))
    return model


def loadable(model: nn.Module, surgery: Surgery, example: Any) -> bool:
    """Whether plain ``from_pretrained`` would load what :func:`save_transformers` writes.

    Args:
        model: After the cut, in evaluation mode.
        surgery: What was cut.
        example: Inputs on which the rebuilt model must agree.

    Example:
        >>> loadable(nn.Linear(2, 2), Surgery("Linear"), None)
        False
    """
    return is_transformers(model) and _plain(model, surgery, example) is not None


# -- what the configuration must build --------------------------------------------------------------


def _wanted(model: nn.Module, surgery: Surgery, renamed: Mapping[str, str] | None) -> Wanted:
    """All names, shapes and sizes, under the names that they have after blocks are gone."""
    shapes = shapes_of(model)
    stated = stated_by(model)
    edited = {
        (path, name)
        for path, edits in surgery.attributes.items()
        for name in edits
        if (path, name) in stated
    }
    ratios = {
        (before, after) for e in surgery.attributes.values() for before, after in e.values()
    } | {(s.size, s.kept) for axes in surgery.cuts.values() for s in axes.values()}
    if renamed is not None and len(surgery.blocks):
        paths = _module_names(model, surgery)
        shapes = {renamed[name]: shape for name, shape in shapes.items() if name in renamed}
        stated = {(paths[p], a): v for (p, a), v in stated.items() if p in paths}
        edited = {(paths[p], a) for p, a in edited if p in paths}
    return Wanted(shapes, stated, frozenset(edited), frozenset(ratios))


def _per_layer(
    search: Search, wanted: Wanted, model: Any, surgery: Surgery
) -> tuple[dict[str, Any], SavedModel]:
    """The keys that fit outside the layers, and then layer by layer."""
    path, layers = layers_of(model)
    common, _ = search.nearest(replace(wanted, outside=f"{path}."), {})
    overrides, unstated = {}, []
    for number in range(len(layers)):
        prefix = f"{path}.{number}."
        own = {
            (s.size, s.kept)
            for name, axes in surgery.cuts.items()
            if name.startswith(prefix)
            for s in axes.values()
        }
        part = replace(wanted, under=prefix, ratios=frozenset(own))
        values, score = search.nearest(part, common)
        if score[0]:
            unstated.append(number)
            values = search.needed(part, values)
        overrides[number] = {
            _text(key): value for key, value in values.items() if common.get(key) != value
        }
    plain = search.configuration(common).to_dict()
    plain["architectures"] = [type(model).__name__]
    plain["per_layer_config"] = {str(n): keys for n, keys in overrides.items() if keys}
    changed = {_text(key): value for key, value in common.items()}
    layered = {n: keys for n, keys in overrides.items() if keys}
    return plain, SavedModel(Path(), False, changed, layered, tuple(unstated))


# -- the model that a configuration builds ----------------------------------------------------------


def _plain(model: Any, surgery: Surgery, example: Any) -> tuple[Any, dict[str, int]] | None:
    """What a plain configuration builds, with the weights, and the keys that changed in it."""
    original = _original_config(model, surgery)
    shorter, renamed = _without_removed(model, original, surgery)
    search, expected = Search(type(model), shorter), _outputs(model, example)
    for values in search.find(_wanted(model, surgery, renamed)):
        built = _rebuilt(search, values, model, renamed)
        if built is not None and _agree(built, expected, example):
            changed = {_text(key): value for key, value in values.items()}
            if shorter is not original:
                changed["num_hidden_layers"] = shorter.num_hidden_layers
            return built, changed
    return None


def _rebuilt(
    search: Search, values: Mapping[Key, int], model: Any, renamed: Mapping[str, str]
) -> Any:
    state = {renamed[name]: x for name, x in model.state_dict().items() if name in renamed}
    with torch.random.fork_rng():
        built: Any = search.cls._from_config(  # type: ignore[attr-defined]
            search.configuration(values), dtype=model.dtype
        )
    built = built.to(model.device).eval()
    if {name: tuple(x.shape) for name, x in state.items()} != shapes_of(built):
        return None
    take_types_(built, state)
    built.load_state_dict(state)
    if getattr(model, "generation_config", None) is not None:
        built.generation_config = copy.deepcopy(model.generation_config)
    return built


@torch.no_grad()
def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    try:
        with evaluating(model):
            return predictions(call(model, example))
    except _FAILURES as error:
        raise UsageError(
            f"saving {kind_of(model)} for Transformers",
            f"it does not run on the example ({first_line(error)})",
            "what its configuration builds has to compute the same",
            "pass example=: inputs on which it runs",
        ) from error


@torch.no_grad()
def _agree(built: nn.Module, expected: list[Tensor], example: Any) -> bool:
    try:
        found = predictions(call(built, example))
    except _FAILURES:
        return False
    dtype = next(built.parameters()).dtype
    return compare(found, expected).error <= _NEAR.get(dtype, 1e-2)


# -- blocks that are gone ---------------------------------------------------------------------------


def _without_removed(model: Any, original: Any, surgery: Surgery) -> tuple[Any, dict[str, str]]:
    """The configuration with fewer layers, and old name -> new name of every tensor left."""
    names = {name: name for name in model.state_dict()}
    path, layers = layers_of(model)
    gone = _removed(path, surgery)
    plain = original.to_dict()
    count = getattr(original, "num_hidden_layers", None)
    if not gone or count != len(layers):
        return original, names
    plain = {
        key: [v for i, v in enumerate(value) if i not in gone]
        if isinstance(value, list) and len(value) == count
        else value
        for key, value in plain.items()
    }
    key = type(original).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    plain[key] = count - len(gone)
    shorter = type(original).from_dict(plain)
    return shorter, {n: new for n in names if (new := _renumbered(n, path, gone)) is not None}


def _module_names(model: nn.Module, surgery: Surgery) -> dict[str, str]:
    path, _ = layers_of(model)
    gone = _removed(path, surgery)
    names = {p: _renumbered(p, path, gone) for p, _ in model.named_modules()}
    return {old: new for old, new in names.items() if new is not None}


def _removed(path: str, surgery: Surgery) -> set[int]:
    inside = [b.module.removeprefix(f"{path}.") for b in surgery.blocks if b.kind == "removed"]
    return {int(part) for part in inside if re.fullmatch(r"\d+", part)}


def _renumbered(name: str, path: str, gone: set[int]) -> str | None:
    match = re.match(rf"{re.escape(path)}\.(\d+)(?=\.|$)", name)
    if match is None:
        return name
    number = int(match[1])
    if number in gone:
        return None
    return f"{path}.{number - sum(i < number for i in gone)}{name[match.end() :]}"


# -- small things -----------------------------------------------------------------------------------


def _original_config(model: Any, surgery: Surgery) -> Any:
    """The configuration before the cut, which may have edited the model's own."""
    config = copy.deepcopy(model.config)
    for name, (before, _) in surgery.attributes.get("", {}).items():
        if name.startswith("config.") and "[" not in name:
            setattr(config, name.removeprefix("config."), before)
    return config


def is_transformers(model: nn.Module) -> bool:
    """Whether it has a configuration of Transformers.

    Example:
        >>> is_transformers(nn.Linear(2, 2))
        False
    """
    library = sys.modules.get("transformers")  # there, if the model is one of its own
    return library is not None and isinstance(model, library.PreTrainedModel)


def require_transformers(model: nn.Module) -> None:
    """Refuse what has no configuration of Transformers.

    Raises:
        MissingExtra: Transformers is not installed.
        UsageError: It is no model of Transformers.

    Example:
        >>> require_transformers(nn.Linear(2, 2))
        Traceback (most recent call last):
        ...
        secateur.core.errors.UsageError: saving a Linear for Transformers: it is no PreTrainedModel...
    """
    asked = f"saving {kind_of(model)} for Transformers"
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers", "transformers", asked) from None
    if not isinstance(model, transformers.PreTrainedModel):
        raise UsageError(
            asked,
            "it is no PreTrainedModel",
            "only those have a configuration",
            "save a bundle (Pruned.save), and load it with secateur.load",
        )


def _text(key: Key) -> str:
    return ".".join(str(part) for part in key)
