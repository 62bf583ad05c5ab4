"""Where models and data come from on the command line."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from torch import Tensor, nn

from secateur.core.batches import Data
from secateur.core.errors import FileError, FormatError, NotYet, UnknownName, UsageError, kind_of
from secateur.core.facts import Facts
from secateur.core.masks import Masks
from secateur.core.slots import bare
from secateur.formats import Bundle, read_bundle
from secateur.formats.bundle import is_meant
from secateur.frontends import pyfile
from secateur.frontends.remembered import remember_source_
from secateur.frontends.weights import load_weights_

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_OTHERS = (".onnx", ".keras", ".h5", ".hdf5", ".tflite", ".gguf")
_FORMS = "a model is file.py:function, a Transformers folder, or a bundle that prune wrote"


@dataclass(frozen=True)
class Loaded:
    """A model and where it came from.

    Args:
        model: In evaluation mode.
        masks: Of a bundle; empty otherwise.
        source: How the architecture is built: ``{"factory": ..., "sha256": ...}``, with the hash of the
            Python file, or ``{"transformers": ...}``.
        facts: Of a bundle; ``None`` otherwise.
        remark: What a user should know of how it was built; ``""`` for nothing.
    """

    model: nn.Module
    masks: Masks
    source: Mapping[str, str] = field(default_factory=dict)
    facts: Facts | None = None
    remark: str = ""

    def __post_init__(self) -> None:
        remember_source_(self.model, self.source)


def load_model(spec: str, *, weights: str | None = None, model: str | None = None) -> Loaded:
    r"""Build the model that ``spec`` names.

    Args:
        spec: ``file.py:function`` (called without arguments, returns a module, which is taken out of
            wrappers of ``torch.compile`` and data parallelism), a Transformers folder
            (``config.json`` and ``model.safetensors``), or a bundle.
        weights: For a function: a ``.safetensors`` file or a bundle to load into what it builds.
        model: For a bundle: what to build (``file.py:function`` or a Transformers folder), if the
            bundle does not say or what it says is gone.

    Raises:
        FileError: A file is missing or damaged.
        UsageError: The function does not give a module, or the weights do not fit.
        NotYet: A format that is not read yet.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "net.py"
        >>> _ = file.write_text("import torch\ndef build(): return torch.nn.Linear(4, 2)")
        >>> load_model(f"{file}:build").model
        Linear(in_features=4, out_features=2, bias=True)
    """
    path = Path(spec)
    _refuse(path, f"the model {spec!r}")
    if is_meant(path):
        if weights is not None:
            raise UsageError(
                f"the bundle {spec!r} with --weights",
                "a bundle has weights of its own",
                "only one of the two can be loaded",
                "leave --weights out",
            )
        return _from_bundle(path, model)
    if model is not None:
        raise UsageError(
            f"{spec!r} with --model",
            "it is not a bundle",
            "--model says what to build for a bundle",
            "leave --model out",
        )
    if path.is_dir():
        if weights is not None:
            raise UsageError(
                f"the folder {spec!r} with --weights",
                "a Transformers folder has weights of its own",
                "only one of the two can be loaded",
                "leave --weights out",
            )
        return Loaded(_transformers(path), Masks({}), {"transformers": spec})
    if ".py:" in spec:
        network = _built(spec)
        masks = Masks({}) if weights is None else load_weights_(network, weights)
        return Loaded(network.eval(), masks, _factory(spec))
    _explain(path, spec)
    raise AssertionError


def load_data(spec: str) -> Data:
    """The data that ``file.py:function`` gives.

    The function takes no arguments and returns :class:`~secateur.core.batches.Data`, a mapping with
    some of its fields (``train``, ``test``, ``loss``, ``metric``, ``calibration``), or a tuple
    ``(train, test)`` or ``(train, test, metric)``.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "data.py"
        >>> _ = file.write_text("def load(): return {'test': [1, 2]}")
        >>> load_data(f"{file}:load").test
        [1, 2]
    """
    found = pyfile.call(spec, "data")
    if isinstance(found, Data):
        return found
    known = [f.name for f in fields(Data)]
    if isinstance(found, Mapping):
        for key in found:
            if key not in known:
                raise UnknownName("entry of the data", str(key), known)
        return Data(**found)
    if isinstance(found, tuple) and len(found) in (2, 3):
        return Data(**dict(zip(("train", "test", "metric"), found, strict=False)))
    size = f" of {len(found)}" if isinstance(found, tuple) else ""
    raise UsageError(
        f"data from {spec!r}",
        f"it returned {kind_of(found)}{size}",
        "data is Data(...), a mapping with train and test, or a tuple (train, test)",
        "return one of the three",
    )


def _from_bundle(folder: Path, model: str | None) -> Loaded:
    bundle = read_bundle(folder)
    source = _source_of(bundle, folder, model)
    remark = ""
    if "factory" in source:
        network = _built(source["factory"])
        told = bundle.facts.environment.get("source")
        before = told.get("sha256") if model is None and isinstance(told, Mapping) else None
        if before not in (None, source["sha256"]):
            file, _ = pyfile.split(source["factory"])
            remark = (
                f"{file} is not the file that the bundle {str(folder)!r} was made with, or was changed "
                "since: the same weights may compute something else in it"
            )
    else:
        network = _transformers(Path(source["transformers"]), bundle.tensors)
    masks = load_weights_(network, str(folder), bundle)
    return Loaded(network.eval(), masks, source, bundle.facts, remark)


def _factory(spec: str) -> dict[str, str]:
    file, _ = pyfile.split(spec)
    return {"factory": spec, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def _source_of(bundle: Bundle, folder: Path, model: str | None) -> dict[str, str]:
    """How to build the architecture: what the user says, else what the bundle remembers.

    A remembered Python file is code, so it is looked up where the user stands (or at the absolute
    path that was given when pruning), and never inside the bundle or relative to it: a bundle from
    somebody else must not bring its own code along.
    """
    if model is not None:
        return _factory(model) if ".py:" in model else {"transformers": model}
    told = bundle.facts.environment.get("source")
    asked = f"the architecture of the bundle {str(folder)!r}"
    do = "pass --model file.py:function (or a Transformers folder), as when it was pruned"
    why = "a bundle holds weights, and no code"
    if not isinstance(told, Mapping) or not told:
        raise UsageError(asked, "it does not say what it was built from", why, do)
    factory, other = told.get("factory"), told.get("transformers")
    if isinstance(factory, str):
        file, _ = pyfile.split(factory)
        if not file.is_file():
            raise FileError(asked, f"it was built by {factory!r}, which is not here", why, do)
        if file.resolve().is_relative_to(folder.resolve()):
            raise UsageError(
                asked, f"{factory!r} lies inside the bundle", "no code is run out of a bundle", do
            )
        return _factory(factory)
    if isinstance(other, str):
        for place in (Path(other), folder / other):
            if (place / "config.json").is_file():
                return {"transformers": str(place)}
        raise FileError(asked, f"it was built from {other!r}, which is not here", why, do)
    raise UsageError(asked, f"its source is {dict(told)}", why, do)


def _built(spec: str) -> nn.Module:
    network = pyfile.call(spec, "a model")
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"a model from {spec!r}",
            f"it returned {kind_of(network)}",
            "pruning works on torch.nn.Module",
            "return the module itself",
        )
    return bare(network)  # compared are networks, and a pruned one comes without a wrapper


def _transformers(folder: Path, others: Mapping[str, Tensor] | None = None) -> nn.Module:
    """What a folder holds, or what it takes to hold other tensors."""
    from secateur.frontends.transformers import build, read, take_types_

    if not (folder / "config.json").is_file():
        raise FormatError(
            f"the model {str(folder)!r}",
            "the folder has no config.json and is no bundle",
            _FORMS,
            "check the path",
        )
    if others is None:
        return read(folder)
    network = build(folder)
    take_types_(network, others)
    return network


def _refuse(path: Path, asked: str) -> None:
    if path.suffix.lower() in _PICKLES:
        raise UsageError(
            asked,
            f"{path.suffix} files are pickles",
            "a pickle can run any code when it is read, so none are read here",
            'convert it once, if you trust it: python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{path.name}', weights_only=True), '{path.stem}.safetensors')\"",
        )
    onnx = path.suffix.lower() == ".onnx"
    if path.suffix.lower() in _OTHERS:
        raise NotYet(
            asked,
            f"{path.suffix} files cannot be read yet",
            "this version prunes PyTorch models",
            "give the PyTorch model (file.py:function), and export afterwards"
            + ("; to skip the zeros of an ONNX file: secateur compile" if onnx else ""),
        )


def _explain(path: Path, spec: str) -> None:
    """Say why ``spec`` is no model."""
    asked = f"the model {spec!r}"
    if path.suffix == ".safetensors":
        raise UsageError(
            asked,
            "it holds weights, but not the architecture",
            _FORMS,
            f"write file.py:function --weights {spec}",
        )
    if path.suffix == ".py":
        raise UsageError(
            asked, "the function is missing", _FORMS, f"write {spec}:build, if build() makes it"
        )
    if path.exists():
        raise UsageError(asked, "it is a file of no known kind", _FORMS, "use one of these forms")
    raise FileError(asked, "there is no such file or folder", _FORMS, "check the path")
